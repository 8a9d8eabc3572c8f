"""Deciders of what may still be sent: a budget, limits by the minute, and errors that are too many. Pure: time is an argument.

Rules of the file:
1. A call is held at its worst case before it is sent: its whole prompt as not cached, and every token that it may write. What it really
   cost takes the place of that when its reply is there. So spent + held never exceeds a cap, whatever is in flight.
2. What a call cost whose reply did not say is its worst case, unless it never went out or was refused.
3. What the calls of a query that has begun will cost by its closed form is promised to it, and no query begins on what is promised to
   others: so queries that have begun are answered, as far as the closed form knows their cost.
4. A call that fits only once others have given back what they hold waits for them; one that no longer fits at all is not sent.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from fanmark.loadgen.errors import CallError
from fanmark.loadgen.lanes.http import HttpError
from fanmark.loadgen.lanes.sse import Usage
from fanmark.loadgen.prices import Prices
from fanmark.loadgen.scenario import Budget, Limits

MINUTE_S = 60.0
LAST_CALLS = 20  # that abort_on_errors looks back at
_MOMENT_S = 1e-6  # waited on top, so that no rounding of the clock lets a call out too early
_ROUNDING = 1 + 1e-12  # sums of dollars are floats


class Cost(NamedTuple):
    """What one or several calls cost, or may cost."""

    calls: int = 0
    tokens: int = 0
    dollars: float = 0.0

    def plus(self, other: "Cost", sign: int = 1) -> "Cost":
        return Cost(
            self.calls + sign * other.calls,
            self.tokens + sign * other.tokens,
            self.dollars + sign * other.dollars,
        )

    def at_most(self, other: "Cost") -> "Cost":
        """The smaller of the two in each."""
        return Cost(min(self.calls, other.calls), min(self.tokens, other.tokens), min(self.dollars, other.dollars))


NOTHING = Cost()


def planned_cost(calls: int, read: int, written: int, prices: Iterable[Prices | None]) -> Cost:
    """What a query costs by its closed form, at the dearest of its targets' prices."""
    dollars = (worst_case({"max_tokens": written}, read, each).dollars for each in prices)
    return Cost(calls, read + written, max(dollars, default=0.0))


def worst_case(body: Mapping[str, Any], prompt_tokens: int, prices: Prices | None) -> Cost:
    """The most that a request can cost: nothing of its prompt cached, all that it may write written. Without prices no dollars."""
    most = int(body.get("max_completion_tokens") or body.get("max_tokens") or 0) * int(body.get("n") or 1)
    dollars = 0.0
    if prices is not None:
        uncached, cached = (prices.of_tokens(prompt_tokens, read, most) or 0.0 for read in (0, prompt_tokens))
        dollars = max(uncached, cached)
    return Cost(1, prompt_tokens + most, dollars)


def real_cost(usage: Usage, prices: Prices | None) -> Cost:
    """What a call cost by its own counts. A cached token has its own price only where there is one."""
    dollars = 0.0
    if prices is not None:
        details = usage.prompt_tokens_details
        cached = (details.cached_tokens or 0) if details is not None else 0
        dollars = prices.of_tokens(usage.prompt_tokens, cached, usage.completion_tokens) or 0.0
    return Cost(1, usage.prompt_tokens + usage.completion_tokens, dollars)


def untold_cost(worst: Cost, was_sent: bool, error: BaseException | None) -> Cost:
    """What to take for a call whose reply said no counts: nothing where it never went out or was refused before any work."""
    refused = isinstance(error, HttpError) and (error.status < 500 or error.status == 503)
    if not was_sent or refused or (isinstance(error, CallError) and error.kind == "connect"):
        return Cost(calls=1)
    return worst


class Purse:
    """A budget while it is spent. `part` of `of`: this worker's share of it, which is all that it may spend."""

    def __init__(self, caps: Budget, part: int = 0, of: int = 1) -> None:
        self._caps = {
            "calls": _part(caps.calls, part, of),
            "tokens": _part(caps.tokens, part, of),
            "dollars": math.inf if caps.dollars is None else caps.dollars / of,
        }
        self._shared = of > 1
        self.spent = Cost()
        self.held = Cost()
        self.promised = Cost()

    def room(self, cost: Cost, beside: Cost = NOTHING) -> Literal["now", "later", "never"]:
        """Whether a call of this cost, or a query, fits: at once, perhaps when others have ended, or not any more. `beside`: what is
        kept for others on top of what they hold. A call counts as one whatever it costs, so no calls are given back."""
        all_held = self.held.plus(beside)
        if self._beyond(self.spent.plus(Cost(calls=all_held.calls)).plus(cost)):
            return "never"
        return "later" if self._beyond(self.spent.plus(all_held).plus(cost)) else "now"

    def hold(self, cost: Cost) -> None:
        """Sets a call's worst case aside."""
        self.held = self.held.plus(cost)

    def settle(self, held: Cost, real: Cost) -> None:
        """What was set aside for a call is given back, and what it cost is spent."""
        self.held = self.held.plus(held, -1)
        self.spent = self.spent.plus(real)

    def told(self, cost: Cost) -> str:
        """Which cap a call of this cost would exceed."""
        name = self._beyond(self.spent.plus(cost)) or "calls"  # else those of others are what is left
        cap, spent, next_ = self._caps[name], getattr(self.spent, name), getattr(cost, name)
        mine = " (this worker's share)" if self._shared else ""
        aside = getattr(self.held.plus(self.promised), name)
        kept = f", {_amount(name, aside)} set aside for what is under way" if aside > 0 else ""
        return (
            f"[budget] {name} = {_amount(name, cap)}{mine} is reached: {_amount(name, spent)} spent{kept}, and the next "
            f"{'query' if cost.calls > 1 else 'call'} may take {_amount(name, next_)}"
        )

    def _beyond(self, cost: Cost) -> str | None:
        return next((name for name, cap in self._caps.items() if getattr(cost, name) > cap * _ROUNDING), None)


def _part(cap: int | None, part: int, of: int) -> float:
    return math.inf if cap is None else len(range(part, cap, of))


def _amount(name: str, value: float) -> str:
    return f"{value:.6g}" if name == "dollars" else f"{value:,.0f}"


class Promise:
    """What a query that has begun may still take of the purse."""

    def __init__(self, purse: Purse | None, planned: Cost) -> None:
        self._purse = purse
        self._left = planned
        if purse is not None:
            purse.promised = purse.promised.plus(planned)

    def take(self, cost: Cost) -> None:
        """One of its calls is let through: what it holds is promised no longer."""
        if self._purse is not None:
            taken = self._left.at_most(cost)
            self._left = self._left.plus(taken, -1)
            self._purse.promised = self._purse.promised.plus(taken, -1)

    def end(self) -> None:
        """The query has ended."""
        self.take(self._left)


class Entry:
    """One call in the last minute."""

    __slots__ = ("at", "tokens")

    def __init__(self, at: float, tokens: int) -> None:
        self.at = at
        self.tokens = tokens


class Limiter:
    """A target's limits: in no minute, wherever it begins, do more requests go out, or more tokens, than a minute may have."""

    def __init__(self, limits: Limits, part: int = 0, of: int = 1) -> None:
        self._requests = _part(limits.requests_per_minute, part, of)
        self._tokens = _part(limits.tokens_per_minute, part, of)
        self._calls = _part(limits.calls_in_flight, part, of)
        self._entries: deque[Entry] = deque()
        self._sum = 0
        self._in_flight = 0

    def fits(self, tokens: int) -> bool:
        """Whether a call of so many tokens can ever go out."""
        return tokens <= self._tokens

    def wait_s(self, tokens: int, now: float) -> float:
        """Seconds until a call of so many tokens may go out, if nothing else happens: 0 at once, inf when another has ended."""
        while self._entries and self._entries[0].at + MINUTE_S <= now:
            self._sum -= self._entries.popleft().tokens
        if self._in_flight >= self._calls:
            return math.inf
        over_requests = len(self._entries) + 1 - self._requests
        over_tokens = self._sum + tokens - self._tokens
        if over_requests <= 0 and over_tokens <= 0:
            return 0.0
        for n, entry in enumerate(self._entries, start=1):
            over_tokens -= entry.tokens
            if n >= over_requests and over_tokens <= 0:
                return entry.at + MINUTE_S - now + _MOMENT_S
        return math.inf

    def admit(self, tokens: int, now: float) -> Entry:
        """A call goes out."""
        entry = Entry(now, tokens)
        self._entries.append(entry)
        self._sum += tokens
        self._in_flight += 1
        return entry

    def settle(self, entry: Entry, tokens: int) -> None:
        """It has ended, with so many tokens."""
        self._in_flight -= 1
        if self._entries and entry.at >= self._entries[0].at:
            self._sum += tokens - entry.tokens
        entry.tokens = tokens


class Failures:
    """How many of the last calls failed. `share` of them is too many."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._last: deque[str | None] = deque(maxlen=LAST_CALLS)

    def add(self, error: str | None) -> bool:
        """One more call has ended, with this class of error or None. Whether that makes too many."""
        self._last.append(error)
        failed = LAST_CALLS - self._last.count(None)
        return len(self._last) == LAST_CALLS and failed >= self._share * LAST_CALLS

    def told(self, last: str) -> str:
        """Which they were; `last` is what the last of them said."""
        kinds = Counter(kind for kind in self._last if kind is not None)
        classes = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
        said = " ".join(last.split())[:200]
        return (
            f"{kinds.total()} of the last {LAST_CALLS} calls failed ({classes}; the last: {said}): [load] abort_on_errors = "
            f"{self._share:g} ends the run"
        )
