"""What the tool server counts, and how Prometheus reads it. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence

from fanmark.servers.vllm_metrics import Histogram, own_counter, own_gauge

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ToolMetrics:
    """Sums by tool. `in_flight` calls hold a slot, `queued` ones wait for it."""

    def __init__(self) -> None:
        self.in_flight = self.queued = 0
        self._calls: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[str] = Counter()
        self._call_s: dict[str, Histogram] = {}
        self._queue_s = Histogram(_SECONDS)

    def ended(self, tool: str, outcome: str, seconds: float, queued_s: float, size: int) -> None:
        """A call that ended, however it did."""
        self._calls[tool, outcome] += 1
        self._bytes[tool] += size
        self._queue_s.observe(queued_s)
        histogram = self._call_s.get(tool)
        if histogram is None:
            histogram = self._call_s[tool] = Histogram(_SECONDS)
        histogram.observe(seconds)

    def render(self, sessions: int, struck: Iterable[tuple[str, int]]) -> str:
        """The text of a scrape."""
        calls = [({"tool": tool, "outcome": outcome}, n) for (tool, outcome), n in self._calls.items()]
        faults = Counter[str]()
        for kind, times in struck:
            faults[kind] += times
        lines = own_counter("fanmark_tools_calls_total", "Calls ended, by outcome", calls)
        lines += own_counter(
            "fanmark_tools_result_bytes_total", "Bytes of results", [({"tool": t}, n) for t, n in self._bytes.items()]
        )
        lines += own_counter(
            "fanmark_tools_faults_total", "Faults that struck", [({"kind": kind}, n) for kind, n in faults.items()]
        )
        lines += own_gauge("fanmark_tools_in_flight", "Calls that hold a slot", self.in_flight)
        lines += own_gauge("fanmark_tools_queued", "Calls that wait for a slot", self.queued)
        lines += own_gauge("fanmark_tools_sessions", "Open sessions of the handshake era", sessions)
        lines += _histograms("fanmark_tools_queue_seconds", "Time in the queue", [("", self._queue_s)])
        lines += _histograms(
            "fanmark_tools_call_duration_seconds", "From a call's arrival to its answer", list(self._call_s.items())
        )
        return "\n".join([*lines, ""])


def _histograms(name: str, text: str, rows: Sequence[tuple[str, Histogram]]) -> list[str]:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
    for tool, histogram in rows:
        label, running = f'tool="{tool}",' if tool else "", 0
        for bound, count in zip((*histogram.bounds, None), histogram.counts, strict=True):
            running += count
            lines.append(f'{name}_bucket{{{label}le="{"+Inf" if bound is None else repr(float(bound))}"}} {running}')
        ending = f"{{{label[:-1]}}}" if label else ""
        lines += [f"{name}_count{ending} {running}", f"{name}_sum{ending} {histogram.sum!r}"]
    return lines
