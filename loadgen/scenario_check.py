"""TOML -> a checked Scenario. Every mistake is one ScenarioError that names the file, the key, the value and the mend."""

import math
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec

from fanmark.agents.runtime import Topology
from fanmark.loadgen.arms import arm_of, check_arms
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lengths import Dist
from fanmark.loadgen.matching import check_match, with_capacity
from fanmark.loadgen.mistakes import convert, show
from fanmark.loadgen.question_file import read_questions
from fanmark.loadgen.questions import Question
from fanmark.loadgen.recording import recording_of
from fanmark.loadgen.redaction import is_secret_name
from fanmark.loadgen.scenario import (
    ANSWER_KINDS,
    Arm,
    Budget,
    Load,
    Objective,
    Scenario,
    Stub,
    Table,
    Target,
    Threshold,
    Tools,
    Workload,
)
from fanmark.loadgen.shaping import tool_server_key
from fanmark.loadgen.target_check import check_budget, check_targets, check_tool_server
from fanmark.loadgen.thresholds import check_thresholds

_CLEARS = {  # what --set KEY=VALUE puts out of force
    "load.queries": "load.duration",
    "load.duration": "load.queries",
    "load.users": "load.concurrency",
    "target.api_key_file": "target.api_key_env",
    "target.urls": "target.url",
}


class _File(Table, frozen=True, kw_only=True):
    """The file as it is written."""

    name: str = "scenario"
    seed: int = 1
    target: Target | None = None
    targets: dict[str, dict[str, Any]] = {}
    stub: Stub | None = None
    workload: Workload = Workload()
    arm: list[dict[str, Any]]
    tools: Tools = Tools()
    load: Load = Load()
    objective: Objective | None = None
    budget: Budget | None = None
    threshold: list[Threshold] = []
    record: bool = False
    tapped: bool = False


def bundled() -> dict[str, str]:
    """Names of the bundled scenarios, each with its first comment line."""
    folder = files("fanmark.loadgen").joinpath("scenarios")
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".toml"))
    return {n.removesuffix(".toml"): folder.joinpath(n).read_text().splitlines()[0].lstrip("# ") for n in names}


def read(name_or_file: str) -> tuple[dict[str, Any], str]:
    """The raw table of a TOML file or a bundled scenario, and the name to use in messages."""
    path = Path(name_or_file)
    if path.suffix != ".toml" and name_or_file in bundled():
        folder = files("fanmark.loadgen").joinpath("scenarios")
        raw = tomllib.loads(folder.joinpath(f"{name_or_file}.toml").read_text())
        if "file" in raw.get("workload", {}):
            raw["workload"]["file"] = str(folder.joinpath(raw["workload"]["file"]))
        return raw, name_or_file
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
    file = convert(raw, _File, source)
    if file.target is not None and file.targets:
        raise ScenarioError(f"{source}: both [target] and [targets.NAME]: give one target or several named ones")
    if file.target is not None:
        targets = {"default": file.target}
    else:
        targets = {name: convert(table, Target, source, ("targets", name)) for name, table in file.targets.items()}
    if targets and file.stub is not None:
        raise ScenarioError(f"{source}: both a target and [stub]: the stub stands in only where there is no target")
    check_targets(targets, source)
    check_budget(file.budget, targets, source)
    _check_tools(file, source)
    arms = [arm_of(raw_arm, i, source, topologies) for i, raw_arm in enumerate(file.arm)]
    check_arms(arms, targets, source)
    load = file.load if file.tapped else _load(_of_users(file.load, raw, source), source, arms)
    load = with_capacity(load, source)
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
        budget=file.budget,
        threshold=file.threshold,
        source=source,
        questions=_questions(file.workload, arms, source),
        record=file.record,
        tapped=file.tapped,
    )
    _check_lengths(scenario, source)
    check_match(scenario, source)
    check_thresholds(scenario.threshold, [arm.name for arm in arms], scenario.baseline.name, source)
    return scenario


def _questions(workload: Workload, arms: Sequence[Arm], source: str) -> list[Question]:
    """Those of the workload's file, which stands beside the scenario."""
    for arm in [each for whole in arms for each in (whole, *whole.mix)]:
        if "file" in arm.workload:
            raise ScenarioError(
                f"{source}: arm {arm.name!r}: workload file = {show(arm.workload['file'])}: all arms are asked the same: "
                "give it to [workload]"
            )
    if workload.file is None:
        return []
    return read_questions(Path(source).parent / workload.file, f"{source}: [workload] file = {show(workload.file)}")


def _load(load: Load, source: str, arms: Sequence[Arm]) -> Load:
    """The load with its arrivals read and its end settled. Where nothing else is said, a recording is made again whole, and others make 20
    queries."""
    recorded = [len(recording) for arm in arms if (recording := recording_of(arm)) is not None]
    if load.process == "replay" and load.duration is not None:
        raise ScenarioError(
            f"{source}: [load] duration = {load.duration:g}: a replay of arrivals ends with them: give queries, or a rate or a concurrency "
            'in place of process = "replay"'
        )
    if load.process == "replay" and load.arrivals is None and recorded:
        queries = load.queries or max(recorded)
        return msgspec.structs.replace(load, mode="open", queries=queries)
    if load.speed != 1:
        raise ScenarioError(
            f'{source}: [load] speed = {load.speed:g}: it is of a replay: give an arm with topology = "replay", and process = "replay" '
            "without arrivals"
        )
    if load.queries is not None and load.duration is not None:
        raise ScenarioError(
            f"{source}: [load] queries = {load.queries} and duration = {load.duration:g}: give one of the two"
        )
    if (load.process == "replay") != (load.arrivals is not None):
        raise ScenarioError(
            f'{source}: [load] process = "replay" and arrivals = FILE go together: give both or neither'
        )
    if load.stages and (load.mode == "closed" or load.process == "replay"):
        raise ScenarioError(
            f"{source}: [[load.stages]] set the rate of an open loop: not of a closed one, nor of a replay"
        )
    if any(stage.rate == 0 and not stage.to for stage in load.stages):
        raise ScenarioError(f"{source}: [[load.stages]] rate = 0: give a rate above 0, or one to go `to`")
    if load.arrivals is not None:
        times = _arrivals(load.arrivals, source)
        return msgspec.structs.replace(load, mode="open", arrivals=times, queries=len(times))
    if load.queries is None and load.duration is None:
        seconds = sum(stage.seconds for stage in load.stages)
        return msgspec.structs.replace(
            load, **({"duration": seconds} if seconds else {"queries": max(recorded, default=20)})
        )
    return load


def _of_users(load: Load, raw: Mapping[str, Any], source: str) -> Load:
    """The load with its users as a closed loop. `raw` tells what is written from what is a default."""
    if load.users is None:
        for key, given in (("turns", load.turns), ("think_s", load.think_s)):
            if key in raw.get("load", {}) and given != getattr(Load(), key):
                shown = show(msgspec.to_builtins(given))
                raise ScenarioError(f"{source}: [load] {key} = {shown}: sessions are of users: give users = N as well")
        return load
    if raw["load"].get("mode") == "open" or load.process == "replay" or load.stages:
        raise ScenarioError(
            f"{source}: [load] users = {load.users}: that is a closed loop: leave mode, arrivals and stages out"
        )
    if load.concurrency not in (1, load.users):
        raise ScenarioError(
            f"{source}: [load] users = {load.users} and concurrency = {load.concurrency}: they are the same: give users alone"
        )
    if isinstance(load.turns, Dist) and round(load.turns.min) < 1:
        shown = show(msgspec.to_builtins(load.turns))
        raise ScenarioError(
            f"{source}: [load] turns = {shown}: a session has at least 1: give the distribution min = 1"
        )
    return msgspec.structs.replace(load, mode="closed", concurrency=load.users)


def _arrivals(given: str | list[float], source: str) -> list[float]:
    """Start times in order, from a list or from a file beside the scenario with one a line."""
    if isinstance(given, list):
        return sorted(given)
    path = Path(source).parent / given
    where = f"{source}: [load] arrivals = {given!r}"
    try:
        lines = path.read_text().split()
    except (OSError, UnicodeDecodeError) as e:
        raise ScenarioError(f"{where}: cannot be read ({e}): give a file with one start time (s) a line") from None
    times = []
    for i, line in enumerate(lines, start=1):
        try:
            times.append(float(line))
        except ValueError:
            times.append(-1.0)
        if not 0 <= times[-1] < math.inf:
            raise ScenarioError(f"{where}: line {i} is {line!r}: give a start time in seconds, 0 or more")
    if not times:
        raise ScenarioError(f"{where}: is empty: give one start time (s) a line")
    return sorted(times)


def _check_tools(file: _File, source: str) -> None:
    tools = file.tools
    if tools.decide == "model":
        if file.workload.lengths == "forced":
            raise ScenarioError(
                f'{source}: [tools] decide = "model" with [workload] lengths = "forced": a model that may not stop cannot '
                'call tools: use lengths = "natural"'
            )
        tables = [file.target, *file.targets.values(), file.stub]
        if any((t.get("api") if isinstance(t, dict) else t and t.api) == "completions" for t in tables):
            raise ScenarioError(f'{source}: [tools] decide = "model" with api = "completions": use api = "chat"')
    for i, server in enumerate(tools.server):
        if (server.url is None) == (server.command is None) or server.command == []:
            raise ScenarioError(f"{source}: [[tools.server]] number {i + 1}: give either url or command")
        check_tool_server(server, f"{source}: {tool_server_key(i)}")
        if tools.transport == "thin" and server.url is None:
            raise ScenarioError(
                f'{source}: [tools] transport = "thin": [[tools.server]] number {i + 1} is a command, which the SDK alone '
                'can start: use "auto"'
            )


def _check_lengths(scenario: Scenario, source: str) -> None:
    """A call writes at least one token: no length of a reply may be, or come out as, 0."""
    for arm in [each for whole in scenario.arms for each in (whole, *whole.mix)]:
        workload = scenario.workload_of(arm)
        for kind in ANSWER_KINDS:
            length = getattr(workload, kind)
            if round(length.min if isinstance(length, Dist) else length) >= 1:
                continue
            place = f"arm {arm.name!r}: [workload]" if kind in arm.workload else "[workload]"
            given = show(msgspec.to_builtins(length))
            mend = "give the distribution min = 1" if isinstance(length, Dist) else "give 1 or more"
            raise ScenarioError(f"{source}: {place} {kind} = {given}: a call writes at least 1 token: {mend}")


def override(raw: dict[str, Any], settings: Sequence[str]) -> None:
    """Applies `--set KEY=VALUE` in place: KEY is a dotted path (an arm by its name: arm.debate.agents), VALUE is TOML, else text."""
    for setting in settings:
        path, sign, text = setting.partition("=")
        keys = path.strip().split(".")
        if any(map(is_secret_name, keys)):
            setting = f"{path}=..."
        if not sign or not all(keys):
            raise ScenarioError(f"--set {setting}: must be KEY=VALUE, such as load.rate=2 or arm.debate.agents=6")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        table: Any = raw
        if keys[0] == "arm" and len(keys) > 2:
            arms = {str(arm.get("name")): arm for arm in _arms(raw)}
            if keys[1] not in arms:
                raise ScenarioError(f"--set {setting}: there is no arm {keys[1]!r}, but {', '.join(arms) or 'none'}")
            table, keys = arms[keys[1]], keys[2:]
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ScenarioError(f"--set {setting}: {key} is not a table")
        table[keys[-1]] = value
        clears = _CLEARS.get(path.strip())
        if clears is not None and not any(other.partition("=")[0].strip() == clears for other in settings):
            table.pop(clears.partition(".")[2], None)


def _arms(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arms' tables, as far as they are tables: what else stands there is for `check` to refuse."""
    arms = raw.get("arm")
    return [arm for arm in arms if isinstance(arm, dict)] if isinstance(arms, list) else []


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
        if isinstance(raw.get("target"), dict):
            raw["target"][key] = value
        elif key == "api" and "targets" not in raw and isinstance(raw.setdefault("stub", {}), dict):
            raw["stub"]["api"] = value
        else:
            raise ScenarioError(f"--{key.replace('_', '-')} {value}: there is no one target: give --target URL")


def override_load(
    raw: dict[str, Any],
    queries: int | None,
    duration: float | None,
    rate: float | None,
    concurrency: int | None,
    seed: int | None,
    max_in_flight: int | None = None,
) -> None:
    """The load flags: queries and duration clear each other, --rate means an open loop, --concurrency a closed one."""
    if queries is not None and duration is not None:
        raise ScenarioError(f"--queries {queries} and --duration {duration:g}: give one of the two")
    if rate is not None and concurrency is not None:
        raise ScenarioError(
            f"--rate {rate:g} and --concurrency {concurrency}: a loop is open or closed, give one of the two"
        )
    if seed is not None:
        raw["seed"] = seed
    load = raw.setdefault("load", {})
    if not isinstance(load, dict):
        return  # for `check` to refuse
    arms = _arms(raw)
    users = load.get("users")
    if rate is not None and users is not None:
        raise ScenarioError(
            f"--rate {rate:g}: [load] users = {users} is a closed loop: give --concurrency, for other users"
        )
    if max_in_flight is not None:
        load["max_in_flight"] = max_in_flight
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
    if concurrency is not None and users is not None:
        load["users"] = concurrency
    if rate is not None:
        load.pop("stages", None)
        if load.get("match") == "capacity":
            del load["match"]
    if rate is not None or concurrency is not None:
        if load.get("process") == "replay":  # at other times than those recorded
            for key in ("process", "arrivals", "speed"):
                load.pop(key, None)
        load["mode"] = "open" if rate is not None else "closed"
