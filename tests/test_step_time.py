"""The step-time law: expert coverage, graph sizes, monotony, and closed forms against stepping."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanmark.servers.engine.step_time import BatchShape, StepLaw, padded_tokens, touched_experts

LAW = StepLaw(
    dense_s=3.5e-3,
    token_s=1.5e-5,
    context_s=2.9e-8,
    attention_s=1.3e-9,
    sequence_s=1.2e-5,
    fixed_s=1e-4,
    mixed_s=2e-4,
    knee=2.0,
    expert_s=1.5e-4,
    experts=128,
    top_k=8,
    graph_launch_s=3e-3,
    eager_launch_s=0.09,
    idle_w=100.0,
    memory_w=300.0,
    compute_w=400.0,
)
WINDOWED = replace(LAW, window_tokens=128, window_context_s=4e-8)


@pytest.mark.parametrize(
    ("experts", "top_k", "tokens", "expected"),
    [
        (128, 8, 1, 8),
        (128, 8, 8, 51.6),
        (128, 8, 16, 82.4),
        (128, 8, 32, 111.8),
        (128, 8, 64, 125.9),
        (512, 10, 1, 10),
        (512, 10, 16, 138.6),
        (512, 10, 64, 367),
        (512, 10, 128, 471),
        (128, 4, 16, 51),
        (128, 4, 64, 111),
        (32, 4, 8, 21),
        (32, 4, 32, 31.6),
    ],
)
def test_expert_coverage_of_uniform_routing(experts: int, top_k: int, tokens: int, expected: float) -> None:
    assert touched_experts(tokens, experts, top_k) == pytest.approx(expected, rel=0.006)


@pytest.mark.parametrize(
    ("tokens", "padded"),
    [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 4),
        (4, 4),
        (5, 8),
        (9, 16),
        (248, 248),
        (249, 256),
        (257, 272),
        (500, 512),
        (512, 512),
        (513, 513),
    ],
)
def test_batches_are_padded_to_graph_sizes(tokens: int, padded: int) -> None:
    assert padded_tokens(tokens) == padded


def test_a_batch_of_five_costs_as_one_of_eight_but_for_its_sequences() -> None:
    five, eight = (LAW.gpu_seconds(BatchShape(0, n, 1000, 0.0, n)) for n in (5, 8))
    assert eight - five == pytest.approx(3 * LAW.sequence_s, abs=1e-12)


def test_hand_calculation_of_a_decode_step_of_a_dense_model() -> None:
    law = StepLaw(dense_s=0.02, token_s=1e-4, context_s=1e-7, attention_s=1e-9, sequence_s=1e-5, knee=2.0)
    expected = (0.02**2 + (1e-4 * 64) ** 2) ** 0.5 + 1e-7 * 64_000 + 1e-5 * 64
    assert law.seconds(BatchShape(0, 64, 64_000, 0.0, 64)) == pytest.approx(expected, rel=1e-12)


def test_hand_calculation_of_a_mixed_step_above_the_graph_limit() -> None:
    law = StepLaw(
        dense_s=0.02, token_s=1e-4, context_s=1e-7, attention_s=1e-9, mixed_s=1e-3, knee=2.0, eager_launch_s=0.05
    )
    shape = BatchShape(2000, 10, 5000, 2000 * (1000 + 1000), 11)
    gpu = (0.02**2 + (1e-4 * 2010) ** 2) ** 0.5 + 1e-7 * 5000 + 1e-9 * 4e6 + 1e-3
    assert law.seconds(shape) == pytest.approx(gpu, rel=1e-12)
    assert law.seconds(BatchShape(520, 0, 0, 0.0, 1)) == pytest.approx(0.0560 + 1e-3, rel=2e-2)
    assert replace(law, eager_launch_s=0.3).seconds(shape) == 0.3


@given(
    seqs=st.integers(1, 600),
    context=st.integers(1, 4000),
    steps=st.integers(0, 400),
    law=st.sampled_from([LAW, WINDOWED, replace(LAW, graph_launch_s=0.03), replace(WINDOWED, graph_launch_s=0.028)]),
)
def test_a_run_of_decode_steps_is_the_sum_of_its_steps(seqs: int, context: int, steps: int, law: StepLaw) -> None:
    shape = BatchShape(0, seqs, seqs * context, 0.0, seqs)
    single = [shape._replace(context_tokens=seqs * (context + i)) for i in range(steps)]
    seconds = sum(law.seconds(s) for s in single)
    assert law.decode_run_seconds(shape, steps) == pytest.approx(seconds, rel=1e-12, abs=1e-12)
    joules = sum(law.joules(s, law.seconds(s)) for s in single)
    assert law.decode_run_joules(shape, steps, seconds) == pytest.approx(joules, rel=1e-9, abs=1e-9)


@given(
    prefill=st.integers(0, 8000),
    seqs=st.integers(1, 256),
    context=st.integers(1, 4000),
    more=st.integers(1, 4000),
    law=st.sampled_from([LAW, WINDOWED]),
)
def test_more_work_never_takes_less_time(prefill: int, seqs: int, context: int, more: int, law: StepLaw) -> None:
    shape = BatchShape(prefill, seqs, seqs * context, 0.0, seqs)
    base = law.gpu_seconds(shape)
    assert law.gpu_seconds(shape._replace(context_tokens=seqs * context + more)) >= base
    assert law.gpu_seconds(shape._replace(prefill_tokens=prefill + more)) >= base
    assert law.gpu_seconds(shape._replace(attention_pairs=float(more))) >= base


def test_experts_spread_over_ranks_are_read_for_the_tokens_of_all() -> None:
    law = replace(LAW, expert_ranks=4, graph_launch_s=0.0)
    shapes = [BatchShape(0, 8, 8000, 0.0, 8)] * 4
    touched = touched_experts(32, 128, 8) / 4
    weights = law.dense_s + law.expert_s * touched
    expected = (weights**2 + (law.token_s * 8) ** 2) ** 0.5 + law.context_s * 8000 + law.sequence_s * 8 + law.fixed_s
    assert law.lockstep_seconds(shapes) == pytest.approx(expected, rel=1e-12)
    busy = BatchShape(0, 64, 64_000, 0.0, 64)
    idle = BatchShape(0, 0, 0, 0.0, 0)
    assert law.lockstep_seconds([busy, idle, idle, idle]) == pytest.approx(law.gpu_seconds(busy, 67), rel=1e-12)
