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

For speed, running requests that get a token in every step are members of `decoders` and cost nothing between block edges; the others
are `walkers`. `_schedule_together` decides a step where nobody can get in another's way; where it cannot, all become walkers and
`_schedule_one_by_one` follows the rules to the letter. The tests hold the two equal.
"""

from bisect import insort
from collections import deque
from operator import attrgetter

from fanmark.servers.engine.batch import Batch, EngineConfig, Output, Part, Rejected, Sequence, Statistics
from fanmark.servers.engine.decoders import Decoders
from fanmark.servers.engine.kv import HashChains, Hit, KVCache
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.step_time import BatchShape

_order = attrgetter("order")
_rank = attrgetter("rank")


class Scheduler:
    """One engine's queues, running requests and KV cache. Knows no time: its caller keeps the clock.

    `every_token`: `update` returns each token; else only first and last ones, which is faster.
    """

    def __init__(self, config: EngineConfig, *, every_token: bool = True) -> None:
        self.config = config
        self.kv = KVCache(config.num_blocks, prefix_caching=config.prefix_caching)
        self.running: list[Sequence] = []  # in order of admission
        self.waiting: deque[Sequence] = deque()  # "priority": sorted by Sequence.rank
        self.decoders = Decoders(config.block_size)
        self._walkers: list[Sequence] = []  # running requests that are not lazy, in order
        self._flights: deque[Batch] = deque()  # scheduled, result not handled
        self._number = self._handled = 0  # of the next batch; results handled
        self._lag = 0  # steps that were on their way when the last one was scheduled
        self._every_token = every_token
        self._sequences: dict[str, Sequence] = {}
        self._chains = HashChains(config.block_size)
        self._watermark_blocks = int(config.watermark * config.num_blocks)
        self._blocked: tuple[Sequence, int] | None = None  # head of the queue, and the free blocks that it lacks
        self._blocked_chain: set[int] = set()
        self._added = self._admitted = 0
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
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        if sequence.lazy:
            for batch in self._settle(sequence):
                _withdraw(batch, sequence)
        if not sequence.has_first:
            self._queued_tokens -= sequence.prompt_tokens
        self._drop(sequence)
        return True

    def _drop(self, sequence: Sequence) -> None:
        """Forget a request that is finished or aborted."""
        del self._sequences[sequence.id]
        sequence.finished = True
        if sequence.is_running:
            self.running.remove(sequence)
            if not sequence.lazy:
                self._walkers.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.kv.release(sequence.table)

    # One step

    def schedule(self) -> Batch | None:
        """Decide one step; None when nothing is computed and nobody preempted. A batch that only preempts is empty.

        At most two steps may be on their way: handle the result of the first before a third.
        """
        if len(self._flights) > 1:
            raise ValueError("two steps are on their way: update() the first of them before a third is scheduled")
        number = self._number
        batch = Batch(number)
        for sequence in self.decoders.ends.get(number - 1, ()):
            self.decoders.leave(sequence)
        budget = self._schedule_together(batch)
        if budget is None:
            self._settle_all()
            budget = self._schedule_one_by_one(batch, self.config.max_num_batched_tokens)
        lag, self._lag = self._lag, len(self._flights)
        if self.waiting and not batch.preempted:
            self._schedule_waiting(batch, budget)
        batch.running, batch.waiting, batch.kv_cache_usage = len(self.running), len(self.waiting), self.kv.usage
        if not len(batch):
            self._lag = lag
            return batch if batch.preempted else None
        for part in batch.parts:
            sequence = part.sequence
            sequence.computed += part.tokens
            sequence.in_flight += part.tokens
            if sequence.computed >= sequence.tokens + sequence.placeholders:
                sequence.placeholders += 1
                part.samples = True
                self._walkers.remove(sequence)
                self.decoders.join(sequence, number)
                if self._blocked and sequence.last_hash in self._blocked_chain:
                    self._blocked = None
        self._flights.append(batch)
        self._number += 1
        return batch

    def update(self, batch: Batch) -> list[Output]:
        """The step is done: the tokens that came out. Finished requests free their blocks. Steps end in the order of scheduling."""
        if not self._flights or self._flights[0] is not batch:
            raise ValueError(
                "this is not the oldest step on its way: steps end in the order in which they were scheduled"
            )
        self._flights.popleft()
        self._handled += 1
        self._generated += batch.decoders
        outputs: list[Output] = []
        last = self.decoders.ends.pop(batch.number, [])
        brought = list(batch.members) if self._every_token else last
        for part in batch.parts:
            if self._handle(part, batch.number) and not (part.sequence.lazy and part.sequence in brought):
                brought.append(part.sequence)
        brought.sort(key=_order)
        for sequence in brought:
            self._bring(sequence, batch.number, outputs)
        return outputs

    def _handle(self, part: Part, number: int) -> bool:
        """Account for a walker's share; whether a token came out."""
        sequence = part.sequence
        sequence.in_flight -= part.tokens
        stale = sequence.stale > 0
        if stale:
            sequence.stale -= part.tokens
        if not part.samples or sequence.finished:
            return False
        self._generated += 1
        if not sequence.lazy:
            sequence.tokens += 1
            sequence.note(number, number)
            if not stale:
                sequence.placeholders -= 1
            if sequence.is_running:
                self._commit(sequence, sequence.computed - sequence.placeholders)
        return True

    def _bring(self, sequence: Sequence, number: int, outputs: list[Output]) -> None:
        """A token of the sequence came out: the output, if anybody wants it."""
        known, first = sequence.known(self._handled), not sequence.has_first
        if first:
            sequence.has_first = True
            self._queued_tokens -= sequence.prompt_tokens
            self._prompt_tokens += sequence.prompt_tokens
        finished = known >= sequence.last_tokens
        if finished:
            if sequence.lazy:
                self._become_walker(sequence, known - 1)
            self._drop(sequence)
        elif not first and not self._every_token:
            return
        index = known - sequence.prompt_tokens - 1
        spans = sequence.spans if finished else []
        outputs.append(Output(sequence.id, index, first, finished, sequence.cached_tokens, sequence.preemptions, spans))

    # Many steps

    def ends_with(self, batch: Batch) -> bool:
        """Whether a request ends with this batch, as far as is known."""
        return bool(self.decoders.ends.get(batch.number)) or any(part.sequence.stale for part in batch.parts)

    def runway(self) -> int:
        """How many more steps, from the next on, are pure decode of the same requests: nobody comes, ends or is preempted.

        Unless something is added or aborted. 0 where it cannot be told.
        """
        decoders, number = self.decoders, self._number
        if self._walkers or not decoders.members or len(decoders.members) >= self.config.max_num_batched_tokens:
            return 0
        for batch in self._flights:
            if batch.parts or batch.number in decoders.ends:
                return 0
        if self.waiting and len(self.running) < self.config.max_num_seqs and not self._still_blocked():
            return 0
        return decoders.steps_with_blocks(number, decoders.first_end() - number + 1, self.kv.free)

    def run(self, steps: int) -> None:
        """Schedule `steps` steps of the runway and handle all results but the newest: as many as are on their way now, and one."""
        self._lag = len(self._flights)
        self.kv.take(self.decoders.blocks(self._number, steps))
        count = len(self.decoders.members)
        self._number += steps
        self._handled += steps - 1
        self._generated += count * (steps - 1)
        self._flights.clear()
        for number in range(self._number - 1 - self._lag, self._number):
            batch = Batch(number)
            batch.decoders = count
            if self._every_token:
                batch.members = list(self.decoders.members)
            self._flights.append(batch)

    @property
    def flights(self) -> tuple[Batch, ...]:
        """The steps on their way, oldest first."""
        return tuple(self._flights)

    @property
    def decode_shape(self) -> BatchShape:
        """The next step's make-up, if it is pure decode."""
        count = len(self.decoders.members)
        return BatchShape(0, count, self.decoders.context_tokens(self._number), 0.0, count)

    # Running requests

    def _long_prefill_limit(self) -> int:
        """Tokens that one request may compute in a step. A request alone has nobody to starve."""
        threshold = self.config.long_prefill_token_threshold
        return threshold if threshold and len(self) > 1 else self.config.max_num_batched_tokens

    def _schedule_together(self, batch: Batch) -> int | None:
        """The running requests' share where all get what they want, or only the last of them less. The budget left, else None."""
        decoders, number, size = self.decoders, batch.number, self.config.block_size
        budget = self.config.max_num_batched_tokens - len(decoders.members)
        edges = blocks = decoders.edges[number % size]
        if budget < 0:
            return None
        shares: list[tuple[Sequence, int, int]] = []
        for sequence in self._walkers:
            wanted = min(_wanted(sequence), self._long_prefill_limit())
            if wanted > budget:
                if self._decoder_behind(sequence):
                    return None
                wanted = budget
            if wanted:
                new = max(0, -(-(sequence.computed + wanted) // size) - sequence.table.blocks)
                shares.append((sequence, wanted, new))
                blocks += new
                budget -= wanted
        if blocks > self.kv.free:
            return None
        if decoders.members:
            if edges:
                self.kv.take(edges)
            batch.decoders = len(decoders.members)
            batch.context_tokens = decoders.context_tokens(number)
            if self._every_token:
                batch.members = list(decoders.members)
        for sequence, tokens, new in shares:
            self._give(batch, sequence, tokens, new)
        return budget

    def _decoder_behind(self, sequence: Sequence) -> bool:
        place = self.running.index(sequence)
        return any(other in self.decoders.members for other in self.running[place + 1 :])

    def _settle_all(self) -> None:
        """Make walkers of all running requests."""
        for sequence in self.running:
            if sequence.lazy:
                for batch in self._settle(sequence):
                    _withdraw(batch, sequence)
                    batch.parts.append(Part(sequence, sequence.offset + batch.number, 1, True, True))
                    sequence.in_flight += 1
        self._walkers = list(self.running)

    def _settle(self, sequence: Sequence) -> list[Batch]:
        """A lazy request stops being lazy, with the blocks and hashes that it has by now; the batches that count it as a decoder."""
        tokens = self._committed(sequence, self._number - 1)
        self._become_walker(sequence, tokens)
        return [batch for batch in self._flights if sequence.joined <= batch.number <= sequence.last]

    def _become_walker(self, sequence: Sequence, tokens: int) -> None:
        self.decoders.forget(sequence)
        self._fill(sequence, tokens // self.config.block_size, self._number - 1)
        sequence.settle(self._number, self._handled, self.config.block_size)
        self._walkers.append(sequence)

    def _committed(self, sequence: Sequence, number: int) -> int:
        """Tokens of a lazy request whose blocks have hashes once batch `number` is scheduled: those known by then."""
        return sequence.offset + min(number, sequence.last) + 1 - self._lag

    def _give(self, batch: Batch, sequence: Sequence, tokens: int, blocks: int) -> None:
        """A running request computes `tokens` in this batch and takes `blocks` new blocks for them."""
        decode = sequence.computed >= sequence.prompt_tokens and _wanted(sequence) == 1
        batch.parts.append(Part(sequence, sequence.computed, tokens, decode))
        self._take(sequence, blocks, sequence.computed + tokens)

    def _schedule_one_by_one(self, batch: Batch, budget: int) -> int:
        longest, at = self._long_prefill_limit(), 0
        while at < len(self.running) and budget > 0:
            sequence = self.running[at]
            tokens = min(_wanted(sequence), longest, budget)
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
            self._give(batch, sequence, tokens, blocks)
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
        self._walkers.remove(victim)
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
        config, size, longest = self.config, self.config.block_size, self._long_prefill_limit()
        skipped: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < config.max_num_seqs:
            sequence = self.waiting[0]
            if sequence.stale:  # a token of it is still on its way: one step later
                skipped.append(self.waiting.popleft())
                continue
            if self._still_blocked():
                break
            full = (sequence.tokens - 1) // size
            hit, settled = self._lookup(sequence, full)
            lacking = -(-sequence.tokens // size) - hit.blocks + hit.free
            lacking += self._watermark_blocks if self.running else 0
            if lacking > self.kv.free:
                if settled:
                    self._blocked, self._blocked_chain = (sequence, lacking), {*sequence.chain, sequence.root}
                break
            self._blocked = None
            self.waiting.popleft()
            computed = hit.blocks * size
            tokens = min(sequence.tokens - computed, longest, budget)
            self.kv.hold(sequence.table, hit)
            batch.cached[sequence.id] = sequence.computed = computed
            self._admit(sequence, computed)
            self._take(sequence, -(-(computed + tokens) // size) - hit.blocks, computed + tokens)
            batch.parts.append(Part(sequence, computed, tokens, False))
            budget -= tokens
        self.waiting.extendleft(reversed(skipped))

    def _lookup(self, sequence: Sequence, full: int) -> tuple[Hit, bool]:
        """Its longest cached prefix, of at most `full` blocks; and whether no running request may go on just where the hit ends."""
        if not self.config.prefix_caching:
            return self.kv.lookup((), 0), True
        chain = sequence.hashes(full, self.config.block_size)
        while True:
            hit = self.kv.lookup(chain, full)
            others = self.decoders.on_chain(chain, sequence.root, hit.blocks) if hit.blocks < full else []
            if not any([self._catch_up(other, self._number) for other in others]):
                return hit, not others

    def _catch_up(self, sequence: Sequence, number: int) -> bool:
        """Hash the blocks that a lazy request has filled once batch `number` is scheduled; whether there are any."""
        before = sequence.table.cached
        self._fill(sequence, self._committed(sequence, number) // self.config.block_size, number)
        self.decoders.lazy[sequence] = sequence.last_hash
        return sequence.table.cached > before

    def _still_blocked(self) -> bool:
        """Whether the head of the queue was found to lack blocks, and nothing has changed since that could help it."""
        blocked = self._blocked
        return bool(blocked and self.running and blocked[0] is self.waiting[0] and blocked[1] > self.kv.free)

    def _admit(self, sequence: Sequence, hits: int) -> None:
        self._admitted += 1
        sequence.order = self._admitted
        self.running.append(sequence)
        self._walkers.append(sequence)
        sequence.is_running = True
        if sequence.preemptions == 0:
            sequence.cached_tokens = hits
            self._queries += sequence.tokens
            self._hits += hits

    def _take(self, sequence: Sequence, blocks: int, tokens: int) -> None:
        """Blocks for `tokens` tokens; those that are full of known tokens get their hashes."""
        if blocks > 0:
            sequence.table.blocks += blocks
            self.kv.take(blocks)
        full = min(tokens, sequence.tokens) // self.config.block_size
        self._fill(sequence, full, self._number, scheduling=True)

    def _commit(self, sequence: Sequence, tokens: int) -> None:
        """A walker's first `tokens` tokens are computed and known: hash the blocks that are full."""
        self._fill(sequence, tokens // self.config.block_size, self._number - 1)

    def _fill(self, sequence: Sequence, full: int, number: int, *, scheduling: bool = False) -> None:
        """Hash the first `full` blocks of a request, after those of lazy ones that had the same before.

        Those have what they have once batch `number` is scheduled; while it is being scheduled, only those admitted before.
        """
        table = sequence.table
        if full <= table.cached or not self.config.prefix_caching:
            return
        chain = sequence.hashes(full, self.config.block_size)
        for other in self.decoders.on_chain(chain, sequence.root, full - 1):
            if other is not sequence and _was_before(other, sequence):
                self._catch_up(other, number - (scheduling and other.order > sequence.order))
        if self._blocked is not None and not self._blocked_chain.isdisjoint(chain[table.cached : full]):
            self._blocked = None  # the head of the queue may now hit what others hold
        self.kv.commit(table, chain, full)


def _was_before(other: Sequence, sequence: Sequence) -> bool:
    """Whether `other`, which is lazy, filled each block before `sequence` did, if they have the same ones."""
    if not sequence.lazy:
        return True
    return other.offset > sequence.offset or (other.offset == sequence.offset and other.order < sequence.order)


def _wanted(sequence: Sequence) -> int:
    """Tokens that a walker could compute now; none when its last token is on its way."""
    known = sequence.tokens + sequence.placeholders
    if sequence.placeholders and known >= sequence.last_tokens:
        return 0
    return known - sequence.computed


def _withdraw(batch: Batch, sequence: Sequence) -> None:
    """Take a decoder out of a batch on its way."""
    batch.decoders -= 1
    if sequence in batch.members:
        batch.members.remove(sequence)
