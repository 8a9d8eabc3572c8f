"""A replica out of a profile: how the profile's figures and a user's overrides become an engine."""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from fanmark.servers.engine.attribution import Accounting, Attribution, weights_of
from fanmark.servers.engine.batch import EngineConfig
from fanmark.servers.engine.events import Step
from fanmark.servers.engine.group import Engine, ReplicaGroup
from fanmark.servers.engine.replica import Replica
from fanmark.servers.engine.routing import Policy, Router

if TYPE_CHECKING:
    from fanmark.servers.profiles.profile import Profile

MAX_MODEL_LEN = 131_072
_OWN = {f.name for f in fields(EngineConfig)}


def engine_config(profile: "Profile", overrides: Mapping[str, Any] | None = None) -> EngineConfig:
    """The scheduler's settings of a profile. `overrides` by EngineConfig's names; None values are left out.

    Raises ValueError for a value that cannot be.
    """
    settings = profile.settings
    given = {name: getattr(settings, name) for name in _OWN if hasattr(settings, name)}
    return EngineConfig(**(given | {name: value for name, value in (overrides or {}).items() if value is not None}))


def serving_config(profile: "Profile", overrides: Mapping[str, Any] | None = None) -> EngineConfig:
    """`engine_config` of a server: unless it is given, `max_model_len` is what the KV cache holds, and not above MAX_MODEL_LEN."""
    given = dict(overrides or {})
    config = engine_config(profile, given | {"max_model_len": given.get("max_model_len") or MAX_MODEL_LEN})
    if given.get("max_model_len"):
        return config
    return replace(config, max_model_len=max(1, min(MAX_MODEL_LEN, (config.num_blocks - 1) * config.block_size)))


def replica_of(
    profile: "Profile",
    config: EngineConfig,
    *,
    stream: bool = True,
    on_step: Callable[[Step], None] | None = None,
    accounting: Accounting | None = None,
) -> Engine:
    """An engine at rest. A token leaves the loop `egress_s` before the client has it, a request enters it `ingress_s` after. Data-parallel
    engines that share their experts step together; others are a group, each on its own. With `accounting` its time is accounted for
    (attribution.py)."""
    settings = profile.settings
    lockstep = settings.data_parallel if settings.expert_parallel else 1

    def attribution() -> Attribution | None:
        if accounting is None:
            return None
        batch = min(accounting.full_batch, config.max_num_seqs)
        weights = weights_of(profile.law, config.max_num_batched_tokens, batch, lockstep)
        return Attribution(weights, lockstep, slack=accounting.slack)

    def replica() -> Replica:
        return Replica(
            config,
            profile.law,
            engines=lockstep,
            asynchronous=settings.asynchronous,
            stream=stream,
            ingress_s=profile.law.ingress_s,
            token_s=profile.law.egress_s,
            on_step=on_step,
            attribution=attribution(),
        )

    count = settings.data_parallel // lockstep
    return replica() if count == 1 else ReplicaGroup([replica() for _ in range(count)])


def service_of(
    profile: "Profile",
    config: EngineConfig,
    replicas: int = 1,
    router: Policy = "round_robin",
    *,
    stream: bool = True,
    accounting: Accounting | None = None,
) -> Engine:
    """So many replicas of a profile behind a router, as one engine; one of them needs no router."""
    if replicas == 1:
        return replica_of(profile, config, stream=stream, accounting=accounting)
    members = [replica_of(profile, config, stream=stream, accounting=accounting) for _ in range(replicas)]
    return ReplicaGroup(members, Router(router, replicas))
