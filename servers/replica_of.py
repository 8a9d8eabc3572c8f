"""A replica out of a profile: how the profile's figures and a user's overrides become an engine."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fanmark.servers.engine.batch import EngineConfig
from fanmark.servers.engine.replica import Replica, Step

if TYPE_CHECKING:
    from fanmark.servers.profiles.profile import Profile

_OWN = {f.name for f in fields(EngineConfig)}


def engine_config(profile: "Profile", overrides: Mapping[str, Any] | None = None) -> EngineConfig:
    """The scheduler's settings of a profile. `overrides` by EngineConfig's names; None values are left out.

    Raises ValueError for a value that cannot be.
    """
    settings = profile.settings
    given = {name: getattr(settings, name) for name in _OWN if hasattr(settings, name)}
    return EngineConfig(**(given | {name: value for name, value in (overrides or {}).items() if value is not None}))


def replica_of(
    profile: "Profile", config: EngineConfig, *, stream: bool = True, on_step: Callable[[Step], None] | None = None
) -> Replica:
    """An engine at rest. A token leaves the loop `egress_s` before the client has it, a request enters it `ingress_s` after."""
    return Replica(
        config,
        profile.law,
        engines=profile.settings.data_parallel,
        asynchronous=profile.settings.asynchronous,
        stream=stream,
        ingress_s=profile.law.ingress_s,
        token_s=profile.law.egress_s,
        on_step=on_step,
    )
