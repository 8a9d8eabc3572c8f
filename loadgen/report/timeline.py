"""What load, servers and client were doing over time, from the samples: small pictures below each other on one scale of time. Pure."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from fanmark.loadgen.report import svg
from fanmark.loadgen.report.svg import Scale, axis, line, rect, text
from fanmark.loadgen.samples import Sample, ServerSample
from fanmark.loadgen.table import number

_MOST_POINTS = 300
_ROWS = 12  # of a table
_HEIGHT = 70

Series = Mapping[str, Sequence[float | None]]  # by what it is called, a value for each sample
Span = tuple[float, float]


def timelines(samples: Sequence[Sample], counted: Sequence[Span], name: str) -> str:
    """All figures. `counted` are the times between which queries counted."""
    if len(samples) < 2:
        return "<p>There are fewer than two samples.</p>"
    at = [sample.at for sample in samples]
    figures = [
        _panel(title, at, series, unit, counted, f"{name}-{i}")
        for i, (title, series, unit) in enumerate(_panels(samples))
    ]
    return svg.grid(figures)


def _panels(samples: Sequence[Sample]) -> Iterable[tuple[str, Series, str]]:
    arms = sorted({arm for sample in samples for arm in sample.arms}, key=list(samples[-1].arms).index)
    for title, field in (("Queries in flight", "queries_in_flight"), ("Calls in flight", "calls_in_flight")):
        yield title, {arm: [getattr(s.arms.get(arm), field, None) for s in samples] for arm in arms}, ""
    for target in samples[-1].targets:
        of = "" if len(samples[-1].targets) == 1 else f" of {target}"
        told = [sample.targets.get(target) for sample in samples]
        yield (
            f"Requests in the server{of}",
            _known(told, {"running": lambda s: s.running, "waiting": lambda s: s.waiting}),
            "",
        )
        yield (
            f"KV cache in use{of}",
            _known(told, {"KV use": lambda s: None if s.kv_use is None else 100.0 * s.kv_use}),
            " %",
        )
        at = [sample.at for sample in samples]
        fresh = _rates(
            at,
            [
                None if s is None or s.prompt_tokens is None else s.prompt_tokens - (s.prompt_tokens_cached or 0.0)
                for s in told
            ],
        )
        wrote = _rates(at, [None if s is None else s.generation_tokens for s in told])
        rates = {"prompt, not cached": fresh, "generation": wrote}
        yield (
            f"Tokens a second by the server's counters{of}",
            {word: each for word, each in rates.items() if any(each)},
            "",
        )
    clients = [sample.client for sample in samples]
    if any(client is not None for client in clients):
        lag = [None if c is None or c.loop_lag_s is None else 1e3 * c.loop_lag_s for c in clients]
        yield "Largest lag of the client's event loop", {"loop lag": lag}, " ms"
        busy = {
            "client, of one core": [None if c is None or c.cpu_share is None else 100.0 * c.cpu_share for c in clients],
            "host, of all cores": [
                None if c is None or c.host_cpu_share is None else 100.0 * c.host_cpu_share for c in clients
            ],
        }
        yield "Processors busy", busy, " %"


def _known(told: Sequence[ServerSample | None], get: Mapping[str, Callable[[ServerSample], float | None]]) -> Series:
    found = {word: [None if s is None else read(s) for s in told] for word, read in get.items()}
    return {word: values for word, values in found.items() if any(value is not None for value in values)}


def _rates(at: Sequence[float], totals: Sequence[float | None]) -> list[float | None]:
    """By how much a second a counter grew until each sample."""
    found: list[float | None] = [None]
    for (a, before), (b, after) in pairwise(zip(at, totals, strict=True)):
        found.append(None if before is None or after is None or b <= a else max(0.0, after - before) / (b - a))
    return found


def _panel(title: str, at: Sequence[float], series: Series, unit: str, counted: Sequence[Span], name: str) -> str:
    if not series:
        return ""
    at, series = binned(at, series, _MOST_POINTS)
    times = Scale(0.0, at[-1])
    most = max((value for values in series.values() for value in values if value is not None), default=0.0)
    top = Scale(0.0, most * 1.05 or 1.0)
    parts = [rect(times.at(a), 4, times.at(b) - times.at(a), _HEIGHT, "counted") for a, b in counted]
    parts += axis(times, 4, _HEIGHT + 4, " s", lambda value: f"{value:g}")
    for value in (0.0, most):
        y = 4 + _HEIGHT * (1 - top.at(value) / 100)
        parts += [
            line(0, y, 100, y, "grid"),
            text(0, y - 3 if value == 0 else y + 10, f"{number(value)}{unit}", "tick"),
        ]
    kinds = {}
    for i, (word, values) in enumerate(series.items()):
        kinds[word] = svg.curve_kind(i)
        points = [(times.at(t), None if v is None else top.at(v) / 100) for t, v in zip(at, values, strict=True)]
        parts += [svg.curve(piece, 4, _HEIGHT, kinds[word]) for piece in _pieces(points)]
    few_at, few = binned(at, series, _ROWS)
    rows = [["until, s", *few]] + [
        [f"{t:.0f}", *(number(values[i]) for values in few.values())] for i, t in enumerate(few_at)
    ]
    label = f"{title} over time, at most {number(most)}{unit}. The table below has means over time"
    legend = svg.key(kinds) if len(kinds) > 1 else ""
    return svg.figure(title, legend, svg.picture(label, _HEIGHT + 22, parts), svg.numbers(name, rows))


def _pieces(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The stretches in which all is known."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            found.append([])
        else:
            found[-1].append((x, y))
    return [piece for piece in found if piece]


def binned(at: Sequence[float], series: Series, most: int) -> tuple[list[float], dict[str, list[float | None]]]:
    """So many points at most: means over as many samples each, at the last one's time."""
    size = math.ceil(len(at) / most)
    starts = range(0, len(at), size)
    return [at[min(i + size, len(at)) - 1] for i in starts], {
        word: [_mean(values[i : i + size]) for i in starts] for word, values in series.items()
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
