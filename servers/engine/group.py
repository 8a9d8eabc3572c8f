"""Several replicas behind one door, with a replica's own interface: data parallelism without shared experts.

Engines that share their experts step together: that is one `Replica` with several engines, not a group.
"""

from collections.abc import Sequence

from fanmark.servers.engine.replica import Event, Replica, ReplicaStatistics
from fanmark.servers.engine.request import Request


class ReplicaGroup:
    """A request goes to the replica with the fewest unfinished ones; of equals, to the next in turn."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        if not replicas:
            raise ValueError("a group of no replicas: give at least one")
        self.replicas = list(replicas)
        self._place: dict[str, int] = {}
        self._next = 0

    def __len__(self) -> int:
        return sum(map(len, self.replicas))

    def add(self, request: Request, now: float) -> None:
        """As Replica.add; a replica's limits hold for it alone."""
        count = len(self.replicas)
        best = min(range(count), key=lambda i: (self.replicas[i].load, (i - self._next) % count))
        self.replicas[best].add(request, now)
        self._place[request.id] = best
        self._next = (best + 1) % count

    def abort(self, request_id: str, now: float) -> bool:
        place = self._place.pop(request_id, None)
        return place is not None and self.replicas[place].abort(request_id, now)

    def next_at(self) -> float | None:
        return min((at for at in (replica.next_at() for replica in self.replicas) if at is not None), default=None)

    def advance(self, until: float) -> list[Event]:
        events = [event for replica in self.replicas for event in replica.advance(until)]
        events.sort(key=lambda event: event.at)
        for event in events:
            if event.finished:
                self._place.pop(event.id, None)
        return events

    def statistics(self) -> ReplicaStatistics:
        """Sums over the replicas; the engines side by side."""
        parts = [replica.statistics() for replica in self.replicas]
        return ReplicaStatistics(
            engines=tuple(engine for part in parts for engine in part.engines),
            steps=sum(part.steps for part in parts),
            busy_s=sum(part.busy_s for part in parts),
            joules=sum(part.joules for part in parts),
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
