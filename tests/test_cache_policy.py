"""Who may share a prefix cache with whom: fresh tokens of real runs against hand calculation, and strangers in the same cache."""

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from between import between
from stub_process import Stub, running_stub

from fanmark.agents import topologies
from fanmark.loadgen import session
from fanmark.loadgen.records import Query, read_queries
from fanmark.loadgen.scenario_check import check

pytestmark = pytest.mark.real

SYSTEM, QUESTION, BLOCK = 96, 48, 16  # whole blocks each
COLD = SYSTEM + QUESTION
KNOWN_SYSTEM = QUESTION
KNOWN = BLOCK  # of a prompt that is cached as a whole, the last block is computed again


@pytest.fixture(scope="module")
def warm() -> Iterator[Stub]:
    """A fast stub that lives through all runs of this file; nobody else talks to it."""
    with running_stub("--time-scale", "0.05", "--block-size", str(BLOCK)) as server:
        yield server


def run(out: Path, url: str, cache: str = "arm", api: str = "chat", **load: Any) -> tuple[dict[str, Any], list[Query]]:
    """Two arms that ask the same four questions, each one at a time: what is cached does not depend on the moment."""
    raw = {
        "arm": [{"name": "one", "topology": "single", "baseline": True}, {"name": "two", "topology": "single"}],
        "workload": {"system": SYSTEM, "question": QUESTION, "answer": 4, "cache": cache},
        "load": {"mode": "closed", "concurrency": 1, "queries": 4, "warmup": 0, "arms": "apart"} | load,
        "target": {"url": f"{url}/v1", "api": api},
        "seed": 7,
    }
    scenario = check(raw, "f.toml", topologies())
    options = session.Options(out, 0, f"run-{out.name}", "test", [], None)
    result = asyncio.run(session.run(scenario, topologies(), options))
    return result.summary, list(read_queries(out))


def fresh(queries: list[Query]) -> list[list[float | None]]:
    """Fresh tokens of each arm's queries in order, the arm that began first in front."""
    by_arm: dict[str, list[Query]] = defaultdict(list)
    for query in sorted(queries, key=lambda query: query.due_at):
        by_arm[query.arm].append(query)
    return [[query.resources["fresh_tokens"] for query in mine] for mine in by_arm.values()]


OWN = [COLD] + [KNOWN_SYSTEM] * 3


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        ("arm", [OWN, OWN]),
        ("run", [OWN, [KNOWN] * 4]),  # the second arm finds all that the first has asked
        ("query", [[COLD] * 4] * 2),
        ("call", [[COLD] * 4] * 2),
    ],
)
def test_a_policy_says_who_shares(warm: Stub, tmp_path: Path, cache: str, expected: list[list[float]]) -> None:
    summary, queries = run(tmp_path / cache, warm.url, cache)
    assert fresh(queries) == expected
    validity = summary["validity"]
    assert (validity["uncontaminated"], validity["alone"], validity["reconciled"]) == (True, True, True)


def test_a_warm_cache_is_whatever_it_is(warm: Stub, tmp_path: Path) -> None:
    (_, first), (summary, second) = (run(tmp_path / f"warm-{i}", warm.url, "warm") for i in range(2))
    assert fresh(first) == [OWN, [KNOWN] * 4]
    assert fresh(second) == [[KNOWN] * 4] * 2
    assert summary["validity"]["uncontaminated"] is None
    assert summary["validity"]["reasons"]["uncontaminated"].startswith("warm: ")


def test_the_same_seed_on_a_warm_server_and_interleaved_arms_find_the_same_fresh_tokens(
    warm: Stub, tmp_path: Path
) -> None:
    for name, arms in (("first", "apart"), ("second", "apart"), ("third", "interleaved"), ("fourth", "interleaved")):
        summary, queries = run(tmp_path / name, warm.url, arms=arms)
        assert fresh(queries) == [OWN, OWN], name
        validity = summary["validity"]
        assert (validity["uncontaminated"], validity["alone"], validity["counted"]) == (True, True, True)


def test_kv_written_is_what_was_computed_and_a_small_cache_turns_over(tmp_path: Path) -> None:
    with running_stub("--time-scale", "0.05", "--block-size", str(BLOCK), "--num-blocks", "31") as small:
        server = run(tmp_path / "run", small.url, "call")[0]["server"]
        cache = server["kv_capacity_tokens"]
    assert (cache, server["kv_written_tokens"]) == (30 * BLOCK, 8 * (COLD + 4))
    assert server["kv_turnover"] == 8 * (COLD + 4) / (30 * BLOCK)


def test_where_cache_salt_is_refused_a_salted_line_keeps_caches_apart(warm: Stub, tmp_path: Path) -> None:
    with between(warm.url, refused=("cache_salt",)) as url:
        runs = [run(tmp_path / f"line-{i}", url, queries=3) for i in range(2)]
    for summary, queries in runs:
        assert any("refuses 'cache_salt': a salted line" in note for note in summary["notes"])
        assert all(query.resources["input_tokens"] == COLD for query in queries)  # the line's tokens count
        assert fresh(queries) == [[COLD, KNOWN_SYSTEM, KNOWN_SYSTEM]] * 2
        assert summary["validity"]["uncontaminated"] is True


@pytest.mark.parametrize(
    ("salted", "strange_tokens"),
    [
        (False, None),  # another client sends the same prompts, and cannot know the run's salt
        (True, COLD - BLOCK),  # it knows it: the first call finds a prompt cached that nobody of this run sent
    ],
)
def test_a_stranger_with_the_same_prompts_is_told(
    warm: Stub, tmp_path: Path, salted: bool, strange_tokens: int | None
) -> None:
    first = itertools.count()

    def same_prompt(body: dict[str, Any]) -> list[dict[str, Any]]:
        if next(first):
            return []
        other = body | {"max_tokens": 3, "stream": False}
        del other["stream_options"]
        return [other if salted else {k: v for k, v in other.items() if k != "cache_salt"}]

    with between(warm.url, before=same_prompt) as url:
        summary, queries = run(tmp_path / f"stranger-{salted}", url)
    validity, server = summary["validity"], summary["server"]
    assert (validity["counted"], validity["reconciled"], validity["alone"]) == (True, False, False)
    assert validity["reasons"]["alone"].startswith(f"1 request, {COLD} prompt tokens")
    assert validity["reasons"]["alone"].endswith("more than this client sent: somebody else uses the server")
    assert server["generation_tokens"]["server"] == server["generation_tokens"]["client"] + 3 == 8 * 4 + 3
    assert server["request_success"]["server"] == server["request_success"]["client"] + 1 == 9
    assert validity["uncontaminated"] is (strange_tokens is None)
    if strange_tokens is None:
        assert fresh(queries) == [OWN, OWN]
    else:
        told = f"{strange_tokens} cached tokens that this run's own traffic cannot explain"
        assert validity["reasons"]["uncontaminated"] == told


def test_a_server_that_tells_no_cached_tokens_tells_their_mean(tmp_path: Path) -> None:
    with running_stub("--time-scale", "0.05", "--block-size", str(BLOCK), "--no-prompt-tokens-details") as silent:
        summary, queries = run(tmp_path / "run", silent.url)
    assert all(query.resources["cached_tokens"] is query.resources["fresh_tokens"] is None for query in queries)
    assert summary["server"]["cached_tokens_per_query"] == 2 * 3 * SYSTEM / 8
    assert summary["server"]["fresh_tokens_per_query"] == sum(OWN) / 4
    assert summary["validity"]["uncontaminated"] is None
    (note,) = [note for note in summary["notes"] if "--enable-prompt-tokens-details" in note]
    assert note.endswith(
        "by the server's own counters 72 cached and 72 fresh a query, the mean of the queries of all 2 arms"
    )


def test_preempted_requests_are_counted_once(tmp_path: Path) -> None:
    raw = {
        "arm": [{"name": "one", "topology": "single", "baseline": True}],
        "workload": {"system": SYSTEM, "question": QUESTION, "answer": 200},
        "load": {"mode": "closed", "concurrency": 4, "queries": 4, "warmup": 0},
    }
    with running_stub("--time-scale", "0.05", "--block-size", str(BLOCK), "--num-blocks", "41") as small:
        scenario = check(raw | {"target": {"url": f"{small.url}/v1"}}, "f.toml", topologies())
        options = session.Options(tmp_path / "tight", 0, "tight", "test", [], None)
        server = asyncio.run(session.run(scenario, topologies(), options)).summary["server"]
    assert server["preemptions"]["server"] > 0
    assert server["preemptions"]["client"] is None  # no reply tells of them
    assert (server["reconciled"], server["alone"]) == (True, True)
    assert (server["prompt_tokens"]["server"], server["generation_tokens"]["server"]) == (4 * COLD, 4 * 200)
