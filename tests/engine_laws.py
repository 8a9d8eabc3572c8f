"""Step-time laws and workloads for the engine's tests."""

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from fanmark.servers.engine.batch import EngineConfig
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.step_time import BatchShape, StepLaw

# Times that are no round numbers, so that no arrival falls on the very end of a step
ROUGH = StepLaw(
    dense_s=3.1417e-3, token_s=1.37e-5, context_s=2.3e-7, attention_s=1.1e-9, sequence_s=7e-6, mixed_s=3e-4, knee=2.0,
    expert_s=9e-5, experts=64, top_k=4, graph_launch_s=1e-4, eager_launch_s=0.0313, idle_w=80.0, memory_w=300.0, compute_w=200.0,
)  # fmt: skip
# Sliding-window layers: a decode run's growth has a bend
WINDOWED = StepLaw(
    dense_s=2.113e-3, token_s=1.1e-5, context_s=1.3e-7, attention_s=0.0, window_tokens=64, window_context_s=5.1e-7
)
# The processor is slower than the chip
LAUNCH_BOUND = StepLaw(dense_s=1.013e-3, token_s=1e-6, context_s=1e-8, attention_s=0.0, graph_launch_s=4.117e-3)


class Constant:
    """Every step takes the same time and a joule."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s

    def gpu_seconds(self, shape: BatchShape) -> float:
        return self.step_s

    def launch_seconds(self, shape: BatchShape) -> float:
        return 0.0

    def lockstep_seconds(self, shapes: Sequence[BatchShape]) -> float:
        return self.step_s * max(1, *(shape.seqs for shape in shapes))

    def decode_run_seconds(self, shape: BatchShape, steps: int) -> float:
        return self.step_s * steps

    def joules(self, shape: BatchShape, seconds: float) -> float:
        return 1.0

    def decode_run_joules(self, shape: BatchShape, steps: int, seconds: float) -> float:
        return float(steps)


@st.composite
def configs(draw: Any) -> EngineConfig:
    """Small engines, many of them starved."""
    return EngineConfig(
        max_num_seqs=draw(st.sampled_from([1, 2, 4, 12])),
        max_num_batched_tokens=draw(st.sampled_from([7, 24, 64, 512])),
        num_blocks=draw(st.sampled_from([20, 26, 40, 200])),
        block_size=4,
        max_model_len=draw(st.sampled_from([40, 76])),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 9])),
        prefix_caching=draw(st.booleans()) or draw(st.booleans()),
        watermark=draw(st.sampled_from([0.0, 0.0, 0.1])),
    )


@st.composite
def workloads(draw: Any) -> list[tuple[float, Request, float | None]]:
    """(arrival, request, abort or None), in order of arrival. Few different tokens, so that prefixes and outputs are shared."""
    heads = [[1] * 9, [1] * 4 + [2] * 9, []]
    cases: list[tuple[float, Request, float | None]] = []
    at = 0.0
    for number in range(draw(st.integers(1, 14))):
        at += draw(st.sampled_from([0.0, 0.0, 0.0021, 0.0173, 0.2117]))
        prompt = draw(st.sampled_from(heads)) + draw(st.lists(st.integers(1, 2), min_size=1, max_size=24))
        if cases and draw(st.integers(0, 3)) == 0:
            before = draw(st.sampled_from(cases))[1]
            prompt = [*before.prompt, *before.output][: draw(st.integers(1, 38))]
        output = draw(st.lists(st.integers(1, 2), min_size=1, max_size=36))
        request = Request(
            str(number), prompt, output, draw(st.sampled_from(["", "", "s"])), draw(st.integers(0, 2)), at
        )
        abort = at + draw(st.floats(0.0003, 0.3)) if draw(st.integers(0, 5)) == 0 else None
        cases.append((at, request, abort))
    return cases
