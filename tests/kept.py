"""A journal in memory: what a run without a folder writes to."""

from fanmark.loadgen.records import Begun, Query, Window


class Kept(list[Query]):
    """The journal: a list."""

    def begin(self, query: Begun) -> None:
        """Only what has ended is kept."""

    def window(self, window: Window) -> None:
        """There is none."""

    def write(self, query: Query) -> None:
        self.append(query)
