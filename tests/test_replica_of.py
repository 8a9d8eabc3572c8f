"""A profile's parallelism as engines: those that share their experts step together, others are a group."""

from dataclasses import replace

from fanmark.servers.engine.group import ReplicaGroup
from fanmark.servers.engine.replica import Replica
from fanmark.servers.engine.request import Request
from fanmark.servers.profiles import load_profile
from fanmark.servers.replica_of import replica_of, serving_config


def test_data_parallel_engines_step_together_only_when_they_share_experts() -> None:
    profile = load_profile("qwen3-30b-a3b@h100")
    for sharing, kind in ((False, ReplicaGroup), (True, Replica)):
        settings = replace(profile.settings, data_parallel=2, expert_parallel=sharing)
        parallel = replace(profile, settings=settings)
        engine = replica_of(parallel, serving_config(parallel), stream=False)
        assert type(engine) is kind
        for i in range(4):
            engine.add(Request(str(i), list(range(100 * i, 100 * i + 50)), [1] * 5), 0.0)
        events = engine.advance(1e6)
        assert sorted(event.id for event in events if event.finished) == ["0", "1", "2", "3"]
        assert [e.generation_tokens for e in engine.statistics().engines] == [10, 10]  # the least loaded takes the next
