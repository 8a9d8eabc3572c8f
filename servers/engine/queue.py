"""The requests that wait for admission, and whom the queue refuses."""

from bisect import insort
from collections import deque
from collections.abc import Iterator
from operator import attrgetter

from fanmark.servers.engine.batch import EngineConfig, Rejected, Sequence

_rank = attrgetter("rank")


class WaitingQueue:
    """In order of arrival, a preempted request first; or, with the policy "priority", by (priority, arrival).

    `prefill_tokens`: prompt tokens of all requests without a first token, as vLLM's front end counts them: in full, until it is out.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._sorted = config.policy == "priority"
        self._line: deque[Sequence] = deque()
        self.prefill_tokens = 0

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line)

    @property
    def head(self) -> Sequence:
        return self._line[0]

    def check(self, unfinished: int, more_tokens: int) -> None:
        """Raise Rejected if a limit refuses one more request beside `unfinished` ones; `more_tokens`: prompts not counted yet."""
        limit = self._config.max_num_queued_reqs
        if limit is not None and unfinished + 1 > limit:
            raise Rejected("max_num_queued_reqs")
        limit = self._config.max_num_queued_tokens
        if limit is not None and self.prefill_tokens + more_tokens >= limit:
            raise Rejected("max_num_queued_tokens")

    def add(self, sequence: Sequence) -> None:
        """A new request."""
        self.prefill_tokens += sequence.prompt_tokens
        if self._sorted:
            insort(self._line, sequence, key=_rank)
        else:
            self._line.append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """A preempted request, or one that was popped too early."""
        if self._sorted:
            insort(self._line, sequence, key=_rank)
        else:
            self._line.appendleft(sequence)

    def pop(self) -> Sequence:
        return self._line.popleft()

    def remove(self, sequence: Sequence) -> None:
        self._line.remove(sequence)
