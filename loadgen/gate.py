"""What a call passes before it is sent: the run's budget and its target's limits. Decided in budget.py; here calls wait and are let go."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal

from fanmark.agents.runtime import Drawn
from fanmark.loadgen.budget import (
    NOTHING,
    Cost,
    Entry,
    Failures,
    Limiter,
    Promise,
    Purse,
    planned_cost,
    real_cost,
    untold_cost,
    worst_case,
)
from fanmark.loadgen.crew import Crew
from fanmark.loadgen.demand import Demand, expected_tokens
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http import Sent
from fanmark.loadgen.lanes.sse import Usage
from fanmark.loadgen.records import Call
from fanmark.loadgen.scenario import Scenario
from fanmark.loadgen.users import Turn, expected_with, told_tokens

End = Callable[[Literal["budget", "errors"], str], None]  # (why, in one line): no new query starts


class Ticket:
    """One attempt that was let through. `usage` is for what its reply says that it cost."""

    def __init__(self, gate: "Gate", endpoint: Endpoint, worst: Cost, entry: Entry | None, sent: Sent) -> None:
        self.usage: Usage | None = None
        self._gate = gate
        self._endpoint = endpoint
        self._worst = worst
        self._entry = entry
        self._sent = sent

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.usage is not None:
            real = real_cost(self.usage, self._endpoint.config.prices)
        else:
            real = untold_cost(self._worst, self._sent.at is not None, error)
        self._gate.settle(self._worst, real, self._endpoint.name, self._entry)


class Gate:
    """Of one worker's run. `end` asks the run to end. Of a budget and of limits each worker has an even share."""

    def __init__(
        self,
        scenario: Scenario,
        endpoints: Mapping[str, Endpoint],
        now: Callable[[], float],
        time_scale: float,
        crew: Crew,
        end: End,
    ) -> None:
        self._now = now
        self._time_scale = time_scale
        self._end = end
        self._purse = Purse(scenario.budget, crew.index, crew.count) if scenario.budget is not None else None
        self._limiters = {
            name: Limiter(endpoint.config.limits, crew.index, crew.count)
            for name, endpoint in endpoints.items()
            if endpoint.config.limits is not None
        }
        self._over: str | None = None  # why no query begins any more
        self._turns = {name: asyncio.Lock() for name in endpoints}
        self._changed = asyncio.Event()
        share = float(scenario.load.abort_on_errors)
        self._failures = Failures(0.5 if scenario.load.abort_on_errors is True else share) if share else None

    async def begin(
        self, demand: Demand, drawn: Drawn, endpoints: Collection[Endpoint], told: Sequence[Turn] = ()
    ) -> Promise:
        """Waits until a query fits beside those that have begun, by its closed form, what is `drawn` for it, and the turns that are `told`
        again. Raises CallError of the class "budget" where it will not."""
        purse, planned = self._purse, NOTHING
        if purse is not None:
            planned = _planned(demand, drawn, endpoints, told)
            while (room := purse.room(planned, purse.promised)) != "now" or self._over is not None:
                if room == "never" or self._over is not None:
                    self._refuse(self._over or purse.told(planned))
                await self._change_within(math.inf)
        return Promise(purse, planned)

    def finish(self, promise: Promise) -> None:
        """A query has ended: what it did not take is for others."""
        promise.end()
        self._changed.set()

    def guards(self, endpoint: Endpoint) -> bool:
        """Whether calls to this target pass here at all."""
        return self._purse is not None or endpoint.name in self._limiters

    async def admit(
        self,
        endpoint: Endpoint,
        call: Call,
        body: Mapping[str, Any],
        prompt_tokens: Callable[[], Awaitable[int]],
        sent: Sent,
        promise: Promise,
    ) -> Ticket:
        """Waits until the call may go out; those to one target go in the order in which they came. The time is told in `limited_s`.
        Raises CallError of the class "budget" where it may not any more."""
        came_at = self._now()
        try:
            cost = worst_case(body, await prompt_tokens(), endpoint.config.prices)
            async with self._turns[endpoint.name]:
                while (wait_s := self._wait_s(endpoint, cost)) > 0:
                    await self._change_within(wait_s)
                if self._purse is not None:
                    promise.take(cost)
                    self._purse.hold(cost)
                limiter = self._limiters.get(endpoint.name)
                entry = limiter.admit(cost.tokens, self._now()) if limiter is not None else None
                return Ticket(self, endpoint, cost, entry, sent)
        finally:
            call.limited_s += self._now() - came_at

    def _wait_s(self, endpoint: Endpoint, cost: Cost) -> float:
        """Until the call may go out, if nothing else happens; inf: until another has ended."""
        limiter = self._limiters.get(endpoint.name)
        if limiter is not None and not limiter.fits(cost.tokens):
            self._refuse(
                f"limits of target {endpoint.name!r}: one call may take {cost.tokens:,} tokens, more than a minute may have"
            )
        room = self._purse.room(cost) if self._purse is not None else "now"
        if room == "never" and self._purse is not None:
            self._refuse(self._purse.told(cost))
        return math.inf if room == "later" else limiter.wait_s(cost.tokens, self._now()) if limiter is not None else 0.0

    def _refuse(self, why: str) -> None:
        self._over = self._over or why
        self._changed.set()
        self._end("budget", why)
        raise CallError("budget", why)

    async def _change_within(self, wait_s: float) -> None:
        """Sleeps so long, or until a call has ended."""
        self._changed.clear()
        try:
            async with asyncio.timeout(None if wait_s == math.inf else wait_s * self._time_scale):
                await self._changed.wait()
        except TimeoutError:
            pass

    def settle(self, worst: Cost, real: Cost, target: str, entry: Entry | None) -> None:
        """A call has ended: what it held is free, but for what it cost."""
        if self._purse is not None:
            self._purse.settle(worst, real)
        if entry is not None:
            self._limiters[target].settle(entry, real.tokens)
        self._changed.set()

    def ended(self, call: Call) -> None:
        """Told of every call at its last end. Those that others gave up, or that were not let through, say nothing of the server."""
        if self._failures is None or call.kind != "call" or call.error in ("cancelled", "budget"):
            return
        if self._failures.add(call.error):
            self._end("errors", self._failures.told(call.message or ""))


def _planned(demand: Demand, drawn: Drawn, endpoints: Collection[Endpoint], told: Sequence[Turn]) -> Cost:
    """What a query will cost by its closed form; nothing where there is none."""
    if demand.topology.expected is None:
        return NOTHING
    form = expected_with(demand.topology.expected(demand.params, drawn), told)
    tools = next((e.tool_part.size for e in endpoints if e.tool_part is not None), 0)
    written, read = expected_tokens(form, demand.lengths, {("tools",): tools or 0, **told_tokens(told)})
    return planned_cost(form.calls, read or 0, written, [e.config.prices for e in endpoints])
