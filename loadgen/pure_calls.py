"""The calls of a run that tell a step's time by themselves: lone ones, and those that decoded while no prompt was read.

No queue, and so no chance, is in their times: what a law predicts of them is in closed form.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from fanmark.loadgen.traces import Trace
from fanmark.servers.engine.step_time import BatchShape, StepLaw, padded_tokens

_READING_GAPS = 0.25  # for so long another prompt may be read meanwhile: the tokens of one step come out one by one
_STEADY_SHARE = 0.8  # of an answer's time, during which the batch must have one size


def lone_ttft_s(law: StepLaw, trace: Trace, place: int, budget: int) -> float:
    """Time to first token of a request that has the engine to itself: its chunks, and the launch of the step after them."""
    request = trace.requests[place]
    done, prompt = trace.cached[place], len(request.prompt)
    end_s = launched_s = 0.0
    while done < prompt:
        chunk = min(prompt - done, budget)
        shape = BatchShape(chunk, 0, 0, chunk * (done + chunk / 2), 1)
        launched_s += law.launch_seconds(shape)
        end_s = max(end_s + law.gpu_seconds(shape), launched_s)
        done += chunk
    if len(request.output) > 1:
        end_s = max(end_s, launched_s + law.graph_launch_s)
    return law.ingress_s + end_s + law.egress_s


def spans_of(trace: Trace) -> list[tuple[float, float, float]]:
    """When each request arrived, had its first token and its last, as the client saw it."""
    return [
        (r.arrived_at, r.arrived_at + s.ttft_s, r.arrived_at + s.e2e_s)
        for r, s in zip(trace.requests, trace.served, strict=True)
    ]


def alone(trace: Trace) -> list[int]:
    """The places of the calls during which there was no other."""
    spans = spans_of(trace)
    found, busy_until = [], -math.inf
    for place, (sent_at, _, done_at) in enumerate(spans):
        follows = spans[place + 1][0] if place + 1 < len(spans) else math.inf
        if trace.weights[place] and busy_until <= sent_at and done_at <= follows:
            found.append(place)
        busy_until = max(busy_until, done_at)
    return found


class Decode(NamedTuple):
    """A call that wrote its answer while no prompt was read: its place, the gap between its tokens (s), and the batches meanwhile,
    each with its share of the time."""

    place: int
    gap_s: float
    batches: list[tuple[float, BatchShape]]

    def predicted_s(self, law: StepLaw) -> float:
        """The gap by the law: time over the number of steps in it."""
        return 1.0 / math.fsum(share / law.seconds(shape) for share, shape in self.batches)


def pure_decodes(trace: Trace) -> list[Decode]:
    """The calls that wrote their answer while no prompt was read and the batch hardly changed, by place."""
    spans = spans_of(trace)
    longest_s = max(done_at - sent_at for sent_at, _, done_at in spans)
    arrivals = [span[0] for span in spans]
    found = []
    for place, (_, first_at, done_at) in enumerate(spans):
        gap_s = trace.steady_s[place]
        if not trace.weights[place] or gap_s is None:
            continue
        beside = range(bisect_left(arrivals, first_at - longest_s), bisect_right(arrivals, done_at))
        reading = (min(done_at, spans[p][1]) - max(first_at, spans[p][0]) for p in beside if p != place)
        if max(reading, default=0.0) <= _READING_GAPS * gap_s:
            writing = [p for p in beside if spans[p][1] < done_at and spans[p][2] > first_at]
            batches = _batches(trace, spans, writing, first_at, done_at)
            if max(batches)[0] >= _STEADY_SHARE:
                found.append(Decode(place, gap_s, batches))
    return found


def _batches(
    trace: Trace, spans: Sequence[tuple[float, float, float]], places: Sequence[int], from_at: float, until_at: float
) -> list[tuple[float, BatchShape]]:
    """The batches of decoding calls between two instants, those of one padded size as one, and each one's share of the time."""
    edges = sorted({from_at, until_at, *(t for p in places for t in spans[p][1:] if from_at < t < until_at)})
    sums: dict[int, list[float]] = {}  # by padded size: seconds, and calls and contexts, times seconds
    for start, end in pairwise(edges):
        middle = (start + end) / 2.0
        seqs = context = 0.0
        for p in places:
            _, first, done = spans[p]
            if first <= middle < done:
                request = trace.requests[p]
                seqs += 1.0
                context += len(request.prompt) + (middle - first) / (done - first) * len(request.output)
        entry = sums.setdefault(padded_tokens(round(seqs)), [0.0, 0.0, 0.0])
        for i, value in enumerate((1.0, seqs, context)):
            entry[i] += value * (end - start)
    span_s = until_at - from_at
    batches = []
    for seconds, seqs, context in sums.values():
        count = round(seqs / seconds)
        batches.append((seconds / span_s, BatchShape(0, count, round(context / seconds), 0.0, count)))
    return batches
