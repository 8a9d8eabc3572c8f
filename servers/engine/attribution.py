"""Whose the time of a step is: the chip's seconds split among the requests that a step served, and what nobody can be charged with.

Each step's time is split by weights: what its work takes on a replica as full as `batch` sequences fill it,

    prefill_s     a fresh prompt token beside a full decode batch: (step of a whole token budget - decode step) / prompt tokens
    attention_s   a pair of tokens of a prompt's attention, as the law has it
    output_s      a token of a full decode batch: its step, contexts left out, / batch
    context_s     a token of context read for an output token; `window_s` for layers that see only the last `window_tokens`

    share of a request in a step of s seconds = its weights w * f,  f = min(1, s / W),  W = the weights of all
    slack of the step                         = s - f * W

Rules of the file:
1. Shares and slack sum to the busy time, step by step. Slack is what an under-filled batch, or a processor slow to launch, leaves of a
   step; it is told apart and is nobody's. A fuller batch than `batch` costs everybody less than its weights.
2. Tokens found in the prefix cache are free: they are in no step. The context that output tokens read is not: K counts logical contexts.
3. What is computed again after a preemption is waste: charged to the request, and told apart.
4. A request's first output token comes out of its prefill and is paid there.
5. Joules go as the seconds: a request's share of a step's energy is its share of the step's time.
6. A request is charged when it ends. In a run of decode steps taken at once f is the run's mean. What a request that was aborted has used
   is in the account's sums and in no share.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from fanmark.servers.engine.batch import Batch, Part
from fanmark.servers.engine.step_time import BatchShape, StepLaw

SECONDS = ("prefill_s", "output_s", "context_s", "waste_s", "slack_s")  # of an account: they sum to the busy time
FULL_BATCH = 128  # sequences; a replica that is meant to hold fewer says so
_LONG = 1 << 14


class Share(NamedTuple):
    """What one request was charged with: the chip's seconds by what they went to, and joules. `waste_s`: computing again what a
    preemption had thrown away."""

    prefill_s: float = 0.0
    output_s: float = 0.0
    context_s: float = 0.0
    waste_s: float = 0.0
    joules: float = 0.0

    @property
    def seconds(self) -> float:
        return self.prefill_s + self.output_s + self.context_s + self.waste_s


def work_of(shares: Sequence[Share]) -> dict[str, float | None]:
    """What a reply's usage tells of its requests' shares, as our own servers add it (`fanmark`). No joules: no power is known."""
    return {
        "gpu_s": math.fsum(share.seconds for share in shares),
        "gpu_waste_s": math.fsum(share.waste_s for share in shares),
        "joules": math.fsum(share.joules for share in shares) or None,
    }


@dataclass(frozen=True, slots=True)
class Account:
    """A replica's busy time by what it went to: shares of requests, and slack. Sums since the start."""

    prefill_s: float = 0.0
    output_s: float = 0.0
    context_s: float = 0.0
    waste_s: float = 0.0
    slack_s: float = 0.0
    slack_joules: float = 0.0

    def __add__(self, other: "Account") -> "Account":
        return Account(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Account)))

    def __sub__(self, other: "Account") -> "Account":
        return Account(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Account)))

    @property
    def attributed_s(self) -> float:
        return self.prefill_s + self.output_s + self.context_s + self.waste_s

    @property
    def busy_s(self) -> float:
        return math.fsum(getattr(self, name) for name in SECONDS)


@dataclass(frozen=True, slots=True)
class Accounting:
    """How a replica's time is accounted for: so many sequences fill it. Without `slack` every step is its requests' altogether, as is right
    where a replica is as full as it may be: f = s / W."""

    full_batch: int = FULL_BATCH
    slack: bool = True


@dataclass(frozen=True, slots=True)
class Weights:
    """See the head of the file; all in seconds of a replica that holds `batch` sequences."""

    batch: int
    prefill_s: float
    attention_s: float
    output_s: float
    context_s: float
    window_s: float = 0.0
    window_tokens: int = 0

    def prefill(self, tokens: int, pairs: float) -> float:
        return self.prefill_s * tokens + self.attention_s * pairs

    def request(self, prompt: int, cached: int, output: int) -> Share:
        """What a request takes of a full replica, from its tokens alone."""
        fresh, decoded = prompt - cached, max(0, output - 1)
        context = decoded * prompt + decoded * (decoded + 1) / 2
        seen = _seen(prompt + 1, 1, decoded, self.window_tokens) if self.window_s else 0.0
        return Share(
            self.prefill(fresh, fresh * (cached + fresh / 2)),
            self.output_s * decoded,
            self.context_s * context + self.window_s * seen,
        )


def weights_of(law: StepLaw, budget: int, batch: int = FULL_BATCH, engines: int = 1) -> Weights:
    """The weights by a step-time law, with `budget` tokens a step at most, of an engine that is one of `engines` in lockstep."""
    prompt = max(1, budget - batch)
    decode_s = law.seconds(BatchShape(0, batch, 0, 0.0, batch))
    mixed_s = law.seconds(BatchShape(prompt, batch, 0, 0.0, batch + 1))
    return Weights(
        batch,
        prefill_s=(mixed_s - decode_s) / prompt / engines,
        attention_s=law.attention_s / engines,
        output_s=decode_s / batch / engines,
        context_s=law.context_s / engines,
        window_s=law.window_context_s / engines,
        window_tokens=law.window_tokens,
    )


def _seen(context: int, seqs: int, steps: int, window: int) -> float:
    """Tokens that layers with a window read in `steps` decode steps, from contexts of `context` together on."""
    cap = seqs * window
    growing = min(steps, max(0, -(-(cap - context) // max(1, seqs))))
    return growing * context + seqs * (growing * (growing - 1) / 2) + (steps - growing) * cap


class _Sums(NamedTuple):
    """Over all batches so far, each with its f and power p: sums of f, of f x its number, and of f x window tokens a sequence; the same of
    f x p."""

    share: float = 0.0
    numbered: float = 0.0
    window: float = 0.0
    power: float = 0.0
    power_numbered: float = 0.0
    power_window: float = 0.0


@dataclass(slots=True)
class _Open:
    """A request that has not ended: its prefill so far, and the batches that brought a token out of it."""

    prompt_tokens: int
    prefill_s: float = 0.0
    waste_s: float = 0.0
    joules: float = 0.0
    reached: int = 0  # tokens that were computed before
    sampled: list[int] = field(default_factory=list)


class Attribution:
    """Follows the steps of a replica of `engines` engines, whose batches are numbered by each for itself."""

    def __init__(self, weights: Weights, engines: int = 1, *, slack: bool = True) -> None:
        self.weights = weights
        self._most = 1.0 if slack else math.inf  # that f may be
        self._prefill_s = self._output_s = self._context_s = self._waste_s = self._slack_s = self._slack_joules = 0.0
        self._open: list[dict[str, _Open]] = [{} for _ in range(engines)]
        self._numbers: list[list[int]] = [[-1] for _ in range(engines)]  # last batch of each entry
        self._sums: list[list[_Sums]] = [[_Sums()] for _ in range(engines)]

    @property
    def account(self) -> Account:
        return Account(
            self._prefill_s, self._output_s, self._context_s, self._waste_s, self._slack_s, self._slack_joules
        )

    def step(
        self,
        batches: Sequence[tuple[int, Batch]],
        shapes: Sequence[BatchShape],
        seconds: float,
        joules: float,
        slowdown: float = 1.0,
    ) -> None:
        """A step of `seconds`, in which these engines computed these batches, of these shapes."""
        weights, whole = self.weights, 0.0
        for shape in shapes:
            whole += weights.prefill(shape.prefill_tokens, shape.attention_pairs)
            whole += weights.output_s * shape.decode_seqs + weights.context_s * shape.context_tokens
            whole += weights.window_s * min(shape.context_tokens, shape.decode_seqs * weights.window_tokens)
        f = min(slowdown * self._most, seconds / whole) if whole > 0.0 else 0.0
        watts = joules / seconds if seconds > 0.0 else 0.0
        for (engine, batch), shape in zip(batches, shapes, strict=False):  # idle engines have a shape, and no batch
            if shape.prefill_tokens:
                for part in batch.parts:
                    if not part.decode:
                        self._compute(engine, batch.number, part, f, watts)
            self._decode(engine, batch.number, shape, 1, f, watts)
        self._slack_s += seconds - f * whole
        self._slack_joules += joules - f * whole * watts

    def run(
        self, last: int, shape: BatchShape, steps: int, seconds: float, joules: float, slowdown: float = 1.0
    ) -> None:
        """A run of `steps` decode steps from `shape` on, the last of them batch `last`, of an engine that is alone."""
        weights, seqs = self.weights, shape.decode_seqs
        contexts = steps * shape.context_tokens + seqs * (steps * (steps - 1) / 2)
        whole = weights.output_s * seqs * steps + weights.context_s * contexts
        if weights.window_s:
            whole += weights.window_s * _seen(shape.context_tokens, seqs, steps, weights.window_tokens)
        f, watts = (
            min(slowdown * self._most, seconds / whole) if whole > 0.0 else 0.0,
            joules / seconds if seconds > 0.0 else 0.0,
        )
        self._decode(0, last, shape, steps, f, watts)
        self._slack_s += seconds - f * whole
        self._slack_joules += joules - f * whole * watts

    def _compute(self, engine: int, number: int, part: Part, f: float, watts: float) -> None:
        """A request's prompt tokens in a batch."""
        sequence, tokens = part.sequence, part.tokens
        entry = self._open[engine].get(sequence.id)
        if entry is None:
            entry = self._open[engine][sequence.id] = _Open(sequence.prompt_tokens)
        spent_s = f * self.weights.prefill(tokens, tokens * (part.start + tokens / 2))
        again = 0
        if sequence.preemptions:
            if sequence.tokens > sequence.prompt_tokens:
                entry.reached = max(entry.reached, sequence.tokens - 1)
            again = max(0, min(part.start + tokens, entry.reached) - part.start)
        waste_s = spent_s * again / tokens
        entry.reached = max(entry.reached, part.start + tokens)
        entry.prefill_s += spent_s - waste_s
        entry.waste_s += waste_s
        entry.joules += spent_s * watts
        self._prefill_s += spent_s - waste_s
        self._waste_s += waste_s
        if part.samples:
            entry.sampled.append(number)

    def _decode(self, engine: int, last: int, shape: BatchShape, steps: int, f: float, watts: float) -> None:
        """The decode tokens of `steps` batches, the last of them `last`, each with the share `f`."""
        weights, seqs, before = self.weights, shape.decode_seqs, self._sums[engine][-1]
        numbered = f * (steps * last - steps * (steps - 1) / 2)
        window = 0.0
        if weights.window_s and seqs:
            window = f * _seen(shape.context_tokens, seqs, steps, weights.window_tokens) / seqs
        contexts = steps * shape.context_tokens + seqs * (steps * (steps - 1) / 2)
        self._output_s += f * steps * weights.output_s * seqs
        self._context_s += f * weights.context_s * contexts + window * weights.window_s * seqs
        self._numbers[engine].append(last)
        self._sums[engine].append(
            _Sums(
                before.share + f * steps,
                before.numbered + numbered,
                before.window + window,
                before.power + f * steps * watts,
                before.power_numbered + numbered * watts,
                before.power_window + window * watts,
            )
        )

    def end(self, engine: int, request_id: str, spans: Sequence[tuple[int, int]]) -> Share:
        """What a request is charged with, whose tokens came out of the batches of `spans` (first, last), one of each."""
        entry = self._open[engine].pop(request_id)
        output_s = context_s = 0.0
        joules, token, sampled = entry.joules, 0, iter([*entry.sampled, -1])
        out = next(sampled)
        for first, last in spans:
            start = first
            while start <= last:
                while -1 < out < start:
                    out = next(sampled)
                end = out - 1 if start <= out <= last else last
                if end >= start:
                    of = self._between(engine, start, end)
                    base = entry.prompt_tokens + token - start  # context of a batch, less its number
                    output_s += self.weights.output_s * of.share
                    context_s += self._contexts(base, of.share, of.numbered, of.window)
                    joules += self.weights.output_s * of.power
                    joules += self._contexts(base, of.power, of.power_numbered, of.power_window)
                token += end - start + 1 + (end < last)
                start = end + 2
        if len(self._numbers[engine]) > _LONG:
            self._forget(engine, spans[-1][1])
        return Share(entry.prefill_s, output_s, context_s, entry.waste_s, joules)

    def drop(self, engine: int, request_id: str) -> None:
        """A request was aborted."""
        self._open[engine].pop(request_id, None)

    def _contexts(self, base: int, share: float, numbered: float, window: float) -> float:
        return self.weights.context_s * (base * share + numbered) + self.weights.window_s * window

    def _between(self, engine: int, first: int, last: int) -> _Sums:
        numbers, sums = self._numbers[engine], self._sums[engine]
        low, high = sums[bisect_right(numbers, first - 1) - 1], sums[bisect_right(numbers, last) - 1]
        return _Sums(*(b - a for a, b in zip(low, high, strict=True)))

    def _forget(self, engine: int, number: int) -> None:
        """Nobody will ask about batches before those of the requests that have not ended."""
        oldest = min([number, *(entry.sampled[0] for entry in self._open[engine].values() if entry.sampled)])
        entries = max(0, bisect_right(self._numbers[engine], oldest - 1) - 1)
        del self._numbers[engine][:entries], self._sums[engine][:entries]
