"""Which request computes how many tokens in which step: vLLM's V1 scheduler.

Rules of the file (vLLM 0.32; recordings of it are replayed in the tests):
1. There is no prefill or decode phase: each request has tokens known and tokens computed, and a step lets it catch up.
2. Running requests come first, in order of admission; then the waiting ones, the head only, and only if nothing was preempted.
3. A request is admitted only if the blocks of all its known tokens are free (hits that others hold cost nothing).
4. No block left: "fcfs" preempts the request admitted last, "priority" the one with the largest (priority, arrival). It loses its
   blocks, computes all over, and stands first in the queue again ("priority": at its place).
5. A step may be scheduled before the results of the step before are in (asynchronous scheduling): then a token is a placeholder
   until `update` hears of it. `schedule, update, schedule, ...` is synchronous, `schedule, schedule, update, ...` asynchronous.
6. Tokens come out at the end of a step: `update` returns them, `schedule` never does.
"""

from bisect import insort
from collections import deque

from fanmark.servers.engine.batch import Batch, EngineConfig, Output, Part, Rejected, Sequence, Statistics
from fanmark.servers.engine.kv import HashChains, KVCache
from fanmark.servers.engine.request import Request


class Scheduler:
    """One engine's queues, running requests and KV cache. Knows no time: its caller keeps the clock."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.kv = KVCache(config.num_blocks, prefix_caching=config.prefix_caching)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()  # "priority": sorted by Sequence.rank
        self._sequences: dict[str, Sequence] = {}
        self._chains = HashChains(config.block_size)
        self._watermark_blocks = int(config.watermark * config.num_blocks)
        self._added = 0
        self._queued_tokens = 0  # prompt tokens of requests without a first token
        self._preemptions = self._queries = self._hits = self._prompt_tokens = self._generated = 0

    def __repr__(self) -> str:
        return f"<Scheduler {len(self.running)} running, {len(self.waiting)} waiting, {self.kv!r}>"

    def __len__(self) -> int:
        """Requests that are not finished."""
        return len(self._sequences)

    def statistics(self) -> Statistics:
        return Statistics(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_cache_usage=self.kv.usage,
            prefix_cache_queries=self._queries,
            prefix_cache_hits=self._hits,
            num_preemptions=self._preemptions,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generated,
        )

    # Requests come and go

    def check(self, request: Request, *, more_requests: int = 0, more_tokens: int = 0) -> None:
        """Refuse what cannot be served: Rejected when a queue limit is reached, ValueError when it could never fit.

        `more_*`: requests, and prompt tokens of them, that are on their way to `add`.
        """
        config, size = self.config, self.config.block_size
        if not request.prompt or not request.output:
            raise ValueError(f"request {request.id}: prompt and output need at least one token each")
        if len(request.prompt) >= config.max_model_len:
            raise ValueError(
                f"request {request.id}: {len(request.prompt)} prompt tokens, max_model_len is {config.max_model_len}: "
                "shorten the prompt"
            )
        tokens = min(len(request.prompt) + len(request.output), config.max_model_len) - 1
        if -(-tokens // size) > self.kv.total:
            raise ValueError(
                f"request {request.id}: {tokens} tokens of context need {-(-tokens // size)} KV blocks, there are "
                f"{self.kv.total}: shorten it or give more blocks"
            )
        limit = config.max_num_queued_reqs
        if limit is not None and len(self) + more_requests + 1 > limit:
            raise Rejected("max_num_queued_reqs")
        limit = config.max_num_queued_tokens
        if limit is not None and self._queued_tokens + more_tokens >= limit:
            raise Rejected("max_num_queued_tokens")

    def add(self, request: Request) -> None:
        """Queue a request. Raises what `check` raises, and ValueError for an id that is in use."""
        self.check(request)
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """Queue a request that `check` has let pass."""
        if request.id in self._sequences:
            raise ValueError(f"request id {request.id} is in use: ids are unique among unfinished requests")
        chain = self._chains.of(request.prompt, request.salt) if self.config.prefix_caching else []
        self._added += 1
        sequence = Sequence(request, chain, self.config.max_model_len, self._added)
        self._sequences[request.id] = sequence
        self._queued_tokens += sequence.prompt_tokens
        if self.config.policy == "priority":
            insort(self.waiting, sequence, key=_rank)
        else:
            self.waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks. False if it is not there (any more)."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        sequence.finished = True
        (self.running if sequence.is_running else self.waiting).remove(sequence)
        self.kv.release(sequence.table)
        if not sequence.has_first:
            self._queued_tokens -= sequence.prompt_tokens
        return True

    # One step

    def schedule(self) -> Batch | None:
        """Decide one step; None when nothing is computed and nobody preempted. A batch that only preempts has no parts."""
        batch = Batch()
        budget = self._schedule_running(batch, self.config.max_num_batched_tokens)
        if not batch.preempted:
            self._schedule_waiting(batch, budget)
        batch.running, batch.waiting, batch.kv_cache_usage = len(self.running), len(self.waiting), self.kv.usage
        if not batch.parts and not batch.preempted:
            return None
        for part in batch.parts:
            sequence = part.sequence
            sequence.computed += part.tokens
            sequence.in_flight += part.tokens
            if sequence.computed >= sequence.tokens + sequence.placeholders:
                sequence.placeholders += 1
                part.samples = True
        return batch

    def update(self, batch: Batch) -> list[Output]:
        """The step is done: the tokens that came out, in the batch's order. Finished requests free their blocks."""
        outputs = []
        for part in batch.parts:
            sequence = part.sequence
            sequence.in_flight -= part.tokens
            stale = sequence.stale > 0
            if stale:
                sequence.stale -= part.tokens
            if not part.samples or sequence.finished:
                continue
            sequence.tokens += 1
            if not stale:
                sequence.placeholders -= 1
            if sequence.is_running:
                self._commit(sequence, sequence.computed - sequence.placeholders)
            outputs.append(self._output(sequence))
        return outputs

    def _output(self, sequence: Sequence) -> Output:
        self._generated += 1
        first = not sequence.has_first
        if first:
            sequence.has_first = True
            self._queued_tokens -= sequence.prompt_tokens
            self._prompt_tokens += sequence.prompt_tokens
        finished = sequence.tokens >= sequence.last_tokens
        if finished:
            self.abort(sequence.id)
        index = sequence.tokens - sequence.prompt_tokens - 1
        return Output(sequence.id, index, first, finished, sequence.cached_tokens, sequence.preemptions)

    # Running requests

    def _long_prefill_limit(self) -> int:
        """Tokens that one request may compute in a step. A request alone has nobody to starve."""
        threshold = self.config.long_prefill_token_threshold
        return threshold if threshold and len(self) > 1 else self.config.max_num_batched_tokens

    def _schedule_running(self, batch: Batch, budget: int) -> int:
        longest, at = self._long_prefill_limit(), 0
        while at < len(self.running) and budget > 0:
            sequence = self.running[at]
            wanted = sequence.tokens + sequence.placeholders - sequence.computed
            if sequence.tokens + sequence.placeholders >= sequence.last_tokens and sequence.placeholders:
                wanted = 0  # its last token is on its way
            tokens = min(wanted, longest, budget)
            if tokens == 0:
                at += 1
                continue
            blocks = -(-(sequence.computed + tokens) // self.config.block_size) - sequence.table.blocks
            while blocks > self.kv.free:
                victim, place = self._victim()
                if place < at:
                    at -= 1
                budget += batch.remove(victim)
                self._preempt(victim)
                batch.preempted.append(victim.id)
                if victim is sequence:
                    return budget
            decode = sequence.computed >= sequence.prompt_tokens and wanted == 1
            batch.add(Part(sequence, sequence.computed, tokens, decode))
            self._take(sequence, blocks, sequence.computed + tokens)
            budget -= tokens
            at += 1
        return budget

    def _victim(self) -> tuple[Sequence, int]:
        place = len(self.running) - 1
        if self.config.policy == "priority":
            # Of equals, the one admitted first, as a maximum over the list gives it
            place = max(range(len(self.running)), key=lambda i: (*self.running[i].rank[:2], -i))
        return self.running.pop(place), place

    def _preempt(self, victim: Sequence) -> None:
        self.kv.release(victim.table)
        victim.is_running = False
        victim.computed = victim.placeholders = 0
        victim.stale = victim.in_flight  # results on their way still count, but not against what is computed
        victim.preemptions += 1
        self._preemptions += 1
        if self.config.policy == "priority":
            insort(self.waiting, victim, key=_rank)
        else:
            self.waiting.appendleft(victim)

    # Waiting requests

    def _schedule_waiting(self, batch: Batch, budget: int) -> None:
        config, longest = self.config, self._long_prefill_limit()
        skipped: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < config.max_num_seqs:
            sequence = self.waiting[0]
            if sequence.stale:  # a token of it is still on its way: one step later
                skipped.append(self.waiting.popleft())
                continue
            sequence.extend_chain(config.block_size)
            hit = self.kv.lookup(sequence.chain, (sequence.tokens - 1) // config.block_size)
            need = -(-sequence.tokens // config.block_size) - hit.blocks + hit.free
            if need + (self._watermark_blocks if self.running else 0) > self.kv.free:
                break
            self.waiting.popleft()
            computed = hit.blocks * config.block_size
            tokens = min(sequence.tokens - computed, longest, budget)
            self.kv.hold(sequence.table, hit)
            batch.cached[sequence.id] = sequence.computed = computed
            self._admit(sequence, computed)
            self._take(sequence, -(-(computed + tokens) // config.block_size) - hit.blocks, computed + tokens)
            batch.add(Part(sequence, computed, tokens, False))
            budget -= tokens
        self.waiting.extendleft(reversed(skipped))

    def _admit(self, sequence: Sequence, hits: int) -> None:
        self.running.append(sequence)
        sequence.is_running = True
        if sequence.preemptions == 0:
            sequence.cached_tokens = hits
            self._queries += sequence.tokens
            self._hits += hits

    def _take(self, sequence: Sequence, blocks: int, tokens: int) -> None:
        """Blocks for `tokens` tokens; those that are full of known tokens get their hashes."""
        if blocks > 0:
            self.kv.grow(sequence.table, blocks)
        self._commit(sequence, min(tokens, sequence.tokens))

    def _commit(self, sequence: Sequence, tokens: int) -> None:
        full = tokens // self.config.block_size
        if full > sequence.table.cached and self.config.prefix_caching:
            sequence.extend_chain(self.config.block_size)
            self.kv.commit(sequence.table, sequence.chain, full)


def _rank(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.rank
