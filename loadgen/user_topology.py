"""A user's own topology: `topology = "path.py:function"`, an async function like those in agents/.

The file may also hold `Params`, a frozen dataclass (else the arm's other keys are handed over as attributes), and `expected`, the closed
form (else nothing is compared).
"""

import dataclasses
import importlib.util
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fanmark.agents.runtime import Topology
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.scenario import ARM_KEYS


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
            found[arm["topology"]] = _load(path, function, f"{source}: topology = {named!r}", arm.keys() - ARM_KEYS)
    return found


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
        known = [n for n, f in vars(module).items() if inspect.iscoroutinefunction(f)]
        raise ScenarioError(f"{where}: has no async function {function!r}, but {', '.join(known) or 'none'}")
    return Topology(f"{path}:{function}", "a user's own", _params(module, keys), run, getattr(module, "expected", None))


def _params(module: ModuleType, keys: Iterable[str]) -> type[Any]:
    own = getattr(module, "Params", None)
    if own is not None:
        return own  # type: ignore[no-any-return]  # the user's own class
    fields = [(key, Any, dataclasses.field(default=None)) for key in sorted(keys)]
    return dataclasses.make_dataclass("Params", fields, frozen=True)
