"""A snapshot has a ceiling, whatever a run has recorded and however long it is, and the driver keeps one of each worker."""

import pickle
from dataclasses import fields

import two_arms
from hypothesis import given, settings
from hypothesis import strategies as st

from fanmark.loadgen.costs import COUNTS, EXPECTED, TIMES
from fanmark.loadgen.health import ClientState
from fanmark.loadgen.link import Snapshot, pickled, snapshot
from fanmark.loadgen.metrics import CALL_OUTCOMES, TOOL_OUTCOMES
from fanmark.loadgen.records import Query, gap_bucket
from fanmark.loadgen.sums import COARSE, MOST_BUCKETS, Packer, Sums
from fanmark.loadgen.tally import CALLS, GAPS_S, MOST_NAMES, SECONDS, TOKEN_KINDS, TOKENS, ArmTally, Histogram, Tally

ARMS, TARGETS = {"a": "single", "b": "single"}, ("small", "big")
NAMES = MOST_NAMES + 1  # those, and "other"
REFUSED = 4  # reasons
BUCKETS = range(gap_bucket(0.0), gap_bucket(86_400.0) + 1)
COUNTERS = (
    2 + 2 * len(ARMS) + 1
)  # send delays and first tokens of the run, first tokens and latencies of arms, loop lag


def numbers_of_an_arm() -> int:
    """The most that a snapshot tells of an arm beside its log buckets, by the limits alone."""
    of_queries = 4 + 3 + 3 * len((*COUNTS, *TIMES)) + len(EXPECTED) + len(TOKEN_KINDS)
    by_name = len(TARGETS) * NAMES * (len(CALL_OUTCOMES) + REFUSED) + NAMES * (len(TOOL_OUTCOMES) + REFUSED + 1)
    seconds, calls, tokens, gaps = (len(bounds) + 2 for bounds in (SECONDS, CALLS, TOKENS, GAPS_S))
    by_target = len(TARGETS) * (2 * seconds + gaps)
    return of_queries + by_name + by_target + 2 * NAMES * seconds + 2 * seconds + 3 * calls + len(TOKEN_KINDS) * tokens


def ceiling_bytes() -> int:
    numbers = 8 * len(ARMS) * numbers_of_an_arm()
    buckets = COUNTERS * max(6 * MOST_BUCKETS, 8 * COARSE)  # the loop lag as a table, four bytes a count all others
    exemplars = len(ARMS) * (1 + 3 * len(TARGETS) + NAMES) * (60 + 30 * (len(SECONDS) + 1))
    return numbers + buckets + exemplars + 4_000


def full() -> tuple[Tally, ClientState]:
    """All that can be met was met."""
    tally, state = Tally(ARMS, "a"), ClientState()
    for counter in (tally.send_delay, tally.ttft, state.loop_lag):
        counter.update(dict.fromkeys(BUCKETS, 7))
    for arm in tally.arms.values():
        for counter in (arm.ttft, arm.latency):
            counter.update(dict.fromkeys(BUCKETS, 7))
        for name in (f"made up {n}" for n in range(NAMES)):
            arm.calls.update({(name, target, outcome): 1 for target in TARGETS for outcome in CALL_OUTCOMES})
            arm.tool_calls.update({(name, outcome): 1 for outcome in TOOL_OUTCOMES})
            arm.tool_bytes[name] += 1
            arm.tool_s[name], arm.tool_queued_s[name] = Histogram(SECONDS), Histogram(SECONDS)
            for n in range(len(SECONDS) + 1):
                arm.tool_s[name].exemplars[n] = (1.0, 1 << 40)
    return tally, state


SECONDS_OF = st.one_of(st.floats(0.0, 1.0), st.floats(0.0, 1e9))
WORDS = st.text(max_size=200)
MET = st.lists(
    st.tuples(st.sampled_from(list(ARMS)), WORDS, st.sampled_from(TARGETS), SECONDS_OF, SECONDS_OF, st.booleans()),
    max_size=30,
)


def meet(tally: Tally, number: int, met: tuple[str, str, str, float, float, bool]) -> None:
    arm, name, target, first_s, all_s, is_tool = met
    made = two_arms.tool(1, 0.0, all_s) if is_tool else two_arms.call(1, (0.0, first_s, first_s + all_s), (9, 0, 9))
    made.role, made.target = name, target
    made.tool = name if is_tool else None
    query: Query = two_arms.query(arm, number, [made], 0.0, first_s + all_s)
    tally.query_started(arm)
    tally.call_started(made)
    tally.call_finished(made)
    tally.query_finished(query)


@settings(max_examples=25, deadline=None)
@given(MET, st.booleans())
def test_a_snapshot_has_a_ceiling_whatever_was_recorded(
    met: list[tuple[str, str, str, float, float, bool]], after: bool
) -> None:
    tally, state = full() if after else (Tally(ARMS, "a"), ClientState())
    packer = Packer(tally)
    for number, each in enumerate(met):
        meet(tally, number, each)
    first = snapshot(packer, state).sums
    told = snapshot(packer, state)
    assert told.sums.new == [] and len(told.sums.values) == len(first.values)
    assert len(told.sums.values) <= 8 * (len(ARMS) * numbers_of_an_arm() + 2)
    assert all(
        len(each.which) + len(each.often) <= 4 * max(COARSE, 2 * MOST_BUCKETS) for each in told.sums.buckets.values()
    )
    assert len(told.state.loop_lag) <= COARSE
    assert len(pickled(told)) <= ceiling_bytes()


def test_whatever_is_made_up_few_names_are_told_apart() -> None:
    tally = Tally(ARMS, "a")
    for n in range(3 * MOST_NAMES):
        for is_tool in (False, True):
            meet(tally, n, ("a", f"voice {n}, " + "x" * n, "big", 0.1, 0.2, is_tool))
    arm = tally.arms["a"]
    roles, tools = {role for role, _, _ in arm.calls}, {tool for tool, _ in arm.tool_calls}
    assert len(roles) == len(tools) == len(arm.tool_s) == NAMES and {"other"} < roles == tools
    assert max(map(len, roles)) <= 100
    assert arm.calls["other", "big", "completed"] == arm.tool_calls["other", "completed"] == 2 * MOST_NAMES


def test_the_driver_keeps_one_snapshot_a_worker_however_many_come() -> None:
    tally, state = full()
    packers, sums, kept = [Packer(tally) for _ in range(3)], Sums(), []
    for _ in range(4):
        for worker, packer in enumerate(packers):
            sums.take(worker, pickle.loads(pickled(snapshot(packer, state))).sums)
        kept.append(len(pickle.dumps(sums)))
    assert kept[1] == kept[2] == kept[3]
    summed = Tally(ARMS, "a")
    sums.into(summed)
    assert sum(summed.ttft.values()) == 3 * 7 * len(BUCKETS) and len(summed.ttft) <= COARSE
    assert sum(summed.arms["b"].latency.values()) == 3 * 7 * len(BUCKETS)


def test_nothing_is_told_that_has_no_limit_here() -> None:
    """Who adds a field to an arm's sums says here how many numbers it may become."""
    known = {
        "topology", "started", "finished", "calls_in_flight", "calls", "retries", "tool_calls", "tokens", "sums", "squares", "known",
        "ttft", "latency", "expected", "mismatched", "query_s", "query_calls", "query_tool_calls", "query_depth", "query_tokens",
        "call_s", "ttft_s", "itl_s", "tool_s", "tool_bytes", "tool_queued_s", "tool_session_s",
    }  # fmt: skip
    assert {field.name for field in fields(ArmTally)} == known
    assert set(Snapshot.__dataclass_fields__) == {"sums", "state"}
