"""A user's own topology: `topology = "path.py:function"`, an async function like those in agents/.

The file may also hold `Params`, a frozen dataclass (else the arm's other keys are handed over as attributes), and `expected`, the closed
form (else nothing is compared).
"""

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from fanmark.agents.runtime import Runtime, Topology
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.recording import with_recordings
from fanmark.loadgen.scenario import ARM_KEYS, Scenario


def with_users(raw: Mapping[str, Any], source: str, table: Mapping[str, Topology]) -> dict[str, Topology]:
    """The table and the topologies that the scenario's arms bring from files; their paths are relative to the scenario's. The arms
    then name them by absolute path. Raises ScenarioError."""
    found = dict(table)
    arms = raw.get("arm", [])
    listed = arms if isinstance(arms, list) else []  # what is none is for `check` to refuse
    parts = [
        part for arm in listed if isinstance(arm, dict) and isinstance(arm.get("mix"), list) for part in arm["mix"]
    ]
    for arm in [*listed, *parts]:
        named = arm.get("topology") if isinstance(arm, dict) else None
        if isinstance(named, str) and ".py:" in named:
            file, _, function = named.rpartition(":")
            path = (Path(source).parent / file).resolve()
            arm["topology"] = f"{path}:{function}"
            where = f"{source}: topology = {named!r}"
            found[arm["topology"]] = _load(path, function, where, arm.keys() - ARM_KEYS)
    return with_recordings([*listed, *parts], source, found)


def table_of(scenario: Scenario, table: Mapping[str, Topology]) -> dict[str, Topology]:
    """The table with what a scenario that came from elsewhere brings from files. Raises ScenarioError."""
    arms = [{"topology": arm.topology, **arm.params} for each in scenario.arms for arm in (each.mix or [each])]
    return with_users({"arm": arms}, scenario.source, table)


def _load(path: Path, function: str, where: str, keys: Iterable[str]) -> Topology:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ScenarioError(f"{where}: there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever a user's file raises
        raise ScenarioError(f"{where}: fails to import: {type(e).__name__}: {' '.join(str(e).split())}") from None
    run = getattr(module, function, None)
    if not inspect.iscoroutinefunction(run):
        own = {n: f for n, f in vars(module).items() if getattr(f, "__module__", None) == path.stem}
        known = [n for n, f in own.items() if inspect.iscoroutinefunction(f)]
        raise ScenarioError(f"{where}: has no async function {function!r}, but {', '.join(known) or 'none'}")
    name = f"{path}:{function}"
    if next(iter(inspect.signature(run).parameters), None) == "client":
        return _agent(name, run, where, keys)
    return Topology(name, "a user's own", _params(module, keys), run, getattr(module, "expected", None))


def _agent(name: str, run: Callable[..., Any], where: str, keys: Iterable[str]) -> Topology:
    """An agent that makes its calls by a client of the `openai` SDK: its parameters are the arm's keys."""
    from fanmark.loadgen.agent_client import GIVEN, answer, warm

    warm()
    _, *others = inspect.signature(run).parameters.values()
    if not others or any(each.kind in (each.POSITIONAL_ONLY, each.VAR_POSITIONAL) for each in others):
        raise ScenarioError(
            f"{where}: an agent is called with (client, question, NAME=VALUE, ...): give it such parameters"
        )
    wants = [each.name for each in others[1:] if each.name in GIVEN]
    named = {each.name: each.default for each in others[1:] if each.kind != each.VAR_KEYWORD and each.name not in GIVEN}
    if any(each.kind == each.VAR_KEYWORD for each in others):
        named |= dict.fromkeys(keys - named.keys() - set(GIVEN), None)
    fields = [
        (key, Any)
        if default is inspect.Parameter.empty
        else (key, Any, dataclasses.field(default_factory=partial(copy, default)))
        for key, default in sorted(named.items(), key=lambda item: item[1] is not inspect.Parameter.empty)
    ]
    params = dataclasses.make_dataclass("Params", fields, frozen=True)

    async def answered(rt: Runtime, p: Any) -> None:
        await answer(run, wants, rt, vars(p))

    return Topology(name, "an agent of the user's own, by the openai SDK", params, answered, by_client=tuple(wants))


def agents(scenario: Scenario, topologies: Mapping[str, Topology]) -> dict[str, bool]:
    """The arms whose calls go by a client of their own, and whether these carry the run's cache salt, as far as is known."""
    given = {arm.name: [topologies[part.topology].by_client for part in arm.mix or [arm]] for arm in scenario.arms}
    return {
        name: all("cache_salt" in wants for wants in parts if wants is not None)
        for name, parts in given.items()
        if any(wants is not None for wants in parts)
    }


def check_agents(scenario: Scenario, topologies: Mapping[str, Topology], *, virtual: bool) -> None:
    """Refuses agents with clients of their own where they cannot run. Raises ScenarioError."""
    for arm in scenario.arms:
        for part in arm.mix or [arm]:
            topology = topologies[part.topology]
            where = f"{scenario.source}: arm {arm.name!r}: topology = {part.topology!r}"
            if topology.by_client is None:
                continue
            if virtual:
                raise ScenarioError(f"{where}: an agent's own client needs a server and real time: fanmark run")
            target = scenario.targets.get(arm.target or "default")
            if (target.api if target is not None else scenario.stub.api) != "chat":
                raise ScenarioError(f'{where}: an agent\'s own client needs a target with api = "chat"')
            if scenario.load.users is not None and scenario.load.turns != 1 and "history" not in topology.by_client:
                raise ScenarioError(
                    f"{where}: [load] turns: its function needs a parameter `history` to be told the turns before"
                )


def _params(module: ModuleType, keys: Iterable[str]) -> type[Any]:
    own = getattr(module, "Params", None)
    if own is not None:
        return own  # type: ignore[no-any-return]  # the user's own class
    fields = [(key, Any, dataclasses.field(default=None)) for key in sorted(keys)]
    return dataclasses.make_dataclass("Params", fields, frozen=True)
