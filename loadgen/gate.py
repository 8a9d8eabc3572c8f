"""What a call passes before it is sent: the run's budget and its target's limits. Decided in budget.py; here calls wait and are let go."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import Any, Literal

from fanmark.loadgen.budget import Cost, Entry, Failures, Limiter, Purse, real_cost, untold_cost, worst_case
from fanmark.loadgen.crew import Crew
from fanmark.loadgen.endpoint import Endpoint
from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http import Sent
from fanmark.loadgen.lanes.sse import Usage
from fanmark.loadgen.records import Call
from fanmark.loadgen.scenario import Scenario

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
        self._turns = {name: asyncio.Lock() for name in endpoints}
        self._changed = asyncio.Event()
        share = float(scenario.load.abort_on_errors)
        self._failures = Failures(0.5 if scenario.load.abort_on_errors is True else share) if share else None

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
                    self._purse.hold(cost)
                limiter = self._limiters.get(endpoint.name)
                entry = limiter.admit(cost.tokens, self._now()) if limiter is not None else None
                return Ticket(self, endpoint, cost, entry, sent)
        finally:
            call.limited_s = self._now() - came_at

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
