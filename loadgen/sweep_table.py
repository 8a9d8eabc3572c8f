"""What a sweep says at its end, as lines of text. Pure."""

from collections.abc import Mapping
from typing import Any

from fanmark.loadgen import crossing, plan_table
from fanmark.loadgen.capacity import AMPLIFICATION
from fanmark.loadgen.table import ROWS, columns, number, short

Found = Mapping[str, Any]
_SHOWN = ("calls", "input_tokens", "fresh_tokens", "output_tokens", "latency_s")
RATIOS = {key: title.strip().removesuffix(", s") for key, title in ROWS if key in _SHOWN}


def headlines(found: Found) -> list[str]:
    """A sentence for each arm and objective: the price of a query that does not depend on the load; of a plan its answers."""
    if "plan" in found:
        return plan_table.headlines(found)
    if found["axis"]["seeks"] != "highest":
        return []
    baseline = next(name for name, arm in found["arms"].items() if arm["baseline"])
    said = []
    for objective, about in found["objectives"].items():
        for name, arm in found["arms"].items():
            if not arm["baseline"]:
                said.append(_headline(name, arm, objective, baseline, found) + f", on {about['title']}")
    return said


def _headline(name: str, arm: Found, objective: str, baseline: str, found: Found) -> str:
    each = arm["amplification"][AMPLIFICATION[objective]]
    if each["ratio"] is None:
        missing = [n for n in (baseline, name) if found["arms"][n]["on"][objective]["capacity"] is None]
        return f"what one {name} query costs in capacity is not known: no load that passes was found of {' and '.join(missing)}"
    but = "" if each["low"] and each["high"] else " (?: nothing failed)"
    return f"one {name} query costs {_costs(each)} the capacity of a {baseline!r} query{but}"


def lines(found: Found) -> list[str]:
    """The answer, what it rests on for each arm and objective, and all points."""
    axis = found["axis"]
    said = [*headlines(found), *(crossing.lines(found["find"], axis) if "find" in found else [])]
    if (rows := along_rows(found)) is not None:
        said += ["", "against the baseline, as the key changes", *columns(rows)]
    for objective, about in found["objectives"].items():
        said += ["", f"on {about['title']}"]
        if axis["seeks"] is not None:
            said += [*columns(answer_rows(found, objective)), ""]
        said += columns(point_rows(found, objective))
    said += [f"note     {note}" for note in found["notes"]]
    return said[1:] if said[:1] == [""] else said


def along_rows(found: Found) -> list[list[str]] | None:
    """Of a key that is swept: each arm's ratios at each value; None along a load."""
    if found["axis"]["seeks"] is not None:
        return None
    rows = [["", found["axis"]["unit"], *RATIOS.values()]]
    for name, arm in found["arms"].items():
        for each in arm["along"] if not arm["baseline"] else ():
            ratios = [each["amplification"][key] for key in RATIOS]
            rows.append([name, str(each["value"]), *(_times(one) for one in ratios)])
    return rows


def _times(found: Found | None) -> str:
    return "-" if found is None or found["ratio"] is None else f"{found['ratio']:.2f}x"


def answer_rows(found: Found, objective: str) -> list[list[str]]:
    """Of each arm where it passes and fails, and what that is worth."""
    axis, highest = found["axis"], found["axis"]["seeks"] == "highest"
    rows = [["", f"passes at, {axis['unit']}", "fails at", "undecided"]]
    if highest:
        rows[0] += ["good queries/s", "costs"]
    for name, arm in found["arms"].items():
        on = arm["on"][objective]
        ends = [on["bracket"]["low"], on["bracket"]["high"]]
        passes, fails = ends if highest else ends[::-1]
        undecided = ", ".join(map(short, on["bracket"]["undecided"])) or "-"
        row = [name, _end(passes, "none"), _end(fails, "none"), undecided]
        if highest:
            row += [
                _capacity(on["capacity"]),
                "1x" if arm["baseline"] else _costs(arm["amplification"][AMPLIFICATION[objective]]),
            ]
        rows.append(row)
    return rows


def _end(value: float | None, none: str) -> str:
    return none if value is None else short(value)


def _capacity(found: Found | None) -> str:
    return "-" if found is None else f"{short(found['qps'])} [{short(found['low'])}, {_end(found['high'], '?')}]"


def _costs(found: Found) -> str:
    """`9.00x [8.10, 9.90]`, a bound that is not known as a question mark."""
    if found["ratio"] is None:
        return "-"
    low, high = ("?" if found[key] is None else f"{found[key]:.2f}" for key in ("low", "high"))
    return f"{found['ratio']:.2f}x [{low}, {high}]"


def point_rows(found: Found, objective: str) -> list[list[str]]:
    """A row for each arm and x."""
    rows = [["", found["axis"]["unit"], "queries", "in flight", "good/s", "in time (95 %)", ""]]
    for arm, each in found["arms"].items():
        for point in each["on"][objective]["points"]:
            row = [x_of(found, point["x"]), number(point["queries"]), short(point["calls_in_flight"])]
            verdict = "over capacity" if point["over_capacity"] else point["verdict"]
            rows.append([arm, *row, short(point["goodput_qps"]), _share(point), verdict])
    return rows


def x_of(found: Found, x: float) -> str:
    """A value of the axis, in its own words where it is no number."""
    values = found["axis"]["values"]
    named = values is not None and not all(isinstance(value, int | float) for value in values)
    return str(values[int(x)]) if named else short(x)


def _share(point: Found) -> str:
    if point["attainment"] is None:
        return "-"
    return f"{point['attainment']:.1%} [{point['low']:.1%}, {point['high']:.1%}]"
