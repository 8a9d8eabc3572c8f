"""A run's course as those who watch it see it: rates, ratios and quantiles so far, and the samples. Reads the tally and decides nothing."""

from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from fanmark.loadgen.health import WORDS, ClientState, bucket_quantile, worst
from fanmark.loadgen.samples import Sample
from fanmark.loadgen.statistics import QUANTILES, SUPPORT
from fanmark.loadgen.tally import ArmTally, Tally

MOST_SAMPLES = 600  # kept for a timeline; of a longer run every second one, then every fourth, ...
_RATE_OVER = 10  # samples


class Rates(NamedTuple):
    """What ended a second, over the last seconds; queries are those that completed."""

    queries: float
    calls: float
    input_tokens: float
    output_tokens: float


WORKER_COLUMNS = ("worker", "client", "CPU", "queries\nrunning", "done", "loop lag\np99, ms")


class Course:
    """`total` is the number of queries, None where a duration is given; `now` is the run's clock. `report` is the report's page, once there
    is one."""

    def __init__(self, tally: Tally, total: int | None, now: Callable[[], float]) -> None:
        self.tally = tally
        self.total = total
        self.now: Callable[[], float] = lambda: max(0.0, now())  # workers are told their start before it
        self.samples: list[Sample] = []
        self.latest: Sample | None = None
        self.report: str | None = None
        self._seen, self._every = 0, 1
        self._busy_s = dict.fromkeys(tally.arms, 0.0)  # for how long a query of the arm was in flight
        self._calls_s = dict.fromkeys(tally.arms, 0.0)  # the arm's calls in flight, times that
        self._sums: deque[tuple[float, dict[str, Rates]]] = deque(maxlen=_RATE_OVER + 1)

    def add(self, sample: Sample) -> None:
        """The next sample, about a second after the last one."""
        passed_s = sample.at - (self.latest.at if self.latest is not None else 0.0)
        self.latest = sample
        if self._seen % self._every == 0:
            self.samples.append(sample)
        self._seen += 1
        if len(self.samples) > MOST_SAMPLES:
            self.samples, self._every = self.samples[::2], self._every * 2
        self._sums.append((sample.at, self._ended()))
        for name, arm in sample.arms.items():
            if arm.queries_in_flight:
                self._busy_s[name] += passed_s
                self._calls_s[name] += arm.calls_in_flight * passed_s

    def _ended(self) -> dict[str, Rates]:
        return {
            name: Rates(arm.completed, sum(arm.calls.values()), arm.tokens["input"], arm.tokens["output"])
            for name, arm in self.tally.arms.items()
        }

    def rates(self, arm: str) -> Rates | None:
        """None before two samples."""
        if len(self._sums) < 2:
            return None
        (start_at, before), (end_at, after) = self._sums[0], self._sums[-1]
        seconds = max(end_at - start_at, 1e-9)
        return Rates(*((b - a) / seconds for a, b in zip(before[arm], after[arm], strict=True)))

    def point(self, arm: str) -> tuple[float, float] | None:
        """Where the arm has been so far: its queries/s and mean calls in flight while it had queries in flight; None before that."""
        seconds = self._busy_s[arm]
        return (self.tally.arms[arm].completed / seconds, self._calls_s[arm] / seconds) if seconds else None

    @property
    def done(self) -> int:
        """Queries completed."""
        return sum(arm.completed for arm in self.tally.arms.values())

    @property
    def failed(self) -> int:
        """Queries failed."""
        return sum(arm.finished["failed"] for arm in self.tally.arms.values())

    @property
    def verdict(self) -> str:
        """On the client, as of now."""
        return worst([state.verdict for state in list(self.tally.clients.values())])

    @property
    def client(self) -> str:
        """The verdict in words, and how many workers died."""
        states = list(self.tally.clients.values())
        lost = sum(state.lost_at is not None for state in states)
        word = self.verdict if self.verdict.startswith("client") else f"client {self.verdict}"
        return word + (f", {lost} of {len(states)} workers lost" if lost else "")

    def workers(self, most: int) -> list[list[str]]:
        """A row under those columns for each of several workers as it last told of itself: all, or the `most` that are worst off, and one
        more that counts the others. None of a single one, which is the client."""
        states = dict(self.tally.clients)
        if len(states) < 2:
            return []
        shown = sorted(states)
        if len(states) == most + 1:
            most += 1
        elif len(states) > most:
            shown.sort(key=lambda n: _badness(states[n]), reverse=True)
        others = Counter(_word(states[n]) for n in shown[most:])
        told = ", ".join(f"{others[word]} {word}" for word in ("lost", *reversed(WORDS)) if others[word])
        more = [[f"{others.total()} others", told, "", "", "", ""]] if others else []
        return [_worker(n, states[n]) for n in shown[:most]] + more

    def servers(self) -> dict[str, str]:
        """What each target's servers were doing at the last sample, in words."""
        found = {}
        for name, server in (self.latest.targets if self.latest is not None else {}).items():
            if server is not None:
                told = [
                    f"{value:.0f} {word}"
                    for word, value in (("running", server.running), ("waiting", server.waiting))
                    if value is not None
                ]
                found[name] = ", ".join(told + ([] if server.kv_use is None else [f"KV {server.kv_use:.0%}"]))
        return found


def _badness(state: ClientState) -> tuple[bool, int, float]:
    return state.lost_at is not None, WORDS.index(state.verdict), state.cpu_share or 0.0


def _word(state: ClientState) -> str:
    return state.verdict if state.lost_at is None else "lost"


def _worker(index: int, state: ClientState) -> list[str]:
    name = f"{index}" if state.node is None else f"{index} on {state.node}"
    done = str(state.queries_done)
    if state.lost_at is not None:
        return [name, f"lost at {state.lost_at:.0f} s", "-", "-", done, "-"]
    lag_s = bucket_quantile(dict(state.loop_lag), 0.99)
    cpu = "-" if state.cpu_share is None else f"{state.cpu_share:.0%}"
    lag_ms = "-" if lag_s is None else f"{1e3 * lag_s:.1f}"
    return [name, state.verdict, cpu, str(state.queries_running), done, lag_ms]


def quantiles(counts: Mapping[int, int]) -> dict[str, float | None]:
    """p50, p90 and p99 of values counted by log bucket; None without support."""
    counts = dict(counts)  # a copy: the run may go on in another thread
    n = sum(counts.values())
    return {name: bucket_quantile(counts, q) if n >= SUPPORT[name] else None for name, q in QUANTILES.items()}


def of_arm(arm: ArmTally) -> dict[str, dict[str, float | None]]:
    """Quantiles of an arm's times to the first token, and of its query latencies."""
    return {"ttft_s": quantiles(arm.ttft), "latency_s": quantiles(arm.latency)}
