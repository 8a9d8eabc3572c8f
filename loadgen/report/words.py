"""What a report says in words: the answer, whether it is to be trusted, and what is needed to repeat the run. Pure."""

import shlex
from collections.abc import Mapping
from typing import Any

from fanmark.loadgen.table import number, ticks

_NAMED = {"calls": "calls", "output_tokens": "output tokens", "latency_s": "latency"}


def answers(summary: Mapping[str, Any]) -> list[str]:
    """A sentence for each arm but the baseline: what a query costs, and the operating point of both arms that its latency holds at."""
    arms = summary["arms"]
    base = next(name for name, arm in arms.items() if arm["baseline"])
    others = [name for name in arms if name != base and "tap" not in summary]
    return [_answer(name, arms[name], base, arms[base]) for name in others] or [_alone(base, arms[base])]


def _answer(name: str, arm: Mapping[str, Any], base: str, against: Mapping[str, Any]) -> str:
    if not arm["queries"]["completed"] or not against["queries"]["completed"]:
        empty = name if not arm["queries"]["completed"] else base
        return f"What one {name} query costs is not known: no {empty} query completed."
    found = {word: arm["amplification"][resource] for resource, word in _NAMED.items()}
    told = [f"{each['ratio']:.2f}x the {word}" for word, each in found.items() if each and each["ratio"] is not None]
    latency = found["latency"]
    over = "; its latency is not compared: over capacity" if latency and latency["method"] == "over capacity" else ""
    return (
        f"At {_point(arm)} ({base}: {_point(against)}), one {name} query costs {listed(told)} of a {base} query{over}."
        if told
        else f"At {_point(arm)}, what one {name} query costs against a {base} query is not known{over}."
    )


def _alone(name: str, arm: Mapping[str, Any]) -> str:
    if not arm["queries"]["completed"]:
        return f"No {name} query completed."
    means = {r: found and found["mean"] for r, found in arm["per_query"].items()}
    return (
        f"At {_point(arm)}, one {name} query makes {number(means['calls'])} calls, writes {number(means['output_tokens'])} tokens and "
        f"takes {number(means['latency_s'])} s; there is no other arm to compare."
    )


def _point(arm: Mapping[str, Any]) -> str:
    load = arm["load"]
    if load["completed_qps"] is None:
        return "a load that is not known"
    return f"{number(load['completed_qps'])} queries/s, {number(load['calls_in_flight']['mean'])} calls in flight"


def listed(words: list[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """Why the answer is not to be trusted as it stands."""
    ended = summary["ended"]
    cut = [f"The run was cut short ({ended['why']}): {ended['reason']}."] if ended is not None else []
    failed = [tick for mark, tick, _ in ticks(summary["validity"]) if mark == "FAILED"]
    return cut + ([f"Not to be trusted as it stands: {listed(failed)} failed, see below."] if failed else [])


def title(summary: Mapping[str, Any]) -> str:
    """`quickstart: 60 queries in 61 s on qwen3-30b-a3b (fanmark-stub-0.1)`; of several targets each model is named once."""
    run, target = summary["run"], summary["target"]
    where = [target] if "url" in target else target.values()
    models = listed(list(dict.fromkeys(f"{each['model']} ({each['server']})" for each in where)))
    started = sum(arm["queries"]["started"] for arm in summary["arms"].values())
    return f"{run['name']}: {started} queries in {run['seconds']:.0f} s on {models}"


def repeat_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """What is needed to run it again, but for the scenario."""
    run, target = summary["run"], summary["target"]
    found = {
        "command": f"fanmark {shlex.join(run['command'])}",
        "seed": run["seed"],
        "version": run["version"],
        "started": run["started"] or "in virtual time",
        "run": run["id"],
    }
    for name, each in {"target": target}.items() if "url" in target else target.items():
        found[name] = (
            f"{', '.join(each.get('urls') or [each['url']])} {each['model']} ({each['server']}, lane {each['lane']})"
        )
    return [["what", "value"], *([word, str(value)] for word, value in found.items())]


def environment_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """What the run was surrounded by."""
    return [["what", "value"], *_flat("", summary.get("environment") or {})]


def _flat(name: str, value: Any) -> list[list[str]]:
    """Nested mappings as rows of dotted names."""
    if isinstance(value, Mapping):
        return [row for word, each in value.items() for row in _flat(f"{name}.{word}" if name else word, each)]
    return [[name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)]] if value is not None else []
