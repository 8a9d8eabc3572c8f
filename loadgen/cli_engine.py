"""The commands around the engine model: profiles, calibrate, validate. Part of the command line, apart for its size."""

import json as json_lib
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

from fanmark.loadgen.errors import ScenarioError

JsonFlag = Annotated[bool, typer.Option("--json", help="The same as JSON.")]


def profiles(json: JsonFlag = False) -> None:
    """Lists the profiles that were fitted, and the models and chips of which any MODEL@CHIP can be had by priors."""
    from fanmark.servers import profiles as parts

    fitted = {name: parts.load_profile(name) for name in parts.fitted_names()}
    found: dict[str, dict[str, str]] = {
        "fitted": {name: profile.origin for name, profile in fitted.items()},
        "models": {name: _grade(parts.load_model(name)) for name in parts.model_ids()},
        "chips": {name: _grade(parts.load_chip(name)) for name in parts.chip_ids()},
    }
    if json:
        print(json_lib.dumps(found, indent=1))
        return
    for title, rows in found.items():
        print(title)
        width = max(map(len, rows), default=0)
        for name, text in rows.items():
            print(f"  {name.ljust(width)}  {text}")


def _grade(part: Any) -> str:
    return f"confidence {part.confidence}, {part.as_of}: {part.source}"


def calibrate(
    source: Annotated[Path, typer.Argument(help="A calibration grid (*.json), a trace's folder or a run's folder.")],
    model: Annotated[str, typer.Option(help="Id of a bundled model (fanmark profiles).")],
    chip: Annotated[str, typer.Option(help="Id of a bundled chip.")],
    out: Annotated[Path, typer.Option(help="The profile to write, a TOML file.")],
    kv_blocks: Annotated[int | None, typer.Option(help="vLLM's num_gpu_blocks, the null block included.")] = None,
) -> None:
    """Fits a profile to measurements and writes it."""
    from fanmark.loadgen.calibrate import calibrate as fit
    from fanmark.loadgen.calibrate import write_profile

    if not source.exists():
        raise ScenarioError(f"{source}: does not exist: give a grid (*.json), a trace's folder or a run's folder")
    try:
        profile = fit(source, model, chip, kv_blocks, as_of=date.today().isoformat())
        write_profile(profile, out)
    except (ValueError, OSError) as e:
        raise ScenarioError(f"{source}: {e}") from None
    for name, efficiency in profile.efficiencies().items():
        print(f"{name:<28} {efficiency:.3f}")
    for name, bounds in profile.intervals.items():
        print(f"{name:<28} {bounds}")
    for caveat in profile.caveats():
        print(f"note  {caveat}")
    print(f"profile  {out}")


def validate(
    sources: Annotated[
        list[Path], typer.Argument(help="A trace's folder, a grid (*.calib.json), or recorded schedules.")
    ],
    profile: Annotated[str | None, typer.Option(help="A bundled profile, MODEL@CHIP, or a file.")] = None,
    fit_on_half: Annotated[bool, typer.Option(help="Fit on the first half of a trace, compare the second.")] = False,
    json: JsonFlag = False,
) -> int:
    """Holds the engine model against what real servers did. Exit 1 when a recorded schedule differs."""
    for source in sources:
        if not source.exists():
            raise ScenarioError(
                f"{source}: does not exist: give a trace's folder, a *.calib.json or recorded schedules"
            )
    try:
        if sources[0].is_dir() or sources[0].name.endswith(".calib.json"):
            return _timing(sources, profile, fit_on_half, json)
        return _schedules(sources, json)
    except (ValueError, OSError) as e:
        raise ScenarioError(str(e)) from None


def _timing(sources: list[Path], profile: str | None, fit_on_half: bool, json: bool) -> int:
    from fanmark.loadgen import validate as checks
    from fanmark.servers.profiles import load_profile

    if len(sources) > 1:
        raise ScenarioError(f"{sources[1]}: one trace or grid at a time")
    loaded = load_profile(profile) if profile is not None else None
    if sources[0].is_dir():
        found = checks.validate_trace(sources[0], loaded, fit_on_half=fit_on_half)
        text = checks.trace_table(found)
    elif loaded is None:
        raise ScenarioError(f"{sources[0]}: a grid is held against a profile: give --profile")
    else:
        found = checks.validate_grid(sources[0], loaded)
        text = checks.grid_table(found)
    print(json_lib.dumps(found, indent=1) if json else text)
    return 0


def _schedules(sources: list[Path], json: bool) -> int:
    from fanmark.loadgen.replay import replay_schedule

    results = [replay_schedule(source) for source in sources]
    equal = sum(result.equal for result in results)
    if json:
        rows = [
            {
                "name": r.name,
                "steps": r.steps,
                "equal": r.equal,
                "first_difference": r.first_difference,
                "differs": r.differs,
            }
            for r in results
        ]
        print(json_lib.dumps({"equal": equal, "of": len(results), "schedules": rows}, indent=1))
    else:
        for result in results:
            if not result.equal:
                print(result)
        print(f"{equal} of {len(results)} equal")
    return int(equal < len(results))
