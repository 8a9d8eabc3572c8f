"""How long one step of the engine takes, from the make-up of its batch, and what it draws in energy.

The law, with T = prefill + decode tokens, padded to a CUDA graph's size where a graph is used:

    weights = dense_s + expert_s * touched(T)                   read once a step, whatever the batch
    gemm    = (weights^p + (token_s * T)^p)^(1/p)               bound by memory below, by arithmetic above
    step    = fixed_s + gemm + context_s * K + attention_s * A + sequence_s * S + mixed_s [prefill in it]
              + collective_s + collective_token_s * T           several chips only

    touched(T) = E * (1 - (1 - k/E)^(skew * T)): distinct experts a layer reads when T tokens pick k of E each.

Rules of the file:
1. K counts *logical* contexts: two requests that share a prefix in the cache still read it twice.
2. A padded token costs as a real one, its experts included: a batch of 5 costs as one of 8.
3. A step above `graph_limit_tokens` is launched kernel by kernel: the processor needs `eager_launch_s` for it, and the chip cannot
   end before. Below, the launch of a captured graph takes `graph_launch_s`. With asynchronous scheduling the launch of a step
   overlaps the run of the one before; who keeps the time (replica.py) asks for both and lets the later one win.
4. Pure: no clock, no state, no randomness. All times in seconds, all coefficients >= 0.

Sources: roofline of weights and KV reads as in vLLM's own accounting of FLOPs and bytes; expert coverage is the expected number of
occupied cells of a uniform multinomial; graph sizes and their limit are vLLM's defaults (`cudagraph_capture_sizes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pow
from typing import NamedTuple

GRAPH_LIMIT_TOKENS = 512


class BatchShape(NamedTuple):
    """What the time of one step depends on."""

    prefill_tokens: int  # T_p: prompt tokens computed in this step
    decode_seqs: int  # D: sequences that get one new token
    context_tokens: int  # K: sum of the logical contexts of the decode sequences
    attention_pairs: float  # A: sum over prefill chunks of c * (h + c/2), h = tokens already in the KV cache
    seqs: int  # S: sequences in the batch


def touched_experts(tokens: float, experts: int, top_k: int, skew: float = 1.0) -> float:
    """Expected distinct experts of one layer that `tokens` tokens are routed to; skew in (0, 1], 1 = uniform routing."""
    if experts == 0:
        return 0.0
    return experts * (1.0 - pow(1.0 - top_k / experts, tokens * skew))


def padded_tokens(tokens: int, limit: int = GRAPH_LIMIT_TOKENS) -> int:
    """Tokens that a step of `tokens` computes: vLLM's next graph size (1, 2, 4, 8..248 by 8, 256..512 by 16), or itself above."""
    if tokens > limit or tokens <= 2:
        return tokens
    if tokens <= 4:
        return 4
    step = 8 if tokens <= 248 else 16
    return min((tokens + step - 1) // step * step, limit)


@dataclass(frozen=True, slots=True)
class StepLaw:
    """The coefficients; see the head of the file. `window_*`: layers whose attention sees only the last `window_tokens`."""

    dense_s: float
    token_s: float
    context_s: float
    attention_s: float
    sequence_s: float = 0.0
    fixed_s: float = 0.0
    mixed_s: float = 0.0
    knee: float = 2.0
    expert_s: float = 0.0
    experts: int = 0
    top_k: int = 0
    skew: float = 1.0
    expert_ranks: int = 1
    expert_imbalance: float = 1.0
    collective_s: float = 0.0
    collective_token_s: float = 0.0
    window_tokens: int = 0
    window_context_s: float = 0.0
    graph_limit_tokens: int = GRAPH_LIMIT_TOKENS
    graph_launch_s: float = 0.0
    eager_launch_s: float = 0.0
    ingress_s: float = 0.0
    egress_s: float = 0.0
    idle_w: float = 0.0
    memory_w: float = 0.0
    compute_w: float = 0.0

    def weights_seconds(self, tokens: int, fleet_tokens: int | None = None) -> float:
        """Reading the weights for `tokens` padded tokens. Experts spread over ranks serve the tokens of all: `fleet_tokens`."""
        if not self.experts:
            return self.dense_s
        ranks = self.expert_ranks
        routed = tokens * ranks if fleet_tokens is None else fleet_tokens
        touched = touched_experts(routed, self.experts, self.top_k, self.skew)
        if ranks > 1:
            touched = touched / ranks * self.expert_imbalance
        return self.dense_s + self.expert_s * touched

    def _fixed_part(self, shape: BatchShape, fleet_tokens: int | None) -> float:
        """All of a step but what grows with the decode contexts."""
        tokens = padded_tokens(shape.prefill_tokens + shape.decode_seqs, self.graph_limit_tokens)
        weights = self.weights_seconds(tokens, fleet_tokens)
        compute = self.token_s * tokens
        high, low = (weights, compute) if weights > compute else (compute, weights)
        gemm = high * (1.0 + (low / high) ** self.knee) ** (1.0 / self.knee) if high > 0.0 else 0.0
        return (
            self.fixed_s
            + gemm
            + self.attention_s * shape.attention_pairs
            + self.sequence_s * shape.seqs
            + (self.mixed_s if shape.prefill_tokens else 0.0)
            + self.collective_s
            + self.collective_token_s * tokens
        )

    def _context_part(self, context_tokens: int, seqs: int) -> float:
        seen = min(context_tokens, seqs * self.window_tokens)
        return self.context_s * context_tokens + self.window_context_s * seen

    def launch_seconds(self, shape: BatchShape) -> float:
        """Time the processor needs to launch a step."""
        eager = shape.prefill_tokens + shape.decode_seqs > self.graph_limit_tokens
        return self.eager_launch_s if eager else self.graph_launch_s

    def gpu_seconds(self, shape: BatchShape, fleet_tokens: int | None = None) -> float:
        """Time the chip is at work on a step, launch left out."""
        return self._fixed_part(shape, fleet_tokens) + self._context_part(shape.context_tokens, shape.decode_seqs)

    def seconds(self, shape: BatchShape) -> float:
        """Time of a step when steps run back to back: chip or launch, whichever takes longer."""
        return max(self.gpu_seconds(shape), self.launch_seconds(shape))

    def lockstep_seconds(self, shapes: Sequence[BatchShape]) -> float:
        """Time of a step of data-parallel ranks that share their experts: all wait for the slowest. Idle ranks compute a token."""
        fleet = sum(padded_tokens(max(1, s.prefill_tokens + s.decode_seqs), self.graph_limit_tokens) for s in shapes)
        return max(max(self.gpu_seconds(s, fleet), self.launch_seconds(s)) for s in shapes)

    def decode_run_seconds(self, shape: BatchShape, steps: int) -> float:
        """Time of `steps` pure-decode steps from `shape` on, contexts one token a sequence longer after each. Exact, O(1)."""
        if steps <= 0:
            return 0.0
        fixed, launch = self._fixed_part(shape, None), self.launch_seconds(shape)
        seqs, context, left, total = shape.decode_seqs, shape.context_tokens, steps, 0.0
        cap = seqs * self.window_tokens
        if context < cap:
            # The layers with a window grow like the others until the contexts have filled it, and then cost the same every step.
            run = min(left, -(-(cap - context) // seqs))
            slope = self.context_s + self.window_context_s
            total += _ramp(fixed + slope * context, slope * seqs, run, launch)
            context, left = context + run * seqs, left - run
        base = fixed + self.window_context_s * cap + self.context_s * context
        return total + _ramp(base, self.context_s * seqs, left, launch)

    def joules(self, shape: BatchShape, seconds: float) -> float:
        """Energy of a step of `seconds`: idle power all the time, and the powers of memory and arithmetic while each is at work."""
        tokens = padded_tokens(shape.prefill_tokens + shape.decode_seqs, self.graph_limit_tokens)
        memory = self.weights_seconds(tokens) + self._context_part(shape.context_tokens, shape.decode_seqs)
        compute = self.token_s * tokens + self.attention_s * shape.attention_pairs
        return self.idle_w * seconds + self.memory_w * memory + self.compute_w * compute

    def decode_run_joules(self, shape: BatchShape, steps: int, seconds: float) -> float:
        """Energy of a pure-decode run of `steps` steps that took `seconds`."""
        tokens = padded_tokens(shape.decode_seqs, self.graph_limit_tokens)
        fixed = self.weights_seconds(tokens) * self.memory_w + self.token_s * tokens * self.compute_w
        contexts = steps * shape.context_tokens + shape.decode_seqs * (steps * (steps - 1) // 2)
        memory = self.context_s * contexts
        cap = shape.decode_seqs * self.window_tokens
        growing = min(steps, max(0, -(-(cap - shape.context_tokens) // max(1, shape.decode_seqs))))
        seen = growing * shape.context_tokens + shape.decode_seqs * (growing * (growing - 1) // 2)
        memory += self.window_context_s * (seen + (steps - growing) * cap)
        return self.idle_w * seconds + fixed * steps + self.memory_w * memory


def _ramp(start: float, slope: float, steps: int, floor: float) -> float:
    """Sum of max(floor, start + slope * i) for i in 0..steps-1, slope >= 0."""
    below = 0
    if start < floor:
        below = steps if slope <= 0.0 else min(steps, int((floor - start) / slope) + 1)
    above = steps - below
    ramped = above * start + slope * ((steps * (steps - 1) - below * (below - 1)) // 2)
    return below * floor + ramped
