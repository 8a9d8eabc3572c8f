"""A run of two arms, made by hand: round numbers, one failed query, one warm-up query."""

from collections.abc import Sequence
from typing import Any

from fanmark.agents import topologies
from fanmark.loadgen.costs import resources
from fanmark.loadgen.prices import Prices
from fanmark.loadgen.records import Call, Query, gap_bucket
from fanmark.loadgen.reduced import CallKind, Rows, reduced
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.scenario_check import check

PRICES = {"t": Prices(input=1.0, cached_input=0.1, output=2.0)}
EXPECTED = {"calls": 3, "tool_calls": 1, "input_tokens": 400, "output_tokens": 83, "depth": 2, "width": 2}
SINGLE_EXPECTED = {"calls": 1, "tool_calls": 0, "input_tokens": 100, "depth": 1, "width": 1}


def scenario(**more: Any) -> Scenario:
    arms = [
        {"name": "single", "topology": "single", "baseline": True},
        {"name": "debate", "topology": "debate", "agents": 2, "rounds": 1},
    ]
    raw = {"arm": arms, "load": {"rate": 0.5}, "objective": {"query_seconds": 2.0, "attainment": 0.5}}
    return check(raw | more, "f.toml", topologies())


def call(
    number: int,
    instants: tuple[float | None, float | None, float],
    tokens: tuple[int | None, int | None, int | None],
    *,
    after: Sequence[int] = (),
    role: str = "agent-1",
    round: int = 1,
    **more: Any,
) -> Call:
    """`instants`: sent, first token, done. `tokens`: read, cached, written."""
    sent_at, first_at, done_at = instants
    given: dict[str, Any] = {
        "kind": "call",
        "target": "t",
        "gaps": {gap_bucket(0.11): 10},
        "due_at": sent_at or 0.0,
    } | more
    return Call(
        query=0, arm="", call=number, after=list(after), role=role, round=round, sent_at=sent_at,
        first_at=first_at, answer_at=first_at, done_at=done_at, input_tokens=tokens[0], cached_tokens=tokens[1],
        output_tokens=tokens[2], **given,
    )  # fmt: skip


def query(arm: str, number: int, calls: list[Call], due_at: float, done_at: float, **more: Any) -> Query:
    for one in calls:
        one.query, one.arm = number, arm
    given: dict[str, Any] = {"outcome": "completed", "expected": EXPECTED, "mismatches": []} | more
    return Query(
        query=number, arm=arm, warmup=number < 0, due_at=due_at, started_at=due_at, done_at=done_at,
        resources=resources(calls, due_at, done_at, PRICES), seed=f"7/{number}", calls=calls, **given,
    )  # fmt: skip


def single(
    number: int, due_at: float, sent_at: float, first_at: float, done_at: float, cached: int, wrote: int
) -> Query:
    one = call(1, (sent_at, first_at, done_at), (100, cached, wrote), role="agent")
    return query("single", number, [one], due_at, done_at, expected={**SINGLE_EXPECTED, "output_tokens": wrote})


def tool(number: int, sent_at: float, done_at: float) -> Call:
    unknown = (None, None, None)
    return call(
        number, (sent_at, None, done_at), unknown, after=[1], kind="tool_call", tool="now", target=None, gaps={}
    )


def queries() -> list[Query]:
    judge: dict[str, Any] = {"after": [2, 3], "role": "judge", "round": 2}
    unknown = (None, None, None)
    return [
        single(-1, -5.0, -5.0, -4.0, -1.0, 0, 99),
        single(0, 0.0, 0.0, 0.5, 2.0, 0, 16),
        single(1, 1.0, 1.25, 1.5, 2.5, 64, 11),
        single(2, 2.0, 2.0, 3.0, 6.0, 64, 31),
        query("debate", 0, [
            call(1, (0.0, 1.0, 3.0), (100, 0, 21)),
            call(2, (0.0, 1.0, 4.0), (100, 0, 31), role="agent-2"),
            tool(3, 3.0, 3.5),
            call(4, (4.0, 5.0, 8.0), (200, 96, 31), **judge),
        ], 0.0, 8.0),
        query("debate", 1, [
            call(1, (1.0, 2.0, 3.0), (100, 64, 21)),
            call(2, (1.0, 2.0, 5.0), (100, 64, 31), role="agent-2"),
            tool(3, 3.0, 4.0),
            call(4, (5.0, 6.0, 9.0), (200, 96, 31), **judge),
        ], 1.0, 9.0),
        query("debate", 2, [
            call(1, (2.0, 2.5, 3.0), (100, 64, 21)),
            call(2, (2.0, None, 4.0), unknown, role="agent-2", error="http_5xx", message="HTTP 500: no", gaps={}),
        ], 2.0, 4.0, outcome="failed", error="http_5xx: HTTP 500: no"),
    ]  # fmt: skip


def whole(arms: dict[str, Any], validity: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A summary around `arms`, with a client and a server that are well."""
    lag = {"mean": 0.001, "p50": 0.0005, "p90": 0.002, "p99": 0.003, "max": 0.004, "n": 300}
    client = {"verdict": "ok", "reasons": [], "loop_lag_s": lag, "send_delay_s": lag | {"p99": None}}
    server = {"reconciled": True, "alone": True, "reason": "1 counters equal"}
    return {
        "arms": arms,
        "validity": validity,
        "client": client
        | {
            "connections": {"new": 2, "reused": 1_234},
            "coalesced_share": 0.125,
            "cpu_s": 1.25,
            "rss_mb": 80.4,
            "workers": 1,
        },
        "server": server | {"prompt_tokens": {"client": 1200, "server": 1200.0, "off_pct": 0.0}},
        "notes": ["what must be told"],
    } | more


def calls_of(calls: Sequence[Call]) -> Rows[CallKind]:
    """The rows of calls that some query made."""
    return reduced([query("single", 0, list(calls), 0.0, 9.0)]).calls
