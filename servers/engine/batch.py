"""What the scheduler takes and gives: its settings, a request's state in it, one step's batch and what comes out of a step."""

from dataclasses import dataclass
from typing import Literal

from fanmark.servers.engine.kv import Table, chained, salt_root
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

    def longest_share(self, unfinished: int) -> int:
        """Tokens that one of so many requests may compute in a step. A request alone has nobody to starve."""
        threshold = self.long_prefill_token_threshold
        return threshold if threshold and unfinished > 1 else self.max_num_batched_tokens


def check_size(request: Request, config: EngineConfig) -> None:
    """ValueError for a request that could never be served."""
    if not request.prompt or not request.output:
        raise ValueError(f"request {request.id}: prompt and output need at least one token each")
    if len(request.prompt) >= config.max_model_len:
        raise ValueError(
            f"request {request.id}: {len(request.prompt)} prompt tokens, max_model_len is {config.max_model_len}: "
            "shorten the prompt"
        )
    tokens = min(len(request.prompt) + len(request.output), config.max_model_len) - 1
    blocks, total = -(-tokens // config.block_size), config.num_blocks - 1
    if blocks > total:
        raise ValueError(
            f"request {request.id}: {tokens} tokens of context need {blocks} KV blocks, there are {total}: "
            "shorten it or give more blocks"
        )


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
    spans: list[tuple[int, int]]  # when finished: the batches that brought its tokens (first, last)


class Sequence:
    """A request inside the scheduler. While it is `lazy`, decoders.py's counters stand for tokens, computed and placeholders."""

    __slots__ = (
        "base",
        "cached_tokens",
        "chain",
        "computed",
        "finished",
        "has_first",
        "id",
        "in_flight",
        "is_running",
        "joined",
        "last",
        "last_tokens",
        "lazy",
        "offset",
        "order",
        "placeholders",
        "preemptions",
        "prompt_tokens",
        "rank",
        "request",
        "root",
        "since",
        "spans",
        "stale",
        "table",
        "tokens",
    )

    def __init__(self, request: Request, chain: list[int], max_model_len: int, number: int) -> None:
        self.request = request
        self.id = request.id
        self.root = salt_root(request.salt)  # what the first block's hash goes on from
        self.chain = chain  # block hashes, of the prompt and as far into the output as was needed
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
        self.order = 0  # of its admission
        self.spans: list[tuple[int, int]] = []  # batches that brought it tokens: first, last
        self.is_running = self.has_first = self.finished = self.lazy = False
        self.base = self.since = self.joined = self.offset = self.last = 0

    @property
    def last_hash(self) -> int:
        """The hash of its last block that has one; of the salt if none has."""
        cached = self.table.cached
        return self.chain[cached - 1] if cached else self.root

    @property
    def wanted(self) -> int:
        """Tokens that it could compute now, unless it is lazy; none when its last token is on its way."""
        known = self.tokens + self.placeholders
        return 0 if self.placeholders and known >= self.last_tokens else known - self.computed

    def known(self, handled: int) -> int:
        """Tokens known when the results of `handled` batches are in."""
        return self.base + max(0, handled - self.since) if self.lazy else self.tokens

    def settle(self, number: int, handled: int, block_size: int) -> None:
        """Stop being lazy: `number` is that of the next batch."""
        done = min(number, self.last + 1)
        self.table.blocks = -(-(self.offset + done) // block_size)
        self.tokens = self.known(handled)
        self.computed = self.offset + done
        self.placeholders = done - max(handled, self.since)
        self.lazy = False
        if handled > self.since:
            self.note(self.since, handled - 1)

    def note(self, first: int, last: int) -> None:
        """Batches `first` to `last` brought a token each."""
        if self.spans and self.spans[-1][1] == first - 1:
            first = self.spans.pop()[0]
        self.spans.append((first, last))

    def hashes(self, blocks: int, block_size: int) -> list[int]:
        """The chain, of at least its first `blocks` blocks."""
        chain = self.chain
        if len(chain) < blocks:
            start, prompt = len(chain) * block_size, self.request.prompt
            output = self.request.output[max(0, start - len(prompt)) : blocks * block_size - len(prompt)]
            tokens = (*prompt[start:], *output) if start < len(prompt) else output
            chain += chained(chain[-1] if chain else self.root, tokens, block_size)
        return chain


class Part:
    """One request's share of a batch."""

    __slots__ = ("decode", "samples", "sequence", "start", "tokens")

    def __init__(self, sequence: Sequence, start: int, tokens: int, decode: bool, samples: bool = False) -> None:
        self.sequence = sequence
        self.start = start  # tokens of it already in the KV cache
        self.tokens = tokens
        self.decode = decode
        self.samples = samples  # a token comes out


class Batch:
    """One step, as scheduled: `parts`, and one token for each of `decoders` (counted; named only if every token is asked for)."""

    __slots__ = (
        "cached",
        "context_tokens",
        "decoders",
        "members",
        "number",
        "parts",
        "preempted",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.parts: list[Part] = []
        self.decoders = 0
        self.members: list[Sequence] = []
        self.context_tokens = 0  # of the decoders
        self.preempted: list[str] = []
        self.cached: dict[str, int] = {}  # tokens found in the prefix cache, by request admitted

    def __len__(self) -> int:
        """Requests that it computes tokens of."""
        return len(self.parts) + self.decoders

    def remove(self, victim: Sequence) -> int:
        """Take a request that is preempted out again; the tokens it was to compute."""
        for i, part in enumerate(self.parts):
            if part.sequence is victim:
                del self.parts[i]
                return part.tokens
        return 0

    def withdraw(self, decoder: Sequence) -> None:
        """Count a decoder no longer."""
        self.decoders -= 1
        if decoder in self.members:
            self.members.remove(decoder)

    @property
    def scheduled(self) -> dict[str, int]:
        """Tokens to compute, by request; as scheduled, and only of a scheduler that is asked for every token."""
        return dict.fromkeys((member.id for member in self.members), 1) | {
            part.sequence.id: part.tokens for part in self.parts
        }

    @property
    def shape(self) -> BatchShape:
        """The make-up that its time depends on. A context counts the token being computed."""
        prefill, decode, context = 0, self.decoders, self.context_tokens
        pairs = 0.0
        for part in self.parts:
            if part.decode:
                decode += 1
                context += part.start + 1
            else:
                prefill += part.tokens
                pairs += part.tokens * (part.start + part.tokens / 2)
        return BatchShape(prefill, decode, context, pairs, len(self))
