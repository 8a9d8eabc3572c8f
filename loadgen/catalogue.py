"""`fanmark topologies`: every shape and every preset, and what a query of it costs by the closed forms. Pure."""

import asyncio
import dataclasses
import inspect
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from fanmark.agents.presets import Preset, presets
from fanmark.agents.runtime import Topology
from fanmark.loadgen.claims import held
from fanmark.loadgen.claims import rows as claim_rows
from fanmark.loadgen.demand import Demand, draw_demand, expected_tokens
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.prefix import PrefixCache
from fanmark.loadgen.scenario import KINDS, Arm, Scenario
from fanmark.loadgen.scenario_check import check
from fanmark.loadgen.table import columns, number
from fanmark.loadgen.walk import Made, walk

COUNTS = ("calls", "tool_calls", "input_tokens", "fresh_tokens", "output_tokens", "depth", "width")
RATIOS = ("calls", "input_tokens", "fresh_tokens", "output_tokens")
_SAMPLE = 500  # queries whose mean is told where something is drawn
_WIDTH = 80
_FULL = 100  # a line of a docstring that is longer goes on in the next


def catalogue(topologies: Mapping[str, Topology], schema_tokens: int) -> dict[str, Any]:
    """`topologies` and `presets` by name, an `entry` each."""
    return {
        "topologies": {name: entry(name, topologies, schema_tokens) for name in topologies},
        "presets": {name: entry(name, topologies, schema_tokens) for name in presets()},
    }


def entry(name: str, topologies: Mapping[str, Topology], schema_tokens: int) -> dict[str, Any]:
    """A topology or preset and its costs: of a query alone, on an empty cache; prompts with tools have `schema_tokens`. Raises
    ScenarioError where there is none of this name."""
    if name in topologies:
        return _topology(topologies[name], schema_tokens)
    if name in presets():
        return _preset(presets()[name], topologies, schema_tokens)
    raise ScenarioError(f"there is no topology or preset {name!r}: there are {', '.join([*topologies, *presets()])}")


def _topology(topology: Topology, schema_tokens: int) -> dict[str, Any]:
    scenario = _scenario({"topology": topology.name}, topology)
    fields = dataclasses.fields(topology.params)
    return {
        "summary": topology.summary,
        "sketch": topology.sketch,
        "params": {field.name: field.default for field in fields},
        **_costs(scenario, topology, schema_tokens),
    }


def _preset(preset: Preset, topologies: Mapping[str, Topology], schema_tokens: int) -> dict[str, Any]:
    scenario = _scenario({"preset": preset.name}, topologies[preset.topology])
    costs = _costs(scenario, topologies[preset.topology], schema_tokens)

    def value(unit: str, resource: str) -> float | None:
        found: float | None = costs["amplification" if unit == "x" else "per_query"].get(resource)
        return found

    return {
        "summary": preset.summary,
        "source": preset.source,
        "topology": preset.topology,
        "params": preset.params,
        "workload": preset.workload,
        **costs,
        "claim": held(scenario.arms[1], value),
    }


def _scenario(arm: Mapping[str, Any], topology: Topology) -> Scenario:
    """The arm and, with the same lengths, a single pass."""
    from fanmark.agents import single

    named: dict[str, Any] = {"name": "arm", **arm}
    lengths = presets()[arm["preset"]].workload if "preset" in arm else {}
    base = {"name": "single", "topology": "single", "baseline": True, "workload": dict(lengths)}
    return check({"arm": [base, named]}, "catalogue", {"single": single.TOPOLOGY, topology.name: topology})


def _costs(scenario: Scenario, topology: Topology, schema_tokens: int) -> dict[str, Any]:
    from fanmark.agents import single

    base = _mean(scenario, scenario.arms[0], single.TOPOLOGY, schema_tokens)
    own = _mean(scenario, scenario.arms[1], topology, schema_tokens)
    ratios = {key: own[key] / base[key] if base[key] else None for key in RATIOS}
    return {"per_query": own, "amplification": ratios}


def _mean(scenario: Scenario, arm: Arm, topology: Topology, schema_tokens: int) -> dict[str, float]:
    """Mean counts of a query, and `fresh_tokens_together`: what is fresh where siblings share nothing."""
    drawn = any(isinstance(value, Mapping) for value in (*arm.params.values(), *arm.workload.values()))
    found: list[dict[str, float]] = []
    for i in range(_SAMPLE if drawn else 1):
        demand = _demand(scenario, arm, topology, i, schema_tokens)
        assert topology.expected is not None, "every topology of the table has its closed form"
        form = topology.expected(demand.params, demand)
        output, read = expected_tokens(form, demand.lengths, {})
        made = asyncio.run(walk(topology, demand))
        found.append(
            {
                "calls": form.calls,
                "tool_calls": form.tool_calls,
                "input_tokens": read or 0,
                "fresh_tokens": PrefixCache().fresh_tokens(made, i),
                "fresh_tokens_together": PrefixCache().fresh_tokens(made, i, together=True),
                "output_tokens": output,
                "depth": form.depth,
                "width": form.width,
            }
        )
    return {key: sum(one[key] for one in found) / len(found) for key in found[0]}


def _demand(scenario: Scenario, arm: Arm, topology: Topology, query: int, schema_tokens: int) -> Demand:
    demand = draw_demand(scenario, arm, {arm.topology: topology}, query)
    return dataclasses.replace(demand, lengths={**demand.lengths, "tools": schema_tokens})


HEAD = ("", "calls", "tools", "input", "fresh", "output", "depth", "width", "input", "fresh", "output")


def lines(found: Mapping[str, Any]) -> list[str]:
    """All shapes, then all presets: for each its counts, what it is and how it looks."""
    shapes, known = found["topologies"], found["presets"]
    everything = {**shapes, **known}
    head, *table = columns([HEAD, *(_row(one) for one in everything.values())])
    counts = dict(zip(everything, table, strict=True))
    told = [
        "What a query costs by the closed forms, with the default lengths. The last",
        "three columns are times a single pass of the same lengths. fresh: input that a",
        "perfect prefix cache, empty at first, does not serve.",
        "More on one: fanmark topologies NAME",
        "",
        head,
    ]
    for name, one in shapes.items():
        told += [f"{name}: {one['summary']}", f"    {one['sketch']}", counts[name]]
    told += ["", 'presets, for an arm that says preset = "NAME"', head]
    for name, one in known.items():
        claim = one["claim"]
        told += [
            *_wrapped(f"{name}: {one['summary']}", ""),
            *_wrapped(f"a preset of {one['topology']}; {one['source']}"),
        ]
        told += _wrapped(f"claim under test: {claim['text']}") if claim is not None else []
        told.append(counts[name])
    return told


def _row(found: Mapping[str, Any]) -> list[str]:
    ratios = [found["amplification"][key] for key in RATIOS[1:]]
    return [
        "",
        *(number(found["per_query"][key]) for key in COUNTS),
        *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
    ]


def _wrapped(text: str, indent: str = "    ") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", break_on_hyphens=False)


def long_lines(name: str, topologies: Mapping[str, Topology], schema_tokens: int) -> list[str]:
    """All about one topology or preset: how it goes, its parameters, its calls by depth, its costs."""
    found, preset = entry(name, topologies, schema_tokens), presets().get(name)
    topology = topologies[preset.topology if preset is not None else name]
    scenario = _scenario({"preset": name} if preset is not None else {"topology": name}, topology)
    demand = _demand(scenario, scenario.arms[1], topology, 0, schema_tokens)
    made = asyncio.run(walk(topology, demand))
    told = [*_wrapped(f"{name}: {found['summary']}", ""), ""]
    if preset is not None:
        told += [*_wrapped(f"source: {preset.source}"), "", f"a preset of {topology.name}:", ""]
    told += [*_module_doc(topology), "", f"    {topology.sketch}", "", *_params(topology, scenario.arms[1], demand), ""]
    told += [*_lengths(demand, made), *_by_depth(made, demand), *_cost_lines(found)]
    if found.get("claim") is not None:
        rows = claim_rows(name, found["claim"], number)
        told += ["", f"claim under test: {found['claim']['text']}", *_wrapped(f"source: {found['claim']['source']}")]
        told += columns([("", "claimed", "by the closed form", ""), *rows])
    return told


def _module_doc(topology: Topology) -> list[str]:
    """What stands at the head of the topology's file, reflowed: a line that is full goes on in the next, unless that has a label."""
    told: list[str] = []
    for line in inspect.cleandoc(sys.modules[topology.run.__module__].__doc__ or "").splitlines():
        if told and len(told[-1]) > _FULL and line and not re.match(r" *[^.]{1,20}:  ", line):
            told[-1] += f" {line.strip()}"
        else:
            told.append(line)
    return [part for line in told for part in _hanging(line)]


def _hanging(line: str) -> list[str]:
    """A line, wrapped under its label if it has one."""
    label = re.match(r" *[^.]{1,20}:  +| *", line)
    indent = " " * (label.end() if label else 0)
    return textwrap.wrap(line, _WIDTH, subsequent_indent=indent) or [""]


def _params(topology: Topology, arm: Arm, demand: Demand) -> list[str]:
    fields = dataclasses.fields(topology.params)
    if not fields:
        return ["no parameters"]
    rows = []
    for field in fields:
        given, here = arm.params.get(field.name), _written(getattr(demand.params, field.name))
        told = f"{given['dist']}, mean {given['mean']:g}: {here} in query 0" if isinstance(given, Mapping) else here
        rows.append((f"  {field.name}", _written(field.default), told))
    changed = any(default != here for _, default, here in rows)
    shown: list[Sequence[str]] = [("parameters", "default", "here"), *rows]
    about = _wrapped(" ".join((topology.params.__doc__ or "").split()))
    return [*columns(shown if changed else [row[:2] for row in shown]), *about]


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else f"{value:g}"


def _lengths(demand: Demand, made: Iterable[Made]) -> list[str]:
    used = {str(message.key[0]) for call in made for message in (*call.prompt, call.reply)}
    told = ", ".join(f"{kind} {demand.lengths[kind]:,}" for kind in (*KINDS, "tools") if kind in used)
    legend = "S system, Q question, D the tools' schemas, F instruction"
    return [*_wrapped(f"lengths: {told}"), *_wrapped(legend), ""] if told else []


def _by_depth(made: Sequence[Made], demand: Demand) -> list[str]:
    """A row for all calls of one depth, which can run at once; of query 0, where something is drawn."""
    rows: list[Sequence[str]] = [("depth", "calls", "input each", "fresh", "together", "output each", "by")]
    one_by_one, together = PrefixCache(), PrefixCache()
    for depth, group in groupby(sorted(made, key=lambda call: call.depth), key=lambda call: call.depth):
        calls = list(group)
        fresh = one_by_one.fresh_tokens(calls, demand.query)
        worst = together.fresh_tokens(calls, demand.query, together=True)
        reads = _span([call.input_tokens for call in calls])
        writes = _span([call.reply.tokens for call in calls])
        roles = _roles([call.role for call in calls])
        rows.append((str(depth), str(len(calls)), reads, number(fresh), number(worst), writes, roles))
    if len(rows) > 25:
        rows = [*rows[:13], ("...", *[""] * 6), *rows[-10:]]
    return [*columns(rows), ""] if made else []


def _span(values: Sequence[int]) -> str:
    return number(values[0]) if min(values) == max(values) else f"{number(min(values))}-{number(max(values))}"


def _roles(roles: Sequence[str]) -> str:
    names = list(dict.fromkeys(roles))
    return ", ".join(names) if len(names) < 3 else f"{names[0]} .. {names[-1]}"


def _cost_lines(found: Mapping[str, Any]) -> list[str]:
    costs, ratios = found["per_query"], found["amplification"]
    rows = [("a query", "", "times a single pass of the same lengths")]
    for key in COUNTS:
        ratio = ratios.get(key)
        rows.append((f"  {key.replace('_', ' ')}", number(costs[key]), "" if ratio is None else f"{ratio:.2f}x"))
    fresh, worst = costs["fresh_tokens"], costs["fresh_tokens_together"]
    told = "fresh: what a perfect prefix cache, empty at first, leaves to be computed."
    if worst > fresh:
        told += f" {number(worst)} where calls that are made together share nothing; on vLLM they share."
    return [*columns(rows), *_wrapped(told)]
