"""What the scheduler takes and gives: its settings, a request's state in it, one step's batch and what comes out of a step."""

from dataclasses import dataclass
from typing import Literal

from fanmark.servers.engine.kv import Table, salt_root
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.step_time import BatchShape


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """vLLM's settings by vLLM's names. `num_blocks` counts the null block; `watermark` is a share of them kept free."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int = 16
    max_model_len: int = 131_072
    policy: Literal["fcfs", "priority"] = "fcfs"
    long_prefill_token_threshold: int = 0
    prefix_caching: bool = True
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    watermark: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give at least 1")
        if self.policy not in ("fcfs", "priority"):
            raise ValueError(f"policy = {self.policy!r}: give fcfs or priority")


class Rejected(Exception):
    """The queue is full: HTTP 503. `reason` is the name of the limit, as vLLM's counter labels it."""

    def __init__(self, reason: Literal["max_num_queued_reqs", "max_num_queued_tokens"]) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Statistics:
    """A scheduler at one moment. Tokens are counted as vLLM's counters count them: prompts when their first token is out."""

    running: int
    waiting: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int


@dataclass(frozen=True, slots=True)
class Output:
    """One token that came out of a step."""

    id: str
    index: int  # of the token in the request's output
    first: bool
    finished: bool
    cached_tokens: int
    preemptions: int


class Sequence:
    """A request inside the scheduler."""

    __slots__ = (
        "cached_tokens",
        "chain",
        "computed",
        "finished",
        "has_first",
        "id",
        "in_flight",
        "is_running",
        "last_tokens",
        "placeholders",
        "preemptions",
        "prompt_tokens",
        "rank",
        "request",
        "stale",
        "table",
        "tokens",
    )

    def __init__(self, request: Request, chain: list[int], max_model_len: int, number: int) -> None:
        self.request = request
        self.id = request.id
        self.chain = chain  # block hashes of its known tokens
        self.table = Table()
        self.rank = (request.priority, request.arrived_at, number)
        self.prompt_tokens = len(request.prompt)
        self.last_tokens = min(self.prompt_tokens + len(request.output), max_model_len)  # tokens known when it ends
        self.tokens = self.prompt_tokens  # known: prompt and output so far
        self.computed = 0  # in the KV cache, steps on their way included
        self.placeholders = 0  # tokens that steps on their way will bring
        self.in_flight = 0  # tokens computed by steps on their way
        self.stale = 0  # of these, scheduled before it was preempted
        self.cached_tokens = 0  # found in the prefix cache at its first admission
        self.preemptions = 0
        self.is_running = self.has_first = self.finished = False

    def extend_chain(self, block_size: int) -> None:
        """Hash the blocks that the output has filled."""
        chain, prompt, output = self.chain, self.request.prompt, self.request.output
        for at in range(len(chain) * block_size, self.tokens - block_size + 1, block_size):
            block = (*prompt[at : at + block_size], *output[max(0, at - len(prompt)) : at + block_size - len(prompt)])
            chain.append(hash((chain[-1] if chain else salt_root(self.request.salt), block)))


class Part:
    """One request's share of a batch."""

    __slots__ = ("decode", "samples", "sequence", "start", "tokens")

    def __init__(self, sequence: Sequence, start: int, tokens: int, decode: bool) -> None:
        self.sequence = sequence
        self.start = start  # tokens of it already in the KV cache
        self.tokens = tokens
        self.decode = decode
        self.samples = False  # a token comes out


class Batch:
    """One step, as scheduled."""

    __slots__ = ("cached", "kv_cache_usage", "parts", "preempted", "running", "waiting")

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.preempted: list[str] = []
        self.cached: dict[str, int] = {}  # tokens found in the prefix cache, by request admitted
        self.running = self.waiting = 0
        self.kv_cache_usage = 0.0

    def add(self, part: Part) -> None:
        self.parts.append(part)

    def remove(self, victim: Sequence) -> int:
        """Take a request that is preempted out again; the tokens it was to compute."""
        for i, part in enumerate(self.parts):
            if part.sequence is victim:
                del self.parts[i]
                return part.tokens
        return 0

    @property
    def scheduled(self) -> dict[str, int]:
        """Tokens to compute, by request."""
        return {part.sequence.id: part.tokens for part in self.parts}

    @property
    def shape(self) -> BatchShape:
        prefill = decode = context = 0
        pairs = 0.0
        for part in self.parts:
            if part.decode:
                decode += 1
                context += part.start + 1
            else:
                prefill += part.tokens
                pairs += part.tokens * (part.start + part.tokens / 2)
        return BatchShape(prefill, decode, context, pairs, len(self.parts))
