"""How fast the engine runs: an hour of agent traffic on some replicas, in virtual time, on one core.

usage: python benchmarks/engine_speed.py [--requests N] [--replicas N] [--profile NAME] [--step-by-step] [--attribute]

Half of the queries are 12-step tool chains whose context grows (shared system text and tool schemas), half are debates of four agents,
two rounds and a judge (shared question and answers). Queries arrive at random over an hour; a call starts when those it needs have
ended. A query's calls all go to one replica. Printed: what the traffic was, and the seconds of processor time that simulating it took
(making the prompts apart).
"""

import argparse
import gc
import random
import time
from collections.abc import Iterator
from heapq import heappop, heappush
from math import inf

from fanmark.servers.engine.attribution import Account, Attribution, weights_of
from fanmark.servers.engine.batch import EngineConfig
from fanmark.servers.engine.prompt import Prompt
from fanmark.servers.engine.replica import Replica
from fanmark.servers.engine.request import Request
from fanmark.servers.profiles import load_profile

CALLS_A_QUERY = (12 + 9) / 2
HOUR_S = 3600.0

Messages = list[list[int]]  # token ids of each
Calls = list[tuple[Messages, list[int]]]  # prompt and output of calls made at once
Wave = tuple[float, Calls]  # seconds to wait before


class Texts:
    """Fresh token ids."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._fresh = 0

    def of(self, tokens: int) -> list[int]:
        self._fresh += 1
        start = self._draw.randrange(100_000)
        return [self._fresh, *range(start, start + tokens - 1)]

    def length(self, mean: float) -> int:
        """Lognormal, coefficient of variation 0.5."""
        return max(16, int(mean * self._draw.lognormvariate(-0.1116, 0.4724)))


def tool_chain(texts: Texts, system: Messages) -> Iterator[Wave]:
    messages = [*system, texts.of(texts.length(500))]
    for _ in range(12):
        output = texts.of(texts.length(400))
        yield 0.2, [(messages, output)]
        messages = [*messages, output, texts.of(texts.length(350))]


def debate(texts: Texts, system: Messages) -> Iterator[Wave]:
    shared = [*system, texts.of(texts.length(1500))]
    roles = [texts.of(20) for _ in range(4)]
    for _ in range(2):
        answers = [texts.of(texts.length(400)) for _ in roles]
        yield 0.0, [([*shared, role], answer) for role, answer in zip(roles, answers, strict=True)]
        shared = shared + answers
    yield 0.0, [(shared, texts.of(texts.length(400)))]


class Hour:
    """The traffic: queries by arrival, calls by due time."""

    def __init__(self, requests: int, seed: int = 7) -> None:
        draw, texts = random.Random(seed), Texts(seed)
        system, schemas = texts.of(1500), texts.of(1800)
        self._due: list[tuple[float, int, Iterator[Wave], Calls]] = []
        self._open: dict[str, tuple[int, Iterator[Wave]]] = {}
        self._left: dict[int, int] = {}
        for query in range(round(requests / CALLS_A_QUERY)):
            calls = tool_chain(texts, [system, schemas]) if query % 2 else debate(texts, [system])
            heappush(self._due, (draw.random() * HOUR_S, query, calls, []))
        self.made_s = 0.0
        self.requests = self.input_tokens = self.output_tokens = 0

    def next_at(self) -> float:
        return self._due[0][0] if self._due else inf

    def take(self) -> tuple[int, list[Request]]:
        """A query and its calls that are due next; making them is timed apart."""
        began = time.process_time()
        at, query, calls, due = heappop(self._due)
        if not due:
            _, due = next(calls)
        self._left[query] = len(due)
        made = []
        for messages, output in due:
            prompt = Prompt(messages)
            self.requests += 1
            self.input_tokens += len(prompt)
            self.output_tokens += len(output)
            request = Request(str(self.requests), prompt, output, arrived_at=at)
            self._open[request.id] = (query, calls)
            made.append(request)
        self.made_s += time.process_time() - began
        return query, made

    def done(self, request_id: str, at: float) -> None:
        began = time.process_time()
        query, calls = self._open.pop(request_id)
        self._left[query] -= 1
        if not self._left[query]:
            wave = next(calls, None)
            if wave is not None:
                heappush(self._due, (at + wave[0], query, calls, wave[1]))
        self.made_s += time.process_time() - began


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--requests", type=int, default=23_600)
    options.add_argument("--replicas", type=int, default=6)
    options.add_argument("--profile", default="qwen3-30b-a3b@h100")
    options.add_argument("--step-by-step", action="store_true", help="an event for every token, no jumps")
    options.add_argument(
        "--attribute", action="store_true", help="keep account of whose the time is, as simulate and the stub do"
    )
    given = options.parse_args()
    profile = load_profile(given.profile)
    settings = profile.settings
    config = EngineConfig(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        num_blocks=settings.num_blocks,
        block_size=settings.block_size,
    )
    gc.disable()  # the engine makes no cyclic garbage; looking for it would be a quarter of the time
    weights = weights_of(profile.law, config.max_num_batched_tokens)
    replicas = [
        Replica(
            config,
            profile.law,
            stream=given.step_by_step,
            attribution=Attribution(weights) if given.attribute else None,
        )
        for _ in range(given.replicas)
    ]
    hour = Hour(given.requests)
    began = time.process_time()
    now, wake_ups = drive(replicas, hour)
    spent = time.process_time() - began
    report(profile.name, replicas, hour, now)
    print(f"engine {spent - hour.made_s:.2f} s of processor time, {wake_ups:,} wake-ups; prompts {hour.made_s:.2f} s")


def drive(replicas: list[Replica], hour: Hour) -> tuple[float, int]:
    """Run the traffic to its end; the virtual time it took, and how often an engine was woken."""
    wakes: list[float | None] = [None] * len(replicas)
    wake_ups, now = 0, 0.0
    while True:
        due, which = min((at, i) if at is not None else (inf, i) for i, at in enumerate(wakes))
        arrival = hour.next_at()
        if due == arrival == inf:
            return now, wake_ups
        wake_ups += 1
        if due <= arrival:
            now = due
            for event in replicas[which].advance(due):
                if event.finished:
                    hour.done(event.id, event.at)
        else:
            now = arrival
            query, requests = hour.take()
            which = query % len(replicas)
            for request in requests:
                replicas[which].add(request, arrival)
        wakes[which] = replicas[which].next_at()


def report(name: str, replicas: list[Replica], hour: Hour, now: float) -> None:
    states = [replica.statistics() for replica in replicas]
    engines = [engine for state in states for engine in state.engines]
    n, steps, busy_s = hour.requests, sum(state.steps for state in states), sum(state.busy_s for state in states)
    hits = sum(engine.prefix_cache_hits for engine in engines) / sum(engine.prefix_cache_queries for engine in engines)
    print(f"{n:,} requests in {now:,.0f} s of virtual time on {len(replicas)} x {name}")
    print(
        f"{hour.input_tokens / n:,.0f} tokens in, {hour.output_tokens / n:,.0f} out, prefix hits {100 * hits:.1f} %",
        end="",
    )
    print(f", {sum(engine.num_preemptions for engine in engines):,} preemptions")
    print(f"{steps:,} steps of {busy_s / steps * 1e3:.2f} ms, busy {100 * busy_s / now / len(replicas):.0f} %")
    accounts = [state.account for state in states if state.account is not None]
    if accounts:
        whole = sum(accounts, Account())
        parts = {
            "prefill": whole.prefill_s,
            "output": whole.output_s,
            "context": whole.context_s,
            "waste": whole.waste_s,
        }
        told = ", ".join(f"{name} {100 * s / busy_s:.1f} %" for name, s in (parts | {"slack": whole.slack_s}).items())
        print(f"of the busy time: {told}")


if __name__ == "__main__":
    main()
