"""The label of a run of a frozen scenario: one line that can be quoted, or why it cannot. Pure, but that the bundled scenario is read.

Rules of the file:
1. A frozen scenario never changes: its file's SHA-256 stands here, and a test holds the two together. A better one gets a new name.
2. Two runs of it may differ in where they ran (targets or stub), in budget and in thresholds. Any other change makes another scenario.
3. A label is quotable when the run was whole, all ticks hold, and each ratio in it has an interval. Else the reasons are told in its place.
4. No ratio of times without its operating point: calls in flight, and what the baseline took.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fanmark.loadgen.report.words import listed
from fanmark.loadgen.scenario import Scenario, resolved
from fanmark.loadgen.table import number, ticks

FROZEN = {"fanmark-1": "0d046fe39b4cfeee54ce54049f43259445662e9b1d6db6bf53da9b899f7b2cf9"}
_FREE = ("targets", "stub", "budget", "threshold")
_SHOWN = 3  # changed keys that are named


def label(scenario: Scenario, summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """`label` of summary.json: {scenario, sha256, quotable, text, reasons}; `text` is None where it is not quotable. None where the
    scenario is not one of the frozen."""
    if scenario.name not in FROZEN:
        return None
    reasons = [*_changed(scenario), *_unsound(summary)]
    sha256 = FROZEN[scenario.name]
    return {
        "scenario": scenario.name,
        "sha256": sha256,
        "quotable": not reasons,
        "text": None if reasons else _text(scenario.name, sha256, summary),
        "reasons": reasons,
    }


def line(found: Mapping[str, Any]) -> str:
    """The label as it is printed."""
    return f"label    {found['text'] or 'not quotable: ' + '; '.join(found['reasons'])}"


def _text(name: str, sha256: str, summary: Mapping[str, Any]) -> str:
    run, target, arms = summary["run"], summary["target"], summary["arms"]
    where = [target] if "url" in target else list(target.values())
    served = listed(list(dict.fromkeys(f"{each['model']} on {each['server']}" for each in where)))
    base = next(each for each in arms.values() if each["baseline"])
    in_flight = sum(each["load"]["calls_in_flight"]["mean"] for each in arms.values())
    told = ", ".join(
        f"{name} {_ratio(each, 'output_tokens')}/{_ratio(each, 'latency_s')}"
        for name, each in arms.items()
        if not each["baseline"]
    )
    virtual = " (simulated)" if run["clock"] == "virtual" else ""
    return (
        f"{name} {sha256[:8]}{virtual}, {served}: {told} of a single pass's output tokens/latency "
        f"({number(base['per_query']['latency_s']['mean'])} s) at {number(in_flight)} calls in flight"
    )


def _ratio(arm: Mapping[str, Any], resource: str) -> str:
    return f"{arm['amplification'][resource]['ratio']:.1f}x"


def _changed(scenario: Scenario) -> Iterator[str]:
    from fanmark.agents import topologies
    from fanmark.loadgen.scenario_check import check, read

    raw, source = read(scenario.name)
    frozen, mine = (dict(_flat("", _fixed(each))) for each in (check(raw, source, topologies()), scenario))
    keys = [key for key in {**frozen, **mine} if frozen.get(key) != mine.get(key)]
    told = [f"{key} is {mine.get(key)!r} and not {frozen.get(key)!r}" for key in keys[:_SHOWN]]
    if keys:
        more = f", and {len(keys) - _SHOWN} keys more" if len(keys) > _SHOWN else ""
        yield f"the scenario was changed: {', '.join(told)}{more}"


def _fixed(scenario: Scenario) -> dict[str, Any]:
    return {key: value for key, value in resolved(scenario).items() if key not in _FREE}


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Keys as `--set` names them, each with its value."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(f"{name}.{key}".lstrip("."), part)
    elif name == "arm":
        for arm in value:
            yield from _flat(f"arm.{arm['name']}", arm)
    else:
        yield name, value


def _unsound(summary: Mapping[str, Any]) -> Iterator[str]:
    if summary["partial"]:
        yield f"the run was cut short ({summary['ended']['why']})"
    if summary["run"]["time_scale"] != 1.0:
        yield f"the stub's time ran {summary['run']['time_scale']:g} times as fast"
    for mark, tick, reason in ticks(summary["validity"]):
        if mark != "ok":
            yield f"{tick} {'failed' if mark == 'FAILED' else 'is not known'} ({reason})"
    for name, arm in summary["arms"].items():
        for resource in () if arm["baseline"] else ("output_tokens", "latency_s"):
            found = arm["amplification"][resource]
            if found is None or found["low"] is None:
                why = "not known" if found is None else found["method"]
                yield f"{name}: its {resource} ratio has no interval ({why})"
