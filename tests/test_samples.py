"""samples.jsonl: what a second's line says, and that taking it disturbs nothing."""

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fanmark.loadgen.clock import run_virtually
from fanmark.loadgen.counters import Reading
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.health import ClientState
from fanmark.loadgen.records import gap_bucket
from fanmark.loadgen.samples import (
    ArmSample,
    Host,
    Sample,
    Sampler,
    ServerSample,
    VirtualSampler,
    read_samples,
    server_sample,
)
from fanmark.loadgen.scenario import Target
from fanmark.loadgen.tally import Tally

BEFORE = Reading("vllm", {"prompt_tokens": 100.0, "running": 7.0})
NOW = Reading("vllm", {"prompt_tokens": 130.0, "generation_tokens": 4.0, "running": 2.0, "kv_use": 0.5})


class Told(Endpoint):
    """A target whose servers tell what they are given to tell, or nothing."""

    def __init__(self, readings: list[Reading | None]) -> None:
        super().__init__("t", Target(url="http://h/v1"), "m", "vllm")
        self.readings = readings
        self.asked = 0

    @property
    def lane(self) -> Any:
        raise NotImplementedError

    async def send(self, *_: Any) -> Any:
        raise NotImplementedError

    async def schema_tokens(self, system: bool) -> int | None:
        raise NotImplementedError

    async def reading(self, timeout_s: float = 10.0) -> Reading | None:
        self.asked += 1
        return self.readings[min(self.asked, len(self.readings)) - 1]


def tally() -> Tally:
    found = Tally({"a": "single", "b": "debate"}, "a")
    found.query_started("b")
    found.arms["b"].calls_in_flight = 4
    return found


def sampled(
    folder: Path, endpoints: Mapping[str, Endpoint], before: Mapping[str, Reading | None], seconds: float
) -> list[Sample]:
    state = ClientState(Counter({gap_bucket(0.001): 5, gap_bucket(0.02): 1}), cpu_s=1.5, rss_mb=40.0)

    async def run() -> None:
        sampler = Sampler(folder, lambda: 3.0, endpoints, before, tally())
        watching = asyncio.ensure_future(sampler.watch(lambda: {0: state}))
        await asyncio.sleep(seconds)
        assert not watching.done()
        watching.cancel()

    run_virtually(run())
    return read_samples(folder)


def test_counts_are_since_the_start_and_what_is_not_told_is_unknown() -> None:
    assert server_sample(BEFORE, NOW) == ServerSample(
        running=2.0, kv_use=0.5, prompt_tokens=30.0, generation_tokens=4.0
    )


def test_a_line_has_servers_arms_and_client(tmp_path: Path) -> None:
    told, silent = Told([NOW]), Told([None])
    found = sampled(tmp_path, {"t": told, "hosted": silent}, {"t": BEFORE, "hosted": None}, 1.5)
    assert [sample.at for sample in found] == [3.0]
    assert found[0].targets == {"t": server_sample(BEFORE, NOW), "hosted": None}
    assert found[0].arms == {"a": ArmSample(0, 0), "b": ArmSample(1, 4)}
    client = found[0].client
    assert client is not None
    assert client.loop_lag_s == pytest.approx(0.02, rel=0.01)  # the largest since the last line
    assert client.rss_mb == 40.0
    assert client.cpu_share == 1.5  # 1.5 s in the first second: by several threads
    assert (told.asked, silent.asked) == (1, 0)  # who told nothing before the run is left in peace
    assert list(json.loads((tmp_path / "samples.jsonl").read_text())) == ["at", "targets", "arms", "client"]


def test_a_server_that_falls_silent_is_unknown_from_then_on(tmp_path: Path) -> None:
    found = sampled(tmp_path, {"t": Told([NOW, None])}, {"t": BEFORE}, 3.5)
    assert [sample.targets["t"] for sample in found] == [server_sample(BEFORE, NOW), None, None]
    assert found[1].client is not None and found[1].client.loop_lag_s is None  # no beat since the last line
    assert found[1].client.cpu_share == 0.0


def test_a_disk_that_takes_no_more_ends_the_samples_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").mkdir()
    sampler = Sampler(tmp_path, lambda: 0.0, {}, {}, tally())
    run_virtually(asyncio.wait_for(sampler.watch(dict), 5))


def test_the_hosts_processors(tmp_path: Path) -> None:
    path = tmp_path / "stat"
    path.write_text("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 2 3\n")
    host = Host(path)
    assert host.share() is None  # no time has passed
    path.write_text("cpu  160 0 60 810 60 0 10 0 0 0\n")  # 60 + 10 + 10 busy, 10 + 10 idle or waiting for a disk
    assert host.share() == 0.8
    path.write_text("nothing of the kind")
    assert host.share() is None
    assert Host(tmp_path / "none").share() is None


def test_virtual_seconds_that_pass(tmp_path: Path) -> None:
    sampler = VirtualSampler(tmp_path, {"t": lambda: NOW}, tally())
    for since, until in ((0.0, 0.5), (0.5, 2.0), (2.0, 2.25), (2.25, 4.5)):
        sampler.passing(since, until)
    sampler.close()
    found = read_samples(tmp_path)
    assert [sample.at for sample in found] == [1.0, 2.0, 3.0, 4.0]
    assert found[0].targets["t"] == ServerSample(running=2.0, kv_use=0.5, prompt_tokens=130.0, generation_tokens=4.0)
    assert found[0].client is None


def test_a_folder_without_samples_has_none(tmp_path: Path) -> None:
    assert read_samples(tmp_path) == []
    (tmp_path / "samples.jsonl").write_text('{"at":1.0,"targets":{},"arms":{}}\n{"at":2.0,"tar')
    assert [sample.at for sample in read_samples(tmp_path)] == [1.0]
