"""TOML -> a checked Scenario. Every mistake is one ScenarioError that names the file, the key, the value and the mend."""

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from fanmark.agents.runtime import Topology
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lengths import Dist
from fanmark.loadgen.scenario import ANSWER_KINDS, Arm, Load, Objective, Scenario, Stub, Table, Target, Tools, Workload


class _File(Table, frozen=True, kw_only=True):
    """The file as it is written."""

    name: str = "scenario"
    seed: int = 1
    target: Target | None = None
    targets: dict[str, Target] = {}
    stub: Stub | None = None
    workload: Workload = Workload()
    arm: list[dict[str, Any]]
    tools: Tools = Tools()
    load: Load = Load()
    objective: Objective | None = None


def bundled() -> dict[str, str]:
    """Names of the bundled scenarios, each with its first comment line."""
    folder = files("fanmark.loadgen").joinpath("scenarios")
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".toml"))
    return {n.removesuffix(".toml"): folder.joinpath(n).read_text().splitlines()[0].lstrip("# ") for n in names}


def read(name_or_file: str) -> tuple[dict[str, Any], str]:
    """The raw table of a TOML file or a bundled scenario, and the name to use in messages."""
    path = Path(name_or_file)
    if path.suffix != ".toml" and name_or_file in bundled():
        text = files("fanmark.loadgen").joinpath("scenarios", f"{name_or_file}.toml").read_text()
        return tomllib.loads(text), name_or_file
    try:
        return tomllib.loads(path.read_text()), str(path)
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8"
        known = ", ".join(bundled())
        raise ScenarioError(
            f"{path}: cannot be read ({reason}): give a TOML file or one of the bundled: {known}"
        ) from None
    except tomllib.TOMLDecodeError as e:
        raise ScenarioError(f"{path}: is not TOML: {e}") from None


def check(raw: Mapping[str, Any], source: str, topologies: Mapping[str, Topology]) -> Scenario:
    """The typed scenario. Raises ScenarioError at the first mistake; `source` is named in it."""
    file: _File = _convert(dict(raw), _File, source)
    if file.target is not None and file.targets:
        raise ScenarioError(f"{source}: both [target] and [targets.NAME]: give one target or several named ones")
    targets = {"default": file.target} if file.target is not None else dict(file.targets)
    if targets and file.stub is not None:
        raise ScenarioError(f"{source}: both a target and [stub]: the stub stands in only where there is no target")
    for name, target in targets.items():
        if not re.match(r"https?://[^/\s]+", target.url):
            raise ScenarioError(
                f"{source}: {_target_key(name)} url = {target.url!r}: must be http://HOST:PORT/v1 or https://..."
            )
    _check_tools(file.tools, source)
    arms = [_arm(raw_arm, i, source, topologies) for i, raw_arm in enumerate(file.arm)]
    _check_arms(arms, targets, source)
    load = file.load
    if load.queries is not None and load.duration is not None:
        raise ScenarioError(
            f"{source}: [load] queries = {load.queries} and duration = {load.duration}: give one of the two"
        )
    if load.queries is None and load.duration is None:
        load = msgspec.structs.replace(load, queries=20)
    scenario = Scenario(
        name=file.name,
        seed=file.seed,
        targets=targets,
        stub=file.stub or Stub(),
        workload=file.workload,
        arms=arms,
        tools=file.tools,
        load=load,
        objective=file.objective,
        source=source,
    )
    _check_lengths(scenario, source)
    return scenario


def _check_tools(tools: Tools, source: str) -> None:
    for i, server in enumerate(tools.server):
        if (server.url is None) == (server.command is None) or server.command == []:
            raise ScenarioError(f"{source}: [[tools.server]] number {i + 1}: give either url or command")


def _check_arms(arms: Sequence[Arm], targets: Mapping[str, Target], source: str) -> None:
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ScenarioError(f"{source}: [[arm]] name = {name!r} is given twice: arms need different names")
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ScenarioError(f"{source}: [[arm]] name = {name!r}: use letters, digits and . _ + - only")
    marked = [arm.name for arm in arms if arm.baseline]
    if len(marked) != 1:
        given = "no arm has" if not marked else f"{', '.join(marked)} all have"
        raise ScenarioError(
            f"{source}: [[arm]] baseline: {given} baseline = true: exactly one arm must, usually a single pass"
        )
    for arm in arms:
        for wanted in [arm.target, *arm.targets.values()]:
            if wanted is not None and wanted not in targets:
                known = ", ".join(targets) or "none: the stub stands in"
                raise ScenarioError(f"{source}: arm {arm.name!r} names the target {wanted!r}: there is {known}")
        if len(targets) > 1 and arm.target is None and "default" not in {*targets, *arm.targets}:
            raise ScenarioError(
                f"{source}: arm {arm.name!r}: say which target it uses: target = one of {', '.join(targets)}"
            )


def _check_lengths(scenario: Scenario, source: str) -> None:
    for arm in scenario.arms:
        try:
            workload = scenario.workload_of(arm)
        except msgspec.ValidationError as e:
            raise _error(e, arm.workload, Workload, f"{source}: arm {arm.name!r} workload") from None
        for kind in ANSWER_KINDS:
            length = getattr(workload, kind)
            if (length if isinstance(length, int) else math.floor(length.min)) < 1 and length != 0:
                workload_key = f"{source}: [workload] {kind} may come out as 0"
                raise ScenarioError(f"{workload_key}: a call writes at least 1 token: give the distribution min = 1")
            if length == 0:
                raise ScenarioError(
                    f"{source}: [workload] {kind} = 0 (arm {arm.name!r}): a call writes at least 1 token"
                )


def _arm(raw: dict[str, Any], i: int, source: str, topologies: Mapping[str, Topology]) -> Arm:
    where = f"{source}: arm {raw.get('name', i + 1)!r}"
    name = str(raw.get("topology"))
    if name not in topologies:
        raise ScenarioError(f"{where} topology = {name!r}: must be one of {', '.join(topologies)}")
    own = {f.name for f in dataclasses.fields(topologies[name].params)}
    keys = {f.name for f in msgspec.structs.fields(Arm)} - {"params"}
    for key in raw:
        if key not in own | keys:
            raise ScenarioError(f"{where}: unknown key {key!r}{_nearest(key, own | keys)}")
    given = {k: v for k, v in raw.items() if k in own}
    arm: Arm = _convert({k: v for k, v in raw.items() if k in keys} | {"params": given}, Arm, source, f"arm {i + 1}")
    resolve_params(topologies[name], given, where, lambda _, dist: round(dist.mean))
    return arm


def resolve_params(topology: Topology, given: Mapping[str, Any], where: str, drawn: Callable[[str, Dist], int]) -> Any:
    """The topology's params; a distribution goes through `drawn(key, dist)`. Raises ScenarioError."""
    values = {}
    for key, value in given.items():
        if isinstance(value, Dist | dict):
            try:
                value = drawn(key, msgspec.convert(value, Dist))
            except msgspec.ValidationError as e:
                raise ScenarioError(f"{where}: {key} = {value!r}: {str(e).split(' - at ')[0]}") from None
        values[key] = value
    try:
        return msgspec.convert(values, topology.params)
    except msgspec.ValidationError as e:
        found = re.search(r"`\$\.(\w+)`", str(e))
        text = str(e).split(" - at ")[0]
        if found:
            text = f"{found[1]} = {values[found[1]]!r}: {text}"
        raise ScenarioError(f"{where}: {text}") from None


def _convert(raw: dict[str, Any], kind: type[Any], source: str, prefix: str = "") -> Any:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as e:
        raise _error(e, raw, kind, f"{source}: {prefix}".rstrip(": ")) from None


def _error(e: msgspec.ValidationError, raw: Any, kind: type[Any], where: str) -> ScenarioError:
    """msgspec's message and path turned into one line in the file's own words."""
    text, _, path = str(e).partition(" - at ")
    steps = re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path)
    names, value = [], raw
    for name, index in steps:
        if name:
            names.append(name)
        try:
            value = value[name] if name else value[int(index)]
        except (KeyError, IndexError, TypeError, ValueError):
            value = None
    unknown = re.search(r"unknown field `(\w+)`", text)
    if unknown:
        table = f" [{'.'.join(names)}]" if names else ""
        return ScenarioError(f"{where}{table}: unknown key {unknown[1]!r}{_nearest(unknown[1], _fields(kind, names))}")
    missing = re.search(r"missing required field `(\w+)`", text)
    if missing:
        table = f" [{'.'.join(names)}]" if names else ""
        wanted = "[[arm]]" if missing[1] == "arm" and not names else missing[1]
        return ScenarioError(f"{where}{table}: {wanted} is missing")
    table, key = ".".join(names[:-1]), names[-1] if names else ""
    at = f" [{table}]" if table else ""
    return ScenarioError(f"{where}{at} {key} = {value!r}: {text[0].lower()}{text[1:]}")


def _fields(kind: Any, names: Sequence[str]) -> set[str]:
    """The keys of the table that `names` leads to, as far as it is a plain path of tables."""
    for name in names:
        found = {f.name: f.type for f in msgspec.structs.fields(kind)}.get(name) if _is_struct(kind) else None
        options = getattr(found, "__args__", (found,))
        kind = next((t for t in options if _is_struct(t)), None)
    return {f.name for f in msgspec.structs.fields(kind)} if _is_struct(kind) else set()


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _nearest(key: str, allowed: set[str]) -> str:
    close = difflib.get_close_matches(key, allowed, 1)
    if close:
        return f": did you mean {close[0]!r}?"
    return f": allowed are {', '.join(sorted(allowed))}" if allowed else ""


def _target_key(name: str) -> str:
    return "[target]" if name == "default" else f"[targets.{name}]"


def override(raw: dict[str, Any], settings: Sequence[str]) -> None:
    """Applies `--set KEY=VALUE` in place: KEY is a dotted path (an arm by its name: arm.debate.agents), VALUE is TOML, else text."""
    for setting in settings:
        path, sign, text = setting.partition("=")
        keys = path.strip().split(".")
        if not sign or not all(keys):
            raise ScenarioError(f"--set {setting}: must be KEY=VALUE, such as load.rate=2 or arm.debate.agents=6")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        table: Any = raw
        for i, key in enumerate(keys[:-1]):
            if key == "arm" and i == 0 and len(keys) > 2:
                continue
            if keys[0] == "arm" and i == 1:
                found = [arm for arm in raw.get("arm", []) if arm.get("name") == key]
                if not found:
                    known = ", ".join(str(arm.get("name")) for arm in raw.get("arm", []))
                    raise ScenarioError(f"--set {setting}: there is no arm {key!r}, but {known}")
                table = found[0]
                continue
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ScenarioError(f"--set {setting}: {key} is not a table")
        table[keys[-1]] = value


def override_target(
    raw: dict[str, Any],
    url: str | None,
    model: str | None,
    api: str | None,
    api_key_env: str | None,
    environ: Mapping[str, str],
) -> None:
    """--target puts one target in place of the scenario's; --model, --api and --api-key-env change it."""
    if url is not None:
        raw.pop("targets", None)
        raw.pop("stub", None)
        raw["target"] = {"url": url} | ({"api_key_env": "OPENAI_API_KEY"} if environ.get("OPENAI_API_KEY") else {})
    for key, value in (("model", model), ("api", api), ("api_key_env", api_key_env)):
        if value is None:
            continue
        if "target" in raw:
            raw["target"][key] = value
        elif key == "api" and "targets" not in raw:
            raw.setdefault("stub", {})["api"] = value
        else:
            raise ScenarioError(f"--{key.replace('_', '-')} {value}: there is no one target: give --target URL")


def override_load(
    raw: dict[str, Any],
    queries: int | None,
    duration: float | None,
    rate: float | None,
    concurrency: int | None,
    seed: int | None,
) -> None:
    """The load flags: queries and duration clear each other, --rate means an open loop, --concurrency a closed one."""
    if queries is not None and duration is not None:
        raise ScenarioError(f"--queries {queries} and --duration {duration:g}: give one of the two")
    if rate is not None and concurrency is not None:
        raise ScenarioError(
            f"--rate {rate:g} and --concurrency {concurrency}: a loop is open or closed, give one of the two"
        )
    load = raw.setdefault("load", {})
    arms = [arm for arm in raw.get("arm", []) if isinstance(arm, dict)]
    given = {"queries": queries, "duration": duration, "rate": rate, "concurrency": concurrency}
    for key, value in given.items():
        if value is not None:
            load[key] = value
            for table in arms:
                table.pop(key, None)
    if queries is not None:
        load.pop("duration", None)
    if duration is not None:
        load.pop("queries", None)
        for table in arms:
            table.pop("queries", None)
    if rate is not None or concurrency is not None:
        load["mode"] = "open" if rate is not None else "closed"
    if seed is not None:
        raw["seed"] = seed
