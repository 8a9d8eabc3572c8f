"""`fanmark sweep` in virtual time: capacities against a queue that is known, what goes on, what is found, what is refused."""

import heapq
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from processes import children, gone

from fanmark.agents import topologies
from fanmark.loadgen import cli, scenario_check
from fanmark.loadgen.errors import FanmarkError
from fanmark.loadgen.ranges import Axis
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.shared_out import Task
from fanmark.loadgen.simulate import Options, simulate
from fanmark.loadgen.sweep import Sweep

SCENARIO = """
name = "two"
seed = 3
[workload]
system = 0
question = 40
answer = 120
[[arm]]
name = "single"
topology = "single"
baseline = true
[[arm]]
name = "two-steps"
topology = "reflection"
rounds = 1
workload = { critique = 60 }
[load]
max_in_flight = 1
duration = 20
[objective]
query_seconds = 4
attainment = 0.9
"""


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "fanmark.loadgen.cli", *map(str, args)]


def fanmark(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=120, env=dict(os.environ))


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return found


def written(folder: Path) -> dict[str, float]:
    return {
        str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted((folder / "points").rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "two.toml"
    path.write_text(SCENARIO)
    return path


@pytest.fixture(scope="module")
def swept(file: Path) -> Path:
    out = file.parent / "swept"
    done = fanmark("sweep", file, "--virtual", "--rate", "0.1:3", "--within", "0.3", "--out", out)
    assert done.returncode == 0, done.stderr
    (file.parent / "printed.txt").write_text(done.stdout)
    return out


def in_time(qps: float, service_s: float, within_s: float, servers: int = 1) -> float:
    """The share of Poisson arrivals that a queue with so many servers and a constant service time answers in time."""
    rng, at, good = random.Random(5), 0.0, 0
    free_at = [0.0] * servers
    for _ in range(60_000):
        at += rng.expovariate(qps)
        done_at = max(at, heapq.heappop(free_at)) + service_s
        heapq.heappush(free_at, done_at)
        good += done_at - at <= within_s
    return good / 60_000


@pytest.mark.parametrize("arm", ["single", "two-steps"])
@pytest.mark.slow
def test_the_capacity_is_that_of_the_queue(swept: Path, arm: str) -> None:
    """A guard of one query at a time makes the system an M/D/1, whose capacity is found by bisection."""
    found = read(swept)
    on = found["arms"][arm]["on"]["query"]
    first = json.loads((swept / on["points"][0]["runs"][0] / "summary.json").read_text())
    service_s = first["arms"][arm]["per_query"]["latency_s"]["p50"]
    low, high = 0.1, 1 / service_s
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if in_time(middle, service_s, 4.0) > 0.9 else (low, middle)
    assert on["bracket"]["low"] * 0.97 < low < on["bracket"]["high"] * 1.03
    assert on["capacity"]["low"] * 0.97 < low * 0.9 < on["capacity"]["high"] * 1.03


def test_the_headline_is_the_baselines_capacity_over_the_arms(swept: Path) -> None:
    found = read(swept)
    single, two = (found["arms"][name] for name in ("single", "two-steps"))
    ratio = two["amplification"]["capacity"]
    own, base = two["on"]["query"]["capacity"], single["on"]["query"]["capacity"]
    assert ratio["ratio"] == base["qps"] / own["qps"] and single["amplification"] == {}
    assert (ratio["low"], ratio["high"]) == (base["low"] / own["high"], base["high"] / own["low"])
    for arm in (single, two):
        points = arm["on"]["query"]["points"]
        best = max(p["goodput_qps"] for p in points if p["verdict"] == "pass")
        assert arm["on"]["query"]["capacity"]["qps"] == best
        costs = arm["on"]["query"]["capacity_s"]
        assert (costs["value"], costs["kind"]) == (1 / best, "simulated") and costs["low"] <= costs["value"] <= costs[
            "high"
        ]
        assert [p["x"] for p in points] == sorted(p["x"] for p in points)
        for p in points:
            assert p["goodput_qps"] == pytest.approx(
                p["x"] * p["good"] / p["queries"]
            )  # an open loop offers what was set
            assert len(p["runs"]) <= 4
    text = (swept.parent / "printed.txt").read_text().splitlines()
    said = f"{ratio['ratio']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    assert text[0] == (
        f"one two-steps query costs {said} the capacity of a 'single' query, on the query's deadline of 4 s at 90 %"
    )
    assert max(map(len, text[1:-3])) <= 100


def test_a_point_is_a_run_of_one_arm_with_the_server_to_itself(swept: Path) -> None:
    runs = [swept / run for run in read(swept)["arms"]["two-steps"]["on"]["query"]["points"][-1]["runs"]]
    done = fanmark("verify", *runs)
    assert done.returncode == 0 and done.stdout.count("all equal") == len(runs)
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert list(summary["arms"]) == ["two-steps"] and summary["arms"]["two-steps"]["window"]["start_at"] > 0
    assert (runs[0] / "report.html").exists()


def test_what_is_there_is_not_run_again(file: Path, swept: Path, tmp_path: Path) -> None:
    """A sweep that lost a run, and has one that was cut short, runs these two alone, and ends as it did."""
    out = tmp_path / "again"
    shutil.copytree(swept, out)
    before = read(out)
    first, last = (before["arms"]["single"]["on"]["query"]["points"][i]["runs"][0] for i in (2, 5))
    shutil.rmtree(out / last)
    (out / first / "summary.json").unlink()
    kept = {name: at for name, at in written(out).items() if not name.startswith((first + "/", last))}
    done = fanmark("sweep", file, "--virtual", "--rate", "0.1:3", "--within", "0.3", "--out", out, "--json")
    assert json.loads(done.stdout) == read(out)
    assert done.stderr.startswith(f"goes on  {out}\n")
    after = written(out)
    assert {name: after[name] for name in kept} == kept
    assert (out / f"{first}.cut-1" / "queries.jsonl").exists()
    assert {k: v for k, v in read(out).items() if k != "command"} == {k: v for k, v in before.items() if k != "command"}


@pytest.mark.parametrize(
    "flags, what",
    [
        (["--set", "workload.answer=121"], "workload.answer was 120, and is 121"),
        (["--set", 'name="other"'], 'name was "two", and is "other"'),
        ([], "clock"),
    ],
)
def test_another_scenarios_folder_is_refused(file: Path, swept: Path, flags: list[str], what: str) -> None:
    virtual = ["--virtual"] if flags else []
    before = written(swept)
    with pytest.raises(FanmarkError) as refused:
        cli.app(["sweep", str(file), *virtual, "--rate", "0.1:3", *flags, "--out", str(swept)], standalone_mode=False)
    assert str(refused.value).startswith(f"--out {swept}: holds a sweep of another scenario: {what}")
    assert written(swept) == before


def test_a_key_is_swept_at_all_its_values(file: Path, tmp_path: Path) -> None:
    flags = ["--set", "workload.answer=60:240:3", "--queries", 12, "--rate", 0.2]
    done = fanmark("sweep", file, "--virtual", *flags, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["axis"]["key"], found["axis"]["values"], found["axis"]["seeks"]) == (
        "workload.answer",
        [60, 120, 240],
        None,
    )
    along = found["arms"]["two-steps"]["along"]
    assert [each["per_query"]["output_tokens"] for each in along] == [2 * answer + 60 for answer in (60, 120, 240)]
    ratios = [each["amplification"]["output_tokens"]["ratio"] for each in along]
    assert ratios == pytest.approx([3.0, 2.5, 2.25])
    assert [p["queries"] for p in found["arms"]["single"]["on"]["query"]["points"]] == [12, 12, 12]
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()


def test_a_crossing_is_found_where_the_closed_form_has_it(file: Path, tmp_path: Path) -> None:
    """(2 answers + 60) / answer is 2.2 at 300, and 2.6 at 100."""
    flags = ["--find", "two-steps.amplification.output_tokens in 2.2..2.6", "--over", "workload.answer=50:500"]
    out = tmp_path / "out"
    done = fanmark("sweep", file, "--virtual", *flags, "--queries", 10, "--rate", 0.2, "--within", 0.02, "--out", out)
    assert done.returncode == 0, done.stderr
    find = read(out)["find"]
    assert [(each["bound"], each["rising"]) for each in find["crossings"]] == [(2.6, False), (2.2, False)]
    for each, truth in zip(find["crossings"], (100, 300), strict=True):
        a, b = each["between"]
        assert a <= truth <= b <= max(a * 1.02, a + 1)
        assert each["interval"][0] <= truth <= each["interval"][1]
    assert find["inside"] == [[pytest.approx(100, rel=0.01), pytest.approx(300, rel=0.01)]]
    said = "two-steps.amplification.output_tokens.ratio is in 2.2..2.6 where workload.answer is 10"
    assert done.stdout.startswith(said)


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_sweep_that_is_shared_out_leaves_the_same_bytes(file: Path, swept: Path, tmp_path: Path) -> None:
    """Along a load, where it searches, and where crossings are sought; what was done ahead for nothing is not seen."""
    load = ["--rate", "0.1:3", "--within", "0.3"]
    find = ["--find", "two-steps.amplification.output_tokens in 2.2..2.6", "--over", "workload.answer=60:500"]
    few = ["--queries", "4", "--rate", "0.2", "--within", "0.3"]
    for out, flags in (("load", load), ("find", [*find, *few]), ("find-here", [*find, *few])):
        workers = [] if out == "find-here" else ["--workers", "3"]
        done = fanmark("sweep", file, "--virtual", *flags, *workers, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "load") == files(swept)
    assert files(tmp_path / "find") == files(tmp_path / "find-here")


@pytest.mark.parametrize(
    "more, said",
    [
        ("[budget]\ncalls = 50\n", r"\[budget\]: follows from the runs before"),
        ('[[threshold]]\nmetric = "single.per_query.calls.mean"\nbelow = 9\nabort = true\n', r"\[\[threshold\]\] abort: "),
    ],
)  # fmt: skip
def test_what_follows_from_the_runs_before_is_not_shared_out(tmp_path: Path, more: str, said: str) -> None:
    (tmp_path / "s.toml").write_text(SCENARIO + more)
    flags = ["--virtual", "--set", "workload.answer=60,120", "--workers", "2", "--out", str(tmp_path / "out")]
    with pytest.raises(FanmarkError, match=said):
        cli.app(["sweep", str(tmp_path / "s.toml"), *flags], standalone_mode=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_arms_are_matched_by_a_fraction_of_their_own_capacity(swept: Path, tmp_path: Path) -> None:
    matched = tmp_path / "matched.toml"
    text = f'duration = 60\nmatch = "capacity"\ncapacity = "{swept}"\nfraction = 0.5\n'
    matched.write_text(SCENARIO.replace("duration = 20\n", text))
    done = fanmark("simulate", matched, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    found = read(swept)
    half = {name: 0.5 * arm["on"]["query"]["capacity"]["qps"] for name, arm in found["arms"].items()}
    assert {name: arm["load"]["offered_qps"] for name, arm in summary["arms"].items()} == pytest.approx(half)
    assert any(note.startswith("each arm is at 50% of its own capacity: single ") for note in summary["notes"])
    assert fanmark("verify", tmp_path / "out").returncode == 0  # the folder holds the capacities themselves
    lost = fanmark("simulate", matched, "--set", "load.capacity=nowhere", "--out", tmp_path / "lost")
    assert lost.returncode == 2 and '[load] capacity = "nowhere": no sweep can be read there' in lost.stderr
    free = fanmark("simulate", matched, "--rate", 0.1, "--queries", 3, "--out", tmp_path / "free", "--json")
    assert json.loads(free.stdout)["arms"]["single"]["load"]["offered_qps"] == 0.1


def test_a_run_that_lost_a_worker_is_no_point_and_is_run_again(tmp_path: Path) -> None:
    """Less was asked of the servers than the point says."""
    scenario = scenario_check.check(tomllib.loads(SCENARIO), "two.toml", topologies())
    died = [True, False]

    def measure(given: tuple[Scenario, Path]) -> Any:
        one, folder = given
        summary = simulate(one, topologies(), Options(folder, "0", [])).summary
        summary["client"]["degraded"] = died.pop(0) if died else False
        (folder / "summary.json").write_bytes(msgspec.json.encode(summary))
        return summary, {}

    axis = Axis("load.rate", 0.2, 0.2, False, (0.2,))

    def swept() -> tuple[Any, dict[str, Any]]:
        one = Sweep(
            scenario, axis, tmp_path, lambda *given: Task(measure, given), lambda x: scenario, {"clock": "virtual"},
            lambda line: None, most=1,
        )  # fmt: skip
        one.run()
        return one.ended, one.write(partial=False)["arms"]

    ended, arms = swept()
    assert ended["why"] == "errors" and ended["reason"].startswith("points/single-0.2-1: a worker died")
    assert arms["single"]["on"]["query"]["points"] == []
    ended, arms = swept()
    assert ended is None and len(arms["single"]["on"]["query"]["points"]) == 1
    assert (tmp_path / "points" / "single-0.2-1.cut-1").is_dir()


@pytest.mark.slow
def test_users_are_swept_in_a_closed_loop(file: Path, tmp_path: Path) -> None:
    """Behind a guard of one, users wait for each other: n of them take n services each, and the deadline of 4 s holds 6."""
    out = tmp_path / "out"
    done = fanmark("sweep", file, "--virtual", "--concurrency", "1:16", "--within", "0.001", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    on = json.loads(done.stdout)["arms"]["single"]["on"]["query"]
    first = json.loads((out / on["points"][0]["runs"][0] / "summary.json").read_text())
    most = 4 // first["arms"]["single"]["per_query"]["latency_s"]["p50"]
    assert (on["bracket"]["low"], on["bracket"]["high"]) == (most, most + 1)
    assert on["capacity"]["qps"] == pytest.approx(
        1 / first["arms"]["single"]["per_query"]["latency_s"]["p50"], rel=0.05
    )


def test_what_piles_up_is_looked_at_for_longer_before_it_fails(tmp_path: Path) -> None:
    """Every window is said to be over capacity but those that are four times as long: what all queries passed in then passes."""
    scenario = scenario_check.check(tomllib.loads(SCENARIO), "two.toml", topologies())
    seconds = {}

    def measure(given: tuple[Scenario, Path]) -> Any:
        one, folder = given
        summary = simulate(one, topologies(), Options(folder, "0", [])).summary
        seconds[folder.name] = one.load.duration
        for arm in summary["arms"].values():
            arm["window"]["over_capacity"] = not folder.name.endswith("-longer")
        return summary, {}

    axis = Axis("load.rate", 0.2, 0.9, False, (0.2, 0.9))
    one = Sweep(
        scenario, axis, tmp_path, lambda *given: Task(measure, given), lambda x: scenario, {"clock": "virtual"},
        lambda line: None, most=1,
    )  # fmt: skip
    one.run()
    points = one.write(partial=False)["arms"]["two-steps"]["on"]["query"]["points"]
    assert [(p["verdict"], p["over_capacity"]) for p in points] == [("pass", False), ("fail", True)]
    assert [p["runs"] for p in points] == [["points/two-steps-0.2-1-longer"], ["points/two-steps-0.9-1"]]
    assert seconds["two-steps-0.2-1-longer"] == pytest.approx(4 * seconds["two-steps-0.2-1"], rel=0.3)


@pytest.mark.real
def test_a_sweep_in_real_time(tmp_path: Path) -> None:
    fast = tmp_path / "fast.toml"
    fast.write_text(
        SCENARIO.replace("answer = 120", "answer = 5")
        .replace("max_in_flight = 1\n", "")
        .replace("critique = 60", "critique = 5")
    )
    out = tmp_path / "out"
    done = fanmark("sweep", fast, "--concurrency", "6,8", "--duration", 3, "--most-looks", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    found = read(out)
    assert found["clock"] == "real" and found["partial"] is False
    for arm in found["arms"].values():
        assert [(p["x"], p["verdict"]) for p in arm["on"]["query"]["points"]] == [(6, "pass"), (8, "pass")]
        assert arm["on"]["query"]["bracket"] == {"low": 8, "high": None, "undecided": [], "against": []}
    assert found["arms"]["two-steps"]["amplification"]["capacity"]["ratio"] > 1
    assert "(?: nothing failed)" in done.stdout


REFUSED = {
    "nothing": ([], "nothing is swept: give --rate LO:HI"),
    "a range that falls": (["--rate", "20:1"], "--rate 20:1: goes from 20 to 1: the first must be below the second"),
    "a rate of 0": (["--rate", "0:5"], "--rate 0:5: begins at 0: must begin above 0"),
    "no number": (["--rate", "fast"], "--rate fast: must be a number, or a range LO:HI"),
    "half a range": (["--rate", "1:"], "--rate 1:: is no range: give LO:HI, LO:HI:N for N values, or a list A,B,C"),
    "half a query": (["--concurrency", "1.5:4"], "--concurrency 1.5:4: must be of whole numbers"),
    "one value": (["--rate", "1:2:1"], "--rate 1:2:1: '1' values: must be a number from 2 to 1000"),
    "a value twice": (
        ["--set", "workload.answer=5,5"],
        "--set workload.answer=5,5: a value is empty or stands there twice",
    ),
    "two ranges": (
        ["--rate", "1:2", "--set", "workload.answer=1:5"],
        "--rate 1:2 and --set workload.answer=1:5: one range",
    ),
    "an unknown key": (["--set", "workload.anser=1:5"], "unknown key 'anser': did you mean 'answer'?"),
    "an unknown arm": (
        ["--set", "arm.tow.rounds=1:5"],
        "--set arm.tow.rounds=1: there is no arm 'tow', but single, two-steps",
    ),
    "an impossible end": (["--set", "workload.answer=0:5"], "[workload] answer = 0: a call writes at least 1 token"),
    "find alone": (
        ["--find", "single.per_query.calls in 1..2"],
        "--find FIGURE in A..B and --over KEY=LO:HI go together",
    ),
    "over one value": (["--find", "x", "--over", "seed=3"], "--over seed=3: is no range: give LO:HI"),
    "no figure": (["--find", "x", "--over", "seed=3:5"], "--find 'x': must be FIGURE in A..B, such as"),
    "an unknown figure": (
        ["--find", "single.per_query.cals in 1..2", "--over", "seed=3:5"],
        "there is no 'cals' in per_query: did you mean 'calls'?",
    ),
    "a figure of nobody": (["--find", "other.calls in 1..2", "--over", "seed=3:5"], "there is no such figure"),
    "bounds that fall": (
        ["--find", "single.per_query.calls in 2..1", "--over", "seed=3:5"],
        "nothing is between 2 and 1",
    ),
    "certainty": (
        ["--rate", "1:2", "--set", "objective.attainment=1"],
        "attainment = 1: no number of queries can show it",
    ),
    "a public host": (
        ["--rate", "1:2", "--target", "https://api.example.com/v1", "--api-key-env", "SOME_KEY"],
        "and a sweep sends until it has found what it looks for: give a [budget] or --yes",
    ),
    "a profile of a run": (["--rate", "1:2", "--profile", "x"], "--profile x: is for --virtual"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_swept_is_said_in_a_line(file: Path, tmp_path: Path, name: str) -> None:
    flags, said = REFUSED[name]
    virtual = [] if {"--profile", "--target"} & set(flags) else ["--virtual"]
    with pytest.raises(FanmarkError) as refused:
        cli.app(["sweep", str(file), *virtual, *flags, "--out", str(tmp_path / "out")], standalone_mode=False)
    assert refused.value.exit_code == 2 and said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_load_needs_an_objective(file: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.toml"
    bare.write_text(re.sub(r"\[objective\][^[]*", "", SCENARIO))
    with pytest.raises(FanmarkError, match=r"give \[objective\] query_seconds"):
        cli.app(
            ["sweep", str(bare), "--virtual", "--rate", "1:2", "--out", str(tmp_path / "out")], standalone_mode=False
        )


def points(out: Path) -> int:
    return len(read(out)["arms"]["single"]["on"]["query"]["points"])


def test_a_budget_is_of_the_whole_sweep(file: Path, tmp_path: Path) -> None:
    """It ends with exit 4 within it; with more of it the same command goes on."""
    out, flags = tmp_path / "out", ["--virtual", "--rate", "0.1:3", "--within", "0.5", "--set", "budget.calls=150"]
    done = fanmark("sweep", file, *flags, "--out", out)
    assert done.returncode == 4 and "budget: " in done.stderr and f"--out {out} goes on" in done.stderr
    calls = sum(len((p / "calls.jsonl").read_text().splitlines()) for p in (out / "points").iterdir())
    assert 100 < calls <= 150
    assert read(out)["ended"]["why"] == "budget" and points(out) == 2
    more = fanmark("sweep", file, *flags[:-1], "budget.calls=300", "--out", out)
    assert more.returncode == 4 and points(out) > 2


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupt_keeps_what_is_done(file: Path, tmp_path: Path, workers: str) -> None:
    """As a terminal sends it: to the processes that share the work, too. They end, and say nothing."""
    out, flags = tmp_path / "out", ["--virtual", "--rate", "0.1:3", "--within", "0.02", "--workers", workers]
    with subprocess.Popen(
        command("sweep", file, *flags, "--out", out),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stderr is not None and process.stderr.readline().startswith("point    ")
        others = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and gone(others), stderr
    said = [line for line in stderr.splitlines() if not line.startswith("point    ")]
    assert len(said) == 1 and "interrupted: " in said[0] and "passes at" in stdout
    found = read(out)
    points = [point for arm in found["arms"].values() for point in arm["on"]["query"]["points"]]
    assert found["partial"] and points[0]["verdict"] == "pass"
    assert {run for point in points for run in point["runs"]} <= {
        f"points/{p.name}" for p in (out / "points").iterdir()
    }
