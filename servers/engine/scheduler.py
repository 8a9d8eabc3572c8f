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

from collections import deque
from operator import attrgetter

from fanmark.servers.engine.batch import Batch, EngineConfig, Output, Part, Sequence, Statistics, check_size
from fanmark.servers.engine.ledger import Ledger
from fanmark.servers.engine.queue import WaitingQueue
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.step_time import BatchShape

_order = attrgetter("order")


class Scheduler:
    """One engine's queues, running requests and KV cache. Knows no time: its caller keeps the clock.

    `every_token`: `update` returns each token; else only first and last ones, which is faster.
    """

    def __init__(self, config: EngineConfig, *, every_token: bool = True) -> None:
        self.config = config
        self._ledger = Ledger(config)
        self.kv = self._ledger.kv
        self.running: list[Sequence] = []  # in order of admission
        self.waiting = WaitingQueue(config)
        self.decoders = self._ledger.decoders
        self._walkers: list[Sequence] = []  # running requests that are not lazy, in order
        self._flights: deque[Batch] = deque()  # scheduled, result not handled
        self._number = self._handled = 0  # of the next batch; results handled
        self._every_token = every_token
        self._sequences: dict[str, Sequence] = {}
        self._watermark_blocks = int(config.watermark * config.num_blocks)
        self._added = self._admitted = 0
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

    def check(self, request: Request, *, more_requests: int = 0, more_tokens: int = 0) -> None:
        """Refuse what cannot be served: Rejected when a queue limit is reached, ValueError when it could never fit.

        `more_*`: requests, and prompt tokens of them, that are on their way to `add`.
        """
        check_size(request, self.config)
        self.waiting.check(len(self) + more_requests, more_tokens)

    def add(self, request: Request) -> None:
        """Queue a request. Raises what `check` raises, and ValueError for an id that is in use."""
        self.check(request)
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """Queue a request that `check` has let pass."""
        if request.id in self._sequences:
            raise ValueError(f"request id {request.id} is in use: ids are unique among unfinished requests")
        self._added += 1
        sequence = Sequence(request, self._ledger.chain(request), self.config.max_model_len, self._added)
        self._sequences[request.id] = sequence
        self.waiting.add(sequence)

    def abort(self, request_id: str) -> bool:
        """Drop a request and free its blocks. False if it is not there (any more)."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        if sequence.lazy:
            self._settle(sequence)
        if not sequence.has_first:
            self.waiting.prefill_tokens -= sequence.prompt_tokens
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
        lag, self._ledger.lag = self._ledger.lag, len(self._flights)
        if self.waiting and not batch.preempted:
            self._schedule_waiting(batch, budget)
        if not len(batch):
            self._ledger.lag = lag
            return batch if batch.preempted else None
        for part in batch.parts:
            sequence = part.sequence
            sequence.computed += part.tokens
            sequence.in_flight += part.tokens
            if sequence.computed >= sequence.tokens + sequence.placeholders:
                sequence.placeholders += 1
                part.samples = True
                self._walkers.remove(sequence)
                self._ledger.join(sequence, number)
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
                self._ledger.fill(sequence, sequence.computed - sequence.placeholders, self._number - 1)
        return True

    def _bring(self, sequence: Sequence, number: int, outputs: list[Output]) -> None:
        """A token of the sequence came out: the output, if anybody wants it."""
        known, first = sequence.known(self._handled), not sequence.has_first
        if first:
            sequence.has_first = True
            self.waiting.prefill_tokens -= sequence.prompt_tokens
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
        full = len(self.running) >= self.config.max_num_seqs
        if self.waiting and not full and not self._ledger.still_blocked(self.waiting.head):
            return 0
        return decoders.steps_with_blocks(number, decoders.first_end() - number + 1, self.kv.free)

    def run(self, steps: int) -> tuple[Batch, ...]:
        """Schedule `steps` steps of the runway and handle all results but the newest: as many as are on their way now, and one.

        Returns those.
        """
        flights = self._ledger.lag = len(self._flights)
        self.kv.take(self.decoders.blocks(self._number, steps))
        count = len(self.decoders.members)
        self._number += steps
        self._handled += steps - 1
        self._generated += count * (steps - 1)
        self._flights.clear()
        for number in range(self._number - 1 - flights, self._number):
            batch = Batch(number)
            batch.decoders = count
            if self._every_token:
                batch.members = list(self.decoders.members)
            self._flights.append(batch)
        return tuple(self._flights)

    @property
    def decode_shape(self) -> BatchShape:
        """The next step's make-up, if it is pure decode."""
        return self.decoders.shape(self._number)

    # Running requests

    def _schedule_together(self, batch: Batch) -> int | None:
        """The running requests' share where all get what they want, or only the last of them less. The budget left, else None."""
        decoders, number, size = self.decoders, batch.number, self.config.block_size
        budget = self.config.max_num_batched_tokens - len(decoders.members)
        edges = blocks = decoders.edges[number % size]
        if budget < 0:
            return None
        shares: list[tuple[Sequence, int, int]] = []
        for sequence in self._walkers:
            wanted = min(sequence.wanted, self.config.longest_share(len(self)))
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
            batch.decoders, batch.context_tokens = decoders.shape(number)[1:3]
            if self._every_token:
                batch.members = list(decoders.members)
        for sequence, tokens, new in shares:
            self._give(batch, sequence, tokens, new)
        return budget

    def _decoder_behind(self, sequence: Sequence) -> bool:
        return any(other.order > sequence.order for other in self.decoders.members)

    def _settle_all(self) -> None:
        """Make walkers of all running requests."""
        for sequence in self.running:
            if sequence.lazy:
                for batch in self._settle(sequence):
                    batch.parts.append(Part(sequence, sequence.offset + batch.number, 1, True, True))
                    sequence.in_flight += 1
        self._walkers = list(self.running)

    def _settle(self, sequence: Sequence) -> list[Batch]:
        """A lazy request stops being lazy, with the blocks and hashes that it has by now; the batches that counted it, no longer."""
        self._become_walker(sequence, self._ledger.committed(sequence, self._number - 1))
        batches = [batch for batch in self._flights if sequence.joined <= batch.number <= sequence.last]
        for batch in batches:
            batch.withdraw(sequence)
        return batches

    def _become_walker(self, sequence: Sequence, tokens: int) -> None:
        """Stop being lazy with `tokens` tokens in hashed blocks."""
        self.decoders.forget(sequence)
        self._ledger.fill(sequence, tokens, self._number - 1)
        sequence.settle(self._number, self._handled, self.config.block_size)
        self._walkers.append(sequence)

    def _give(self, batch: Batch, sequence: Sequence, tokens: int, blocks: int) -> None:
        """A running request computes `tokens` in this batch and takes `blocks` new blocks for them."""
        decode = sequence.computed >= sequence.prompt_tokens and sequence.wanted == 1
        batch.parts.append(Part(sequence, sequence.computed, tokens, decode))
        self._ledger.take(sequence, blocks, sequence.computed + tokens, self._number)

    def _schedule_one_by_one(self, batch: Batch, budget: int) -> int:
        longest, at = self.config.longest_share(len(self)), 0
        while at < len(self.running) and budget > 0:
            sequence = self.running[at]
            tokens = min(sequence.wanted, longest, budget)
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
        self.waiting.put_back(victim)

    # Waiting requests

    def _schedule_waiting(self, batch: Batch, budget: int) -> None:
        config, size, longest = self.config, self.config.block_size, self.config.longest_share(len(self))
        skipped: list[Sequence] = []
        while self.waiting and budget > 0 and len(self.running) < config.max_num_seqs:
            sequence = self.waiting.head
            if sequence.stale:  # a token of it is still on its way: one step later
                skipped.append(self.waiting.pop())
                continue
            if self.running and self._ledger.still_blocked(sequence):
                break
            hit = self._ledger.admissible(sequence, self._number, self._watermark_blocks if self.running else 0)
            if hit is None:
                break
            self.waiting.pop()
            computed = hit.blocks * size
            tokens = min(sequence.tokens - computed, longest, budget)
            self.kv.hold(sequence.table, hit)
            batch.cached[sequence.id] = sequence.computed = computed
            self._admit(sequence, computed)
            blocks = -(-(computed + tokens) // size) - hit.blocks
            self._ledger.take(sequence, blocks, computed + tokens, self._number)
            batch.parts.append(Part(sequence, computed, tokens, False))
            budget -= tokens
        for sequence in reversed(skipped):
            self.waiting.put_back(sequence)

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
