"""Whose counters are whose: servers by name, and targets that share them."""

import asyncio

import pytest
from test_samples import Told
from two_arms import queries

from fanmark.loadgen.counters import Reading
from fanmark.loadgen.reduced import reduced
from fanmark.loadgen.server_side import name_servers, reconciled, sharing

# of the hand-made run's calls that were heard: 4 of single, 3 + 3 + 1 of debate; one of debate ended with a 500
READ, WROTE, HEARD = 1_300, 344, 11


class At(Told):
    """A target whose servers tell of themselves at this address."""

    def __init__(self, name: str, url: str, readings: list[Reading | None], server: str = "vllm 0.32") -> None:
        super().__init__(readings)
        self.name, self.server, self.url = name, server, url

    @property
    def metrics_urls(self) -> tuple[str, ...]:
        return (self.url,)


@pytest.mark.parametrize(
    ("told", "version", "name"),
    [
        ("vllm", "vllm 0.32", "vllm 0.32"),
        ("vllm", "fanmark-stub-0.1", "fanmark-stub-0.1"),
        ("trtllm", "vllm 1.3.0", "tensorrt-llm 1.3.0"),  # its /version tells a number and no name
        ("sglang", "unknown", "sglang"),
        (None, "unknown", "unknown"),
    ],
)
def test_a_server_is_called_what_its_metrics_say(told: str | None, version: str, name: str) -> None:
    one = At("a", "u", [], version)
    name_servers({"a": one}, {"a": None if told is None else Reading(told, {})})
    assert one.server == name


def test_targets_on_one_server_are_counted_together() -> None:
    before = Reading("vllm", {"prompt_tokens": 0.0, "request_success": 0.0})
    after = Reading("vllm", {"prompt_tokens": READ, "generation_tokens": WROTE, "request_success": HEARD + 1})
    for one in (mine := queries()):
        for call in one.calls:
            call.target = call.target and ("small" if one.arm == "single" else "big")
    both = {"small": At("small", "u", [after]), "big": At("big", "u", [after])}
    assert sharing(both) == {"small": ["small", "big"], "big": ["small", "big"]}
    found = asyncio.run(reconciled(both, {"small": before, "big": before}, reduced(mine)))
    assert found["small"] == found["big"]
    assert found["small"]["prompt_tokens"] == {"client": READ, "server": READ, "off_pct": 0.0}
    assert found["small"]["reason"] == "the server counted 1 request more: 1 call ended unheard"
    apart = {"small": At("small", "u", [after]), "big": At("big", "v", [after])}
    assert sharing(apart) == {"small": ["small"], "big": ["big"]}
