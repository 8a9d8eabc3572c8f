"""The engine in time, by hand calculation."""

from typing import Any

import pytest
from engine_laws import Constant

from fanmark.servers.engine.batch import EngineConfig, Rejected
from fanmark.servers.engine.events import Event, Step
from fanmark.servers.engine.group import ReplicaGroup
from fanmark.servers.engine.replica import Replica
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.step_time import StepLaw

CONFIG = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, num_blocks=101, max_model_len=256)


def request(name: str, tokens: int = 10, output: int = 3) -> Request:
    return Request(name, [*name.encode(), *range(tokens - len(name))], [7] * output)


def events(replica: Replica | ReplicaGroup) -> list[Event]:
    found = []
    while (at := replica.next_at()) is not None:
        found += replica.advance(at)
    return found


def times(found: list[Event], name: str) -> list[float]:
    return [round(event.at, 6) for event in found if event.id == name]


def test_tokens_come_out_at_the_end_of_their_step() -> None:
    replica = Replica(CONFIG, Constant(1.0))
    replica.add(request("a"), 5.0)
    assert times(events(replica), "a") == [6.0, 7.0, 8.0]
    assert replica.next_at() is None and len(replica) == 0


@pytest.mark.parametrize(
    ("asynchronous", "first_at"),
    [(False, 2.0 + 1.0), (True, 3.0 + 1.0)],
    ids=["waits for the step that runs", "waits for it and for the one already scheduled"],
)
def test_an_arrival_waits_for_the_steps_on_their_way(asynchronous: bool, first_at: float) -> None:
    replica = Replica(CONFIG, Constant(1.0), asynchronous=asynchronous)
    replica.add(request("a", output=9), 0.0)
    replica.add(request("b"), 1.5)
    assert times(events(replica), "b")[0] == first_at


def test_costs_outside_the_loop_delay_a_request_and_load_nothing() -> None:
    replica = Replica(CONFIG, Constant(1.0), ingress_s=0.25, token_s=0.125, completion_s=0.5)
    replica.add(request("a"), 0.0)
    found = events(replica)
    assert times(found, "a") == [1.375, 2.375, 3.875]
    assert (found[-1].queued_at, found[-1].scheduled_at, found[-1].first_at) == (0.25, 0.25, 1.375)
    assert replica.statistics().busy_s == 3.0


def test_a_slow_launch_overlaps_the_step_before_and_shows_in_everybodys_gaps() -> None:
    law = StepLaw(dense_s=1.0, token_s=0, context_s=0, attention_s=0, graph_limit_tokens=16, eager_launch_s=2.5)
    replica = Replica(CONFIG, law)
    replica.add(request("a", output=8), 0.0)
    replica.add(request("b", tokens=40), 1.5)
    # a's third step is scheduled at 1; b's, with 41 tokens, at 2 and launched until 4.5: the result due at 3 is handled then
    assert times(events(replica), "a")[:6] == [1.0, 2.0, 4.5, 4.5, 5.5, 6.5]


def test_a_slow_down_holds_for_the_steps_scheduled_from_then_on() -> None:
    replica = Replica(CONFIG, Constant(1.0), asynchronous=False)
    replica.add(request("a", output=4), 0.0)
    found = replica.advance(1.5)
    replica.slowdown = 3.0
    assert times(found + events(replica), "a") == [1.0, 2.0, 5.0, 8.0]


def test_many_equal_requests_take_their_turns_by_budget_and_seats() -> None:
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=64, num_blocks=101, max_model_len=256)
    replica = Replica(config, Constant(1.0), asynchronous=False)
    for name in "abcd":
        replica.add(request(name, output=5), 0.0)
    found = events(replica)
    assert [times(found, name)[-1] for name in "abcd"] == [5.0, 5.0, 10.0, 10.0]
    assert times(found, "c")[0] == 6.0


def test_one_slot_with_constant_service_is_a_queue_served_in_turn() -> None:
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=64, num_blocks=101, max_model_len=256)
    replica, free_at, expected = Replica(config, Constant(0.1), asynchronous=False, stream=False), 0.0, []
    for number in range(40):
        at = number * 0.37 % 11.0 / 11.0 + number * 0.43
        free_at = max(free_at, at) + 0.5
        expected.append(free_at)
        replica.add(request(f"{number:02}", output=5), at)
    assert [event.at for event in events(replica)] == pytest.approx(expected, abs=1e-9)


def test_an_aborted_request_says_nothing_more_and_frees_its_blocks_at_the_next_step() -> None:
    replica = Replica(CONFIG, Constant(1.0))
    replica.add(request("a", output=50), 0.0)
    replica.add(request("b", output=4), 0.0)
    first = replica.advance(2.0)
    assert {event.id for event in first} == {"a", "b"}
    assert replica.abort("a", 2.5) and not replica.abort("x", 2.5)
    assert {event.id for event in events(replica)} == {"b"}
    assert (replica.schedulers[0].kv.usage, len(replica)) == (0.0, 0)


@pytest.mark.parametrize("stream", [True, False])
def test_the_engine_goes_on_after_its_only_request_was_aborted(stream: bool) -> None:
    replica = Replica(CONFIG, Constant(1.0), stream=stream)
    replica.add(request("a", output=50), 0.0)
    replica.advance(3.0)
    replica.abort("a", 3.5)
    assert events(replica) == []
    replica.add(request("b"), 20.0)
    assert events(replica)[-1].at == 23.0


def test_a_request_aborted_on_its_way_in_is_never_queued() -> None:
    replica = Replica(CONFIG, Constant(1.0), ingress_s=0.5)
    replica.add(request("a"), 0.0)
    assert replica.abort("a", 0.25) and replica.next_at() is None


def test_limits_refuse_what_comes_too_much() -> None:
    limits: dict[str, Any] = {"max_num_queued_reqs": 2, "max_num_queued_tokens": 20}
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=64, num_blocks=101, max_model_len=256, **limits)
    replica = Replica(config, Constant(1.0), ingress_s=0.1)
    replica.add(request("a", 30), 0.0)
    with pytest.raises(Rejected) as refused:
        replica.add(request("b"), 0.5)
    assert refused.value.reason == "max_num_queued_tokens"
    replica.add(request("c"), 1.2)  # a's first token is out: its prompt counts no longer
    with pytest.raises(Rejected) as refused:
        replica.add(request("d"), 1.3)
    assert refused.value.reason == "max_num_queued_reqs"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Request("x", [], [7]), "at least one token"),
        (Request("x", [1] * 256, [7]), "max_model_len is 256: shorten"),
        (Request("a", [1], [7]), "id a is in use"),
    ],
)
def test_what_could_never_be_served_is_refused_with_the_way_out(wrong: Request, message: str) -> None:
    replica = Replica(CONFIG, Constant(1.0))
    replica.add(request("a"), 0.0)
    with pytest.raises(ValueError, match=message):
        replica.add(wrong, 0.0)


def test_a_request_larger_than_the_cache_is_refused() -> None:
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=64, num_blocks=5, max_model_len=256)
    with pytest.raises(ValueError, match="need 5 KV blocks, there are 4"):
        Replica(config, Constant(1.0)).add(request("a", 60, 6), 0.0)


def test_siblings_that_arrive_together_share_their_prefix() -> None:
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=8192, num_blocks=1001)
    replica = Replica(config, Constant(1.0), stream=False)
    for number in range(4):
        replica.add(Request(str(number), [*range(160), 900 + number], [7]), 0.0)
    assert [event.cached_tokens for event in events(replica)] == [0, 160, 160, 160]


def test_engines_in_lockstep_wait_for_the_slowest_and_share_the_load() -> None:
    steps: list[Step] = []
    replica = Replica(CONFIG, Constant(1.0), engines=2, asynchronous=False, on_step=steps.append)
    for name in "abc":
        replica.add(request(name), 0.0)
    # Two on the first engine, one on the second; a step takes as long as its fullest engine has sequences
    found = events(replica)
    assert [times(found, name) for name in "abc"] == [[2.0, 4.0, 6.0]] * 3
    assert [engine.generation_tokens for engine in replica.statistics().engines] == [6, 3]
    assert [step.shape.seqs for step in steps] == [3, 3, 3]


def test_a_group_sends_a_request_to_the_least_loaded_and_each_keeps_its_own_time() -> None:
    group = ReplicaGroup([Replica(CONFIG, Constant(1.0), stream=False), Replica(CONFIG, Constant(2.0), stream=False)])
    for name in "abc":
        group.add(request(name), 0.0)
    assert len(group) == 3 and group.abort("c", 0.5)
    assert [(event.id, event.at) for event in events(group)] == [("a", 3.0), ("b", 6.0)]
    assert group.statistics().steps == 6 and len(group) == 0


def test_energy_and_busy_time_are_integrated_over_jumps_too() -> None:
    replica = Replica(CONFIG, Constant(0.01), stream=False)
    replica.add(request("a", output=100), 0.0)
    (event,) = events(replica)
    state = replica.statistics()
    assert (state.steps, event.tokens) == (100, 100)
    assert (state.busy_s, state.joules, event.at) == pytest.approx((1.0, 100.0, 1.0))
    assert sum(count for _, count in event.gaps) == 99 and len(event.gaps) < 10
