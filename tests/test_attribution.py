"""Whose the chip's seconds are: shares and slack sum to the busy time, whatever is served."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from engine_laws import LAUNCH_BOUND, ROUGH, WINDOWED, configs, workloads
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine_laws import Workload, timed

from fanmark.servers.engine.attribution import Account, Attribution, Share, Weights, weights_of
from fanmark.servers.engine.batch import EngineConfig
from fanmark.servers.engine.replica import Replica
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.step_time import BatchShape, StepLaw

CONFIG = EngineConfig(max_num_seqs=64, max_num_batched_tokens=2048, num_blocks=4000)


def served(
    config: EngineConfig, law: StepLaw, workload: Workload, batch: int, **options: Any
) -> tuple[dict[str, Share], Replica, Account]:
    engines = options.get("engines", 1)
    weights = weights_of(law, config.max_num_batched_tokens, batch, engines)
    replica = Replica(config, law, attribution=Attribution(weights, engines), **options)
    if all(at == 0.0 for at, _, _ in workload):  # together
        for at, request, _ in workload:
            with suppress(ValueError):
                replica.add(request, at)
        events = replica.advance(1e6)
    else:
        events = timed(replica, workload, [])
    shares = {event.id: event.share for event in events if event.share is not None}
    account = replica.statistics().account
    assert account is not None
    return shares, replica, account


@settings(deadline=None, max_examples=60)
@given(
    configs(),
    workloads(),
    st.sampled_from([ROUGH, WINDOWED, LAUNCH_BOUND]),
    st.sampled_from([1, 2, 12]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 1, 3]),
    st.booleans(),
)
def test_shares_and_slack_sum_to_busy_time_and_joules(
    config: EngineConfig,
    workload: Workload,
    law: StepLaw,
    batch: int,
    asynchronous: bool,
    stream: bool,
    engines: int,
    aborts: bool,
) -> None:
    workload = [(at, request, abort if aborts else None) for at, request, abort in workload]
    options = {"asynchronous": asynchronous, "stream": stream, "engines": engines}
    shares, replica, account = served(config, law, workload, batch, **options)
    found = replica.statistics()
    assert account.busy_s == pytest.approx(found.busy_s, rel=1e-9)
    assert min(account.slack_s, account.slack_joules) >= -1e-9 * max(found.busy_s, found.joules)
    of_requests = sum(share.seconds for share in shares.values())
    joules = sum(share.joules for share in shares.values())
    if any(abort is not None for _, _, abort in workload):
        assert of_requests <= account.attributed_s * (1 + 1e-9)
        return
    assert of_requests == pytest.approx(account.attributed_s, rel=1e-9)
    assert joules + account.slack_joules == pytest.approx(found.joules, rel=1e-6, abs=1e-9)
    for kind in ("prefill_s", "output_s", "context_s", "waste_s"):
        assert sum(getattr(s, kind) for s in shares.values()) == pytest.approx(
            getattr(account, kind), rel=1e-6, abs=1e-12
        )
    preempted = sum(engine.num_preemptions for engine in found.engines)
    assert account.waste_s == 0.0 or preempted > 0


def prompt(start: int, tokens: int) -> list[int]:
    return list(range(start, start + tokens))


def test_one_tenant_gets_all_and_equal_ones_the_same() -> None:
    alone = [(0.0, Request("a", prompt(0, 100), [1] * 50), None)]
    shares, replica, account = served(CONFIG, ROUGH, alone, 1)
    assert shares["a"].seconds == pytest.approx(account.attributed_s)
    assert shares["a"].seconds + account.slack_s == pytest.approx(replica.statistics().busy_s)
    twins = [(0.0, Request(name, prompt(i * 1000, 100), [1] * 50), None) for i, name in enumerate("ab")]
    shares, replica, account = served(CONFIG, ROUGH, twins, 2)
    assert shares["a"] == pytest.approx(shares["b"])
    assert shares["a"].seconds == pytest.approx(account.attributed_s / 2)


def test_a_batch_as_full_as_the_weights_say_leaves_no_slack_in_its_decode_steps() -> None:
    full = [(0.0, Request(str(i), prompt(i * 1000, 16), [1] * 200), None) for i in range(8)]
    synchronous = {"asynchronous": False}
    _, _, account = served(CONFIG, ROUGH, full, 8, **synchronous)
    prefill_s = ROUGH.seconds(BatchShape(128, 0, 0, 8 * 16 * 8.0, 8))
    assert 0.0 < account.slack_s < prefill_s  # of the one step that is not decode
    _, replica, half = served(CONFIG, ROUGH, full[:1], 8, **synchronous)
    assert half.slack_s > 0.7 * replica.statistics().busy_s


def test_cached_tokens_are_free_of_prefill_and_the_context_they_make_is_not() -> None:
    first = Request("first", prompt(0, 1600), [1] * 2)
    again = Request("again", [*prompt(0, 1600), 7], [1] * 20)
    shares, _, _ = served(CONFIG, ROUGH, [(0.0, first, None), (9.0, again, None)], 1)
    weights = weights_of(ROUGH, CONFIG.max_num_batched_tokens, 1)
    assert shares["again"].prefill_s == pytest.approx(weights.request(1601, 1600, 20).prefill_s)
    assert shares["again"].prefill_s < 0.01 * shares["first"].prefill_s
    assert shares["again"].context_s == pytest.approx(weights.request(1601, 1600, 20).context_s)


def test_what_a_preemption_threw_away_is_waste() -> None:
    config = replace(CONFIG, num_blocks=18, prefix_caching=False)  # 17 x 16 tokens: two of 150 do not both fit
    pair = [(0.0, Request(name, prompt(i * 1000, 80), [1] * 70), None) for i, name in enumerate("ab")]
    shares, _, account = served(config, ROUGH, pair, 2)
    assert shares["a"].waste_s == 0.0
    assert shares["b"].waste_s == account.waste_s > 0.0
    # Its prompt, and the output it had by then, at the price of its prompt
    assert 1.0 < shares["b"].waste_s / shares["b"].prefill_s < 150 / 80 * 1.5


@given(st.integers(1, 300), st.integers(0, 200), st.integers(1, 200))
def test_the_weights_of_a_request_are_the_sum_over_its_steps(fresh: int, cached: int, output: int) -> None:
    weights = Weights(4, 3e-5, 1e-9, 2e-3, 3e-7, window_s=5e-7, window_tokens=64)
    share = weights.request(fresh + cached, cached, output)
    contexts = range(fresh + cached + 1, fresh + cached + output)
    assert share.output_s == pytest.approx(2e-3 * (output - 1))
    assert share.context_s == pytest.approx(sum(3e-7 * k + 5e-7 * min(k, 64) for k in contexts))
    assert share.prefill_s == pytest.approx(3e-5 * fresh + 1e-9 * fresh * (cached + fresh / 2))
