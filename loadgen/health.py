"""Is the client the bottleneck? Its loop lag and send delays, its CPU and memory, and the verdict."""

import asyncio
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fanmark.loadgen.statistics import distribution

_BEAT_S = 0.05


@dataclass
class Health:
    """Samples of the loop's lag and of the process's CPU share. `now` is the run's clock."""

    now: Callable[[], float]
    loop_lag_s: list[float] = field(default_factory=list)
    busy_seconds: int = 0
    _cpu_start_s: float = field(default_factory=time.process_time)

    async def watch(self, seen: Callable[[float], None]) -> None:
        """Beats until cancelled; each beat's lateness is the loop's lag. Counts the seconds in a row above 90 % CPU."""
        in_a_row = 0
        cpu_s, at = time.process_time(), self.now()
        while True:
            due_at = self.now() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            lag_s = max(0.0, self.now() - due_at)
            self.loop_lag_s.append(lag_s)
            seen(lag_s)
            if self.now() - at >= 1.0:
                share = (time.process_time() - cpu_s) / (self.now() - at)
                in_a_row = in_a_row + 1 if share > 0.9 else 0
                self.busy_seconds = max(self.busy_seconds, in_a_row)
                cpu_s, at = time.process_time(), self.now()

    def report(
        self, send_delay_s: Sequence[float], coalesced_share: float, median_ttft_s: float | None
    ) -> dict[str, Any]:
        """The `client` part of summary.json."""
        word, reasons = verdict(p99(self.loop_lag_s), p99(send_delay_s), median_ttft_s, self.busy_seconds)
        return {
            "verdict": word,
            "reasons": reasons,
            "loop_lag_s": distribution(self.loop_lag_s),
            "send_delay_s": distribution(send_delay_s),
            "coalesced_share": coalesced_share,
            "cpu_s": time.process_time() - self._cpu_start_s,
            "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "workers": 1,
        }


def p99(values: Sequence[float]) -> float:
    """The 99th percentile, the largest value where there are fewer than 100."""
    return sorted(values)[int(0.99 * (len(values) - 1) + 0.999999)] if values else 0.0


def verdict(
    lag_p99_s: float, delay_p99_s: float, median_ttft_s: float | None, busy_seconds: int
) -> tuple[str, list[str]]:
    """strained: p99 of loop lag or send delay above max(5 ms, 5 % of the median TTFT); client-limited: above max(25 ms, 20 %), or above
    90 % CPU for 5 s. Gives the word and the reasons."""
    ttft_s = median_ttft_s or 0.0
    limits = {"client-limited": max(0.025, 0.2 * ttft_s), "strained": max(0.005, 0.05 * ttft_s)}
    measured = {"loop lag": lag_p99_s, "send delay": delay_p99_s}
    if busy_seconds >= 5:
        return "client-limited", [f"above 90 % CPU for {busy_seconds} s"]
    for word, limit_s in limits.items():
        reasons = [
            f"p99 of {name} is {value * 1e3:.1f} ms, above {limit_s * 1e3:.1f} ms"
            for name, value in measured.items()
            if value > limit_s
        ]
        if reasons:
            return word, reasons
    return "ok", []
