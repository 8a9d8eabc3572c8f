"""Which replica takes a request, and that a group of replicas is what its members are one by one."""

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.servers.engine.batch import EngineConfig
from fanmark.servers.engine.group import ReplicaGroup
from fanmark.servers.engine.replica import Replica
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.routing import POLICIES, Policy, Router
from fanmark.servers.engine.step_time import StepLaw

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=256, num_blocks=200)
LAW = StepLaw(dense_s=0.01, token_s=1e-5, context_s=1e-7, attention_s=0.0)


class Noted(Router):
    """A router that remembers what it chose."""

    def __init__(self, policy: Policy, replicas: int) -> None:
        super().__init__(policy, replicas)
        self.chosen: list[int] = []

    def choose(self, loads: Sequence[float], session: str = "", leading: Sequence[int] = ()) -> int:
        self.chosen.append(super().choose(loads, session, leading))
        return self.chosen[-1]


def replicas(count: int) -> list[Replica]:
    return [Replica(CONFIG, LAW, stream=False) for _ in range(count)]


@given(st.integers(1, 9), st.integers(1, 60))
def test_in_turn_all_get_the_same_share(count: int, requests: int) -> None:
    router = Router("round_robin", count)
    chosen = [router.choose([0] * count) for _ in range(requests)]
    assert chosen == [i % count for i in range(requests)]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(1, 20))
def test_the_least_loaded_is_chosen_and_of_equals_the_next_in_turn(loads: list[int], requests: int) -> None:
    router, loads = Router("least_loaded", len(loads)), list(loads)
    for _ in range(requests):
        place = router.choose(loads)
        assert loads[place] == min(loads)
        loads[place] += 1
    fresh = Router("least_loaded", len(loads))
    assert [fresh.choose([0] * len(loads)) for _ in loads] == list(range(len(loads)))


def test_a_session_stays_and_many_sessions_spread() -> None:
    router, again = Router("session_affinity", 4), Router("session_affinity", 4)
    places = [router.choose([0] * 4, f"run-debate-{i}") for i in range(1000)]
    assert places == [again.choose([9, 0, 0, 0], f"run-debate-{i}") for i in range(1000)]
    assert min(Counter(places).values()) > 200
    assert {router.choose([3, 0, 3, 3]) for _ in range(5)} == {1}  # without a session: the least loaded


def test_a_prompt_goes_where_its_prefix_is_unless_that_is_overloaded() -> None:
    router = Router("prefix_affinity", 3)
    assert router.choose([0, 0, 0], leading=[1, 2, 3, 4]) == 0
    assert router.choose([1, 0, 0], leading=[1, 2, 3, 5]) == 0  # three pieces of four are there
    assert router.choose([2, 0, 0], leading=[1, 7, 8, 9]) == 1  # one is not half
    assert router.choose([2, 1, 0], leading=[1, 7, 8]) == 1
    assert router.choose([8, 0, 0], leading=[1, 2, 3, 4, 6]) == 0
    assert router.choose([9, 0, 0], leading=[1, 2, 3, 4, 6]) == 2  # more than 8 above the least loaded
    assert router.choose([0, 0, 0], leading=[1, 2, 3, 4, 6]) == 2  # the last one sent it
    assert router.choose([1, 1, 0]) == 2


def served(group: ReplicaGroup | Replica, arrivals: Sequence[tuple[float, Request]]) -> dict[str, tuple[float, int]]:
    found = {}
    for at, request in arrivals:
        for event in group.advance(at):
            found[event.id] = event.at, event.cached_tokens
        group.add(request, at)
    for event in group.advance(1e9):
        found[event.id] = event.at, event.cached_tokens
    return found


@given(
    st.sampled_from(POLICIES),
    st.integers(1, 4),
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 300), st.integers(1, 40), st.integers(0, 3)), max_size=25),
)
def test_a_group_serves_as_its_members_would_alone(
    policy: Policy, count: int, given_requests: list[tuple[float, int, int, int]]
) -> None:
    """Each request, sent to its replica at its time, ends when it ends in a replica that was sent the same and nothing else."""
    arrivals = [
        (at, Request(str(i), list(range(who, who + tokens)), [7] * output, session=str(who)))
        for i, (at, tokens, output, who) in enumerate(sorted(given_requests))
    ]
    router = Noted(policy, count)
    group = ReplicaGroup(replicas(count), router)
    found = served(group, arrivals)
    assert len(group) == 0 and group.next_at() is None and len(found) == len(arrivals)
    for place, alone in enumerate(replicas(count)):
        mine = [arrival for arrival, chosen in zip(arrivals, router.chosen, strict=True) if chosen == place]
        for name, (at, cached) in served(alone, mine).items():
            assert found[name] == (pytest.approx(at, abs=1e-9), cached)


def test_siblings_meet_the_cache_where_the_router_keeps_them_together() -> None:
    """Of 12 prompts with one beginning, all but the first find it in the cache under affinity; by turns once on each replica."""
    shared = list(range(160))
    cached = {}
    for policy in POLICIES:
        group = ReplicaGroup(replicas(3), Router(policy, 3))
        arrivals = [(float(i), Request(str(i), [*shared, *range(i, i + 40)], [1], session="s")) for i in range(12)]
        cached[policy] = sum(tokens for _, tokens in served(group, arrivals).values())
    assert cached == {
        "round_robin": 9 * 160,
        "least_loaded": 9 * 160,
        "session_affinity": 11 * 160,
        "prefix_affinity": 11 * 160,
    }
