"""Planning: the search, and what it must find where the answer is known."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.agents import topologies
from fanmark.loadgen import plan, plan_table, scenario_check
from fanmark.loadgen.capacity import QUERY
from fanmark.loadgen.cli import app
from fanmark.loadgen.fleet_search import next_look, shared_out
from fanmark.loadgen.lanes.virtual_bare import BareEndpoint
from fanmark.loadgen.planned import Demand, Knobs, fleet, offered
from fanmark.loadgen.prompts import Text
from fanmark.loadgen.records import Query
from fanmark.loadgen.scenario import Scenario, Target
from fanmark.loadgen.search import Point, Search, bracket, pooled
from fanmark.loadgen.shared_out import carried_out
from fanmark.loadgen.simulate import services_of
from fanmark.loadgen.statistics import occupancy
from fanmark.loadgen.trial import Trial, try_out

SEARCH = Search(low=1.0, high=400.0, target=0.95, seeks="least", integer=True, within=0.0, looks=1)
MIX = """
name = "mix"
[workload]
answer = { dist = "lognormal", mean = 60, cv = 0.4, min = 16 }
system = 100
[tools]
latency_s = { dist = "lognormal", mean = 0.1, cv = 0.5 }
[[arm]]
name = "mix"
baseline = true
mix = [ { name = "single", topology = "single" }, { name = "debate", topology = "debate", agents = 3, rounds = 1 } ]
[objective]
query_seconds = 3.0
attainment = 0.9
"""
TWO_ARMS = """
name = "two"
[workload]
answer = 20
system = 100
[[arm]]
name = "short"
topology = "single"
baseline = true
[[arm]]
name = "long"
topology = "single"
workload = { answer = 25 }
[objective]
query_seconds = 0.6
attainment = 0.8
"""


@given(st.integers(1, 300), st.integers(1, 500))
def test_the_least_number_is_found_from_any_guess(least: int, guess: int) -> None:
    points: list[Point] = []
    while (ask := next_look(SEARCH, guess, points)) is not None:
        assert 1 <= ask.x <= 400 and ask.x == int(ask.x)
        points.append(Point(ask.x, ask.queries, ask.queries if ask.x >= least else ask.queries // 2))
    found = bracket(SEARCH, pooled(points))
    assert (found.low, found.high) == (None if least == 1 else least - 1, least)
    assert len({point.x for point in points}) == len(points) <= 40


@given(st.integers(1, 500))
def test_where_nothing_passes_the_search_ends_at_the_largest(guess: int) -> None:
    points: list[Point] = []
    while (ask := next_look(SEARCH, guess, points)) is not None:
        points.append(Point(ask.x, ask.queries, 0))
    assert bracket(SEARCH, pooled(points)).high is None and max(point.x for point in points) == 400


@given(st.dictionaries(st.sampled_from("abc"), st.floats(0.1, 50), min_size=1), st.integers(0, 80))
def test_replicas_go_where_most_is_in_flight(weights: dict[str, float], total: int) -> None:
    found = shared_out(total, weights)
    assert sum(found.values()) == max(total, len(weights)) and min(found.values()) >= 1
    busiest = max(weights[name] / n for name, n in found.items())
    for name, n in found.items():
        if n > 1:  # nobody else would be as busy as this one without its last replica
            assert weights[name] / (n - 1) >= busiest - 1e-9


def scenario_of(tmp_path: Path, text: str = MIX) -> Scenario:
    (tmp_path / "s.toml").write_text(text)
    raw, source = scenario_check.read(str(tmp_path / "s.toml"))
    return scenario_check.check(raw, source, topologies())


def window(scenario: Scenario, replicas: int, rate: float, seconds: float = 200.0) -> Trial:
    services = services_of(scenario)
    part = fleet(replicas, services, {"default": 1.0}, Knobs(), 100)
    load = offered(scenario, scenario.arms[0], Demand(rate, None), 1.0, Knobs(), round(seconds * rate), 3, None)
    return try_out(load, topologies(), part.services)


def stamps(queries: list[Query]) -> list[Any]:
    kept = ("sent_at", "first_at", "done_at", "input_tokens", "cached_tokens", "output_tokens")
    return sorted((q.query, c.call, *(getattr(c, name) for name in kept)) for q in queries for c in q.calls)


def test_without_words_every_stamp_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = scenario_of(tmp_path)
    bare = window(scenario, 2, 2.0, 20.0)
    monkeypatch.setattr("fanmark.loadgen.trial.has_no_words", lambda scenario: False)
    worded = window(scenario, 2, 2.0, 20.0)
    assert stamps(bare.queries) == stamps(worded.queries) and len(bare.queries) > 40
    assert not any(query.mismatches for query in bare.queries)


def test_without_words_messages_begin_alike_too(tmp_path: Path) -> None:
    service = services_of(scenario_of(tmp_path))["default"]
    prompts = BareEndpoint("default", Target(url=""), service).prompts

    async def ids(seed: str, tokens: int, *begins: tuple[str, int]) -> list[int]:
        content = (await prompts.part(Text("user", "", tokens, f"1/recorded/{seed}", begins=begins))).content
        assert isinstance(content, list) and len(content) == tokens
        return content

    async def main() -> None:
        one, other = [await ids(seed, 150, ("1/recorded/x", 64), ("1/recorded/y", 40)) for seed in "ab"]
        shorter = await ids("c", 70, ("1/recorded/x", 64), ("1/recorded/y", 40))
        assert one[:104] == other[:104] and one[104] != other[104] and shorter == one[:70]
        assert (await ids("x", 64))[0] != one[0]  # a message of that name is not its beginning

    asyncio.run(main())


def test_littles_law_and_the_accounts(tmp_path: Path) -> None:
    """L = lambda W of the queries; requests in steps and waiting are the calls in flight at the servers."""
    trial = window(scenario_of(tmp_path), 2, 4.0)
    (told,), counted = trial.windows, trial.counted
    there = occupancy([(q.due_at, q.done_at) for q in trial.queries], told.start_at, told.end_at)["mean"]
    mean_s = math.fsum(q.done_at - q.due_at for q in counted) / len(counted)
    assert there == pytest.approx(len(counted) / told.seconds * mean_s, rel=0.03)
    use = trial.accounts["default"]
    calls = [(c.sent_at or 0.0, c.done_at or 0.0) for q in trial.queries for c in q.calls]
    in_flight = occupancy(calls, told.start_at, told.end_at)["mean"]
    assert (use.seqs_s + sum(use.waiting_s.values())) / told.seconds == pytest.approx(in_flight, rel=0.03)
    assert 0.0 < use.busy_s <= 2 * told.seconds and 0.0 < use.prefill_s < use.busy_s


def test_one_sequence_at_a_time_is_a_queue_with_one_server(tmp_path: Path) -> None:
    """Equal calls, Poisson arrivals, one sequence at a time: M/D/1, whose mean wait is rho s / (2 (1 - rho))."""
    text = 'name = "q"\n[workload]\nanswer = 100\nsystem = 0\ncache = "call"\n[[arm]]\nname = "a"\ntopology = "single"\nbaseline = true\n'
    scenario = scenario_of(tmp_path, text + "[objective]\nquery_seconds = 10.0\n")
    (service,) = services_of(scenario).values()
    one = {"default": type(service)(service.profile, 1, "round_robin", {"max_num_seqs": 1})}
    load = offered(scenario, scenario.arms[0], Demand(1.2, None), 1.0, Knobs(), 2500, 5, None)
    trial = try_out(load, topologies(), one)
    latencies_s = [q.done_at - q.due_at for q in trial.counted]
    busy_s = trial.accounts["default"].busy_s
    service_s, rho, free_at, waits = busy_s / len(latencies_s), busy_s / trial.seconds, 0.0, list[float]()
    for query in sorted(trial.queries, key=lambda query: query.due_at):  # Lindley's recursion over the same arrivals
        start_at = max(free_at, query.due_at)
        free_at = start_at + service_s
        waits += [] if query.warmup else [start_at - query.due_at]
    mean_wait_s = math.fsum(latencies_s) / len(latencies_s) - min(latencies_s)
    assert mean_wait_s == pytest.approx(math.fsum(waits) / len(waits), rel=0.01)
    assert 0.5 < rho < 0.7 and mean_wait_s == pytest.approx(rho * service_s / (2 * (1 - rho)), rel=0.1)


def planner(scenario: Scenario, **options: Any) -> plan.Planner:
    demand = options.pop("demand", Demand(5.0, None))
    given = {"burstiness": (1.0,), "seeds": 1, "within": 0.5, "queries": 40} | options
    chosen = plan.Options(demand, Knobs(), **given)
    return plan.Planner(scenario, scenario.arms[0], topologies(), services_of(scenario), chosen, lambda line: None)


def finished(one: plan.Planner, spare: int, gpu_hour: float | None) -> Any:
    (found,) = carried_out([plan.finished(one, spare, gpu_hour)], None)
    return found


@pytest.mark.slow
def test_the_same_seed_is_the_same_plan_and_more_load_is_more_replicas(tmp_path: Path) -> None:
    scenario = scenario_of(tmp_path)
    first, again = (finished(planner(scenario), 1, 2.0) for _ in range(2))
    assert json.dumps(first) == json.dumps(again)
    told = first["plan"]
    n = told["replicas"]
    assert n > 1 and told["with_spare"] == n + 1 and told["cost"]["per_hour"] == 2.0 * (n + 1)
    assert told["cost"]["per_1000_queries"] == pytest.approx(2.0 * (n + 1) / (5.0 * 3.6))
    assert told["missed"]["replicas"] == told["burstiness"]["1"]["fails_at"] < n
    assert told["what_if"] and all(each["replicas"] == told["missed"]["replicas"] for each in told["what_if"])
    more = finished(planner(scenario, demand=Demand(5.0, None, peak=2.0, growth=0.5)), 0, None)["plan"]
    assert 2 * n <= more["replicas"] <= 4 * n and more["cost"]["per_hour"] is None


def test_users_are_planned_for_too(tmp_path: Path) -> None:
    text = MIX + '[load]\nmode = "closed"\nusers = 20\nthink_s = 4.0\n'
    found = finished(planner(scenario_of(tmp_path, text), demand=Demand(None, 20)), 0, None)
    assert found["plan"]["replicas"] >= 1
    assert found["plan"]["at"]["queries_per_s"] < 20 / 4.0


def test_a_deadline_below_what_a_query_takes_is_the_critical_path(tmp_path: Path) -> None:
    scenario = scenario_of(tmp_path, MIX.replace("query_seconds = 3.0", "query_seconds = 0.4"))
    found = finished(planner(scenario, most_replicas=16), 1, None)
    assert found["on"][QUERY]["knee"] is None and found["plan"]["replicas"] is None
    assert found["plan"]["binds"]["what"] == "critical path"


ALONE = {
    "attainment": 1.0, "latency_s": 1.0, "critical_tools_s": 0.0, "to_first_token_s": 0.1, "decode_s": 1.0, "tools_s": 0.0,
    "targets": {"default": {"step_s": 0.01, "batch": 1.0}},
}  # fmt: skip


@pytest.mark.parametrize(
    "at, waiting, expected",
    [
        ({"decode_s": 3.0}, {}, "decode"),
        ({"decode_s": 3.0, "prefill_share": 0.8}, {}, "prefill"),
        ({"to_first_token_s": 2.1}, {"kv": 8.0}, "KV"),
        ({"to_first_token_s": 2.1}, {"sequences": 8.0}, "sequences"),
        ({"to_first_token_s": 2.1}, {"prefill": 8.0}, "prefill"),
        ({"decode_s": 1.05}, {}, "critical path"),
    ],
)
def test_what_takes_most_beyond_the_time_alone_binds(
    at: dict[str, float], waiting: dict[str, float], expected: str
) -> None:
    """4 queries/s: 8 requests that wait are 2 s a query."""
    use = {
        "prefill_share": at.get("prefill_share", 0.1), "batch": 9.0, "step_s": 0.03, "kv_use_max": 1.0, "preemptions": 0,
        "waiting": {"kv": 0.0, "sequences": 0.0, "prefill": 0.0} | waiting,
    }  # fmt: skip
    figures = ALONE | {"queries_per_s": 4.0, "targets": {"default": use}} | at
    told = {"alone": ALONE, "missed": figures, "at": None}
    what, said = plan_table.binding(told, {"attainment": 0.9})
    assert what == expected and said.startswith(expected)


@pytest.mark.slow
def test_the_command_leaves_json_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.toml").write_text(MIX)
    flags = ["--rate", "2", "--seeds", "1", "--within", "0.3", "--burstiness", "1", "--quiet", "--gpu-hour", "3"]
    code = app(["plan", str(tmp_path / "s.toml"), *flags, "--out", str(tmp_path / "p")], standalone_mode=False)
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "p" / "plan.json").read_text())
    assert code == 0 and found["schema"] == "fanmark.sweep/1" and found["axis"]["seeks"] == "least"
    n = found["arms"]["mix"]["plan"]["replicas"]
    assert f"mix: {n} replica" in shown and "binds    " in shown and "what if" in shown
    page = (tmp_path / "p" / "report.html").read_text()
    assert f"mix: {n} replica" in page and "what binds" in page and "Share in time" in page


@pytest.mark.slow
def test_two_processes_make_the_plan_that_one_makes(tmp_path: Path) -> None:
    """Both arms' figures, bit for bit, whoever simulated what and in whatever order."""
    (tmp_path / "s.toml").write_text(TWO_ARMS)
    made = []
    for workers in ("1", "2"):
        flags = ["--rate", "40", "--seeds", "1", "--within", "0.5", "--burstiness", "1", "--cell", "1", "--quiet"]
        where = ["--workers", workers, "--out", str(tmp_path / workers)]
        app(["plan", str(tmp_path / "s.toml"), *flags, *where], standalone_mode=False)
        made.append({path.name: path.read_bytes() for path in (tmp_path / workers).iterdir()})
    assert made[0] == made[1] and set(made[0]) == {"plan.json", "report.html", "scenario.toml"}
    told = json.loads(made[0]["plan.json"])["arms"]
    assert set(told) == {"short", "long"} and all(len(arm["plan"]["what_if"]) == 4 for arm in told.values())


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "give --rate QPS, or --users N"),
        (["--rate", "1", "--users", "2"], "give --rate QPS, or --users N"),
        (["--rate", "1", "--think", "2"], "--think 2: is for --users"),
        (["--rate", "1", "--arm", "x"], "there is no such arm, but mix"),
        (["--rate", "1", "--router", "x"], "--router x: must be round_robin"),
        (["--rate", "1", "--set", "objective.attainment=1.0"], "attainment = 1"),
        (["--rate", "1", "--workers", "0"], "--workers 0: must be a number"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path: Path, flags: list[str], said: str) -> None:
    from fanmark.loadgen.errors import FanmarkError

    (tmp_path / "s.toml").write_text(MIX)
    with pytest.raises(FanmarkError, match=said.replace("(", "\\(")):
        app(["plan", str(tmp_path / "s.toml"), *flags, "--out", str(tmp_path / "p")], standalone_mode=False)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_topology_that_raises_is_one_line(tmp_path: Path, workers: str) -> None:
    from fanmark.loadgen.errors import ScenarioError

    (tmp_path / "own.py").write_text("async def run(rt, p):\n    raise ValueError('no such\\nthing')\n")
    arm = '[[arm]]\nname = "own"\ntopology = "own.py:run"\nbaseline = true\n[objective]\nquery_seconds = 1\n'
    (tmp_path / "s.toml").write_text(arm)
    flags = ["--rate", "1", "--workers", workers, "--out", str(tmp_path / "p")]
    with pytest.raises(ScenarioError, match=r"arm 'own': cannot be planned: ValueError: no such thing$"):
        app(["plan", str(tmp_path / "s.toml"), *flags], standalone_mode=False)


@pytest.mark.slow
def test_a_role_may_have_a_model_and_a_chip_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The judge's 20 tokens a query are asked of a dense model; the agents' calls go to the other. Each has replicas of its own."""
    (tmp_path / "s.toml").write_text(
        '[targets.many]\nprofile = "qwen3-30b-a3b@h100"\n[targets.one]\nprofile = "qwen3-32b@h100"\n'
        '[workload]\nsystem = 50\nanswer = 40\njudge_answer = 20\n[[arm]]\nname = "debate"\ntopology = "debate"\nbaseline = true\n'
        'targets = { judge = "one", default = "many" }\n[objective]\nquery_seconds = 6.0\nattainment = 0.9\n'
    )
    flags = ["--rate", "4", "--seeds", "1", "--within", "0.3", "--burstiness", "1", "--quiet", "--json"]
    code = app(["plan", str(tmp_path / "s.toml"), *flags, "--out", str(tmp_path / "p")], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert code == 0
    assert found["plan"]["profiles"] == {"many": "qwen3-30b-a3b@h100", "one": "qwen3-32b@h100"}
    plan = found["arms"]["debate"]["plan"]
    assert set(plan["at"]["by_target"]) == {"many", "one"} and min(plan["at"]["by_target"].values()) >= 1
    assert sum(plan["at"]["by_target"].values()) == plan["at"]["replicas"] == plan["replicas"]
    batch = {name: use["batch"] for name, use in plan["at"]["targets"].items()}
    assert batch["many"] > batch["one"] >= 1
