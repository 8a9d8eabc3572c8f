"""Which replica takes a request: policies that know what a router in front of servers can know. Pure.

Rules of the file:
1. A load is the number of requests that a replica has and has not finished. Of equal ones the next in turn is the least.
2. Affinity by session: the same session, the same replica, by a hash that is the same in every process.
3. Affinity by prefix: to the replica that was last sent the longest known prefix of the prompt, where that is half of it at least;
   the others, and those whose replica is overloaded, go to the least loaded. Who is told a prompt will have it cached.
4. What a router remembers is bounded; the oldest is forgotten first.
"""

from collections.abc import Sequence
from typing import Literal, get_args
from zlib import crc32

Policy = Literal["round_robin", "least_loaded", "session_affinity", "prefix_affinity"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
LEADING_TOKENS = 64  # a prompt's prefixes are told apart in pieces of so many tokens
_REMEMBERED = 200_000
_SHARE = 0.5
_OVERLOADED, _OVERLOADED_BY = 2.0, 8  # times the least load, and so many above it


class Router:
    """Chooses among `replicas` servers. `leading`: hashes of the prompt's leading pieces, each over all before it."""

    def __init__(self, policy: Policy, replicas: int) -> None:
        self.policy, self.replicas = policy, replicas
        self._next = 0
        self._known: dict[int, int] = {}  # the hash of a prefix: the replica that was last sent it

    def choose(self, loads: Sequence[float], session: str = "", leading: Sequence[int] = ()) -> int:
        """The replica for a request that is sent now."""
        if self.policy == "session_affinity" and session:
            return crc32(session.encode()) % self.replicas
        if self.policy == "round_robin":
            return self._take(self._next)
        if self.policy == "prefix_affinity":
            return self._by_prefix(loads, leading)
        return self._least(loads)

    def _take(self, place: int) -> int:
        self._next = (place + 1) % self.replicas
        return place

    def _least(self, loads: Sequence[float]) -> int:
        least = min(loads)
        if loads[self._next] == least:
            return self._take(self._next)
        return self._take(min(range(self.replicas), key=lambda i: (loads[i], (i - self._next) % self.replicas)))

    def _by_prefix(self, loads: Sequence[float], leading: Sequence[int]) -> int:
        known, place = 0, None
        for piece in leading:
            sent = self._known.get(piece)
            if sent is None:
                break
            known, place = known + 1, sent
        least = min(loads)
        if place is None or known < _SHARE * len(leading) or loads[place] > _OVERLOADED * least + _OVERLOADED_BY:
            place = self._least(loads)
        for piece in leading:
            self._known.pop(piece, None)
            self._known[piece] = place
        for piece in list(self._known)[: max(0, len(self._known) - _REMEMBERED)]:
            del self._known[piece]
        return place
