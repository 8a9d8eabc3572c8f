"""Several replicas behind one door, with a replica's own interface: a service behind a router, or data parallelism without shared experts.

Engines that share their experts step together: that is one `Replica` with several engines, not a group.
"""

from collections.abc import Sequence
from math import inf

from fanmark.servers.engine.attribution import Account
from fanmark.servers.engine.events import Event, ReplicaStatistics
from fanmark.servers.engine.kv import HashChains
from fanmark.servers.engine.replica import Replica
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.routing import LEADING_TOKENS, Router


class ReplicaGroup:
    """`router` chooses by what it has sent and has not come back, as a router of real servers does; without one a request goes where least
    is to do, as vLLM's own balancer weighs it. A replica is run when something of it is due, not with every event of the others."""

    def __init__(self, replicas: "Sequence[Engine]", router: Router | None = None) -> None:
        if not replicas:
            raise ValueError("a group of no replicas: give at least one")
        self.replicas = list(replicas)
        self._weighed = router is None
        self._router = router or Router("least_loaded", len(replicas))
        self._chains = HashChains(LEADING_TOKENS) if self._router.policy == "prefix_affinity" else None
        self._place: dict[str, int] = {}
        self._sent = [0] * len(replicas)  # and not come back
        self._due_at: list[float] = [inf] * len(replicas)

    def __len__(self) -> int:
        return sum(map(len, self.replicas))

    @property
    def load(self) -> float:
        return sum(replica.load for replica in self.replicas)

    def add(self, request: Request, now: float) -> None:
        """As Replica.add; a replica's limits hold for it alone."""
        loads = [replica.load for replica in self.replicas] if self._weighed else self._sent
        leading = self._chains.of(request.prompt, request.salt) if self._chains is not None else ()
        best = self._router.choose(loads, request.session, leading)
        self.replicas[best].add(request, now)
        self._place[request.id] = best
        self._sent[best] += 1
        self._look(best)

    def abort(self, request_id: str, now: float) -> bool:
        place = self._place.pop(request_id, None)
        if place is None:
            return False
        self._sent[place] -= 1
        found = self.replicas[place].abort(request_id, now)
        self._look(place)
        return found

    def _look(self, place: int) -> None:
        due_at = self.replicas[place].next_at()
        self._due_at[place] = inf if due_at is None else due_at

    def next_at(self) -> float | None:
        due_at = min(self._due_at)
        return None if due_at == inf else due_at

    def advance(self, until: float) -> list[Event]:
        events: list[Event] = []
        for place, due_at in enumerate(self._due_at):
            if due_at <= until:
                events += self.replicas[place].advance(until)
                self._look(place)
        events.sort(key=lambda event: event.at)
        for event in events:
            if event.finished:
                self._sent[self._place.pop(event.id)] -= 1
        return events

    def statistics(self) -> ReplicaStatistics:
        """Sums over the replicas; the engines side by side."""
        parts = [replica.statistics() for replica in self.replicas]
        accounts = [part.account for part in parts if part.account is not None]
        return ReplicaStatistics(
            engines=tuple(engine for part in parts for engine in part.engines),
            steps=sum(part.steps for part in parts),
            busy_s=sum(part.busy_s for part in parts),
            joules=sum(part.joules for part in parts),
            account=sum(accounts, Account()) if accounts else None,
        )

    @property
    def slowdown(self) -> float:
        """The factor by which every step takes longer than the law says."""
        return self.replicas[0].slowdown

    @slowdown.setter
    def slowdown(self, factor: float) -> None:
        for replica in self.replicas:
            replica.slowdown = factor


Engine = Replica | ReplicaGroup
