"""What the engines of a target spent their time on in a window, told by every step as it is scheduled.

Rules of the file:
1. A step's time that lies outside the window does not count. Steps of one engine do not overlap, so that busy time is their sum.
2. Of a mixed step prefill has what it adds: the step's time less that of its decodes alone; decode has the rest.
3. Who waits after a step was scheduled waits for the first of these that holds: room among `max_num_seqs`, the step's budget of tokens
   (others' prefill), KV blocks. Requests x seconds add up to the time that requests waited.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from fanmark.loadgen.lanes.virtual import VirtualEndpoint
from fanmark.servers.engine.events import Step
from fanmark.servers.engine.group import Engine, ReplicaGroup
from fanmark.servers.engine.replica import Replica

REASONS = ("sequences", "prefill", "kv")


@dataclass
class Use:
    """Sums over a target's replicas. `*_s` without a better word are seconds of replicas, of steps or of requests."""

    replicas: int
    max_num_seqs: int
    busy_s: float = 0.0
    prefill_s: float = 0.0
    steps: int = 0
    seqs_s: float = 0.0  # requests in a step x its time
    decode_steps_s: float = 0.0  # times of steps in which there was decode, x those who decoded
    decode_seqs: int = 0
    kv_s: float = 0.0  # share of the KV cache in use x busy time
    kv_max: float = 0.0
    waiting_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(REASONS, 0.0))
    preemptions: int = 0

    def told(self, seconds: float) -> dict[str, float | int | dict[str, float] | None]:
        """As figures of a window that was so long."""
        busy_s = self.busy_s or None
        return {
            "replicas": self.replicas,
            "utilisation": self.busy_s / (self.replicas * seconds),
            "prefill_share": self.prefill_s / busy_s if busy_s else None,
            "batch": self.seqs_s / busy_s if busy_s else None,
            "step_s": self.decode_steps_s / self.decode_seqs if self.decode_seqs else None,
            "kv_use": self.kv_s / busy_s if busy_s else None,
            "kv_use_max": self.kv_max,
            "waiting": {reason: each / seconds for reason, each in self.waiting_s.items()},
            "preemptions": self.preemptions,
        }


class Watch:
    """Keeps the accounts of some targets from `start` to `stop`, which are told while time goes on."""

    def __init__(self, endpoints: Mapping[str, VirtualEndpoint]) -> None:
        self.start_at, self.stop_at = float("inf"), float("inf")
        self.accounts: dict[str, Use] = {}
        for name, endpoint in endpoints.items():
            engines = list(_replicas(endpoint.lane.replica))
            account = self.accounts[name] = Use(len(engines), engines[0].config.max_num_seqs)
            for engine in engines:
                engine.on_step = partial(self._note, account, engine)

    def _note(self, account: Use, engine: Replica, step: Step) -> None:
        seconds = min(step.end_at, self.stop_at) - max(step.start_at, self.start_at)
        if seconds <= 0.0:
            return
        shape, law = step.shape, engine.law
        account.busy_s += seconds
        account.steps += step.steps
        account.seqs_s += shape.seqs * seconds
        if shape.decode_seqs:
            account.decode_steps_s += shape.decode_seqs * seconds
            account.decode_seqs += shape.decode_seqs * step.steps
        if shape.prefill_tokens:
            alone = shape._replace(prefill_tokens=0, attention_pairs=0.0, seqs=shape.decode_seqs)
            whole_s = law.gpu_seconds(shape)
            decode_s = law.gpu_seconds(alone) if shape.decode_seqs else 0.0
            account.prefill_s += seconds * max(0.0, 1.0 - decode_s / whole_s)
        for scheduler in engine.schedulers:
            use = scheduler.kv.usage
            account.kv_s += use * seconds / len(engine.schedulers)
            account.kv_max = max(account.kv_max, use)
            waiting = len(scheduler.waiting)
            if waiting:
                full = len(scheduler.running) >= scheduler.config.max_num_seqs
                spent = shape.prefill_tokens + shape.decode_seqs >= scheduler.config.max_num_batched_tokens
                account.waiting_s["sequences" if full else "prefill" if spent else "kv"] += waiting * seconds

    def end(self, endpoints: Mapping[str, VirtualEndpoint]) -> None:
        """Takes what is known at the end only."""
        for name, endpoint in endpoints.items():
            engines = endpoint.lane.replica.statistics().engines
            self.accounts[name].preemptions = sum(engine.num_preemptions for engine in engines)


def _replicas(engine: Engine) -> Iterator[Replica]:
    if isinstance(engine, ReplicaGroup):
        for each in engine.replicas:
            yield from _replicas(each)
    else:
        yield engine
