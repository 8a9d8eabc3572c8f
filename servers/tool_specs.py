"""The embedded tools as data: their schemas, and how their latency and result are drawn. Standard library only.

Shared by the MCP server (tools.py) and by runs in virtual time, so that both give a query the same tools, the same
latencies and the same results.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fanmark.servers.tool_faults import ToolFault

SEED_META = "fanmark/seed"
RESULT_TOKENS_META = "fanmark/result_tokens"
LATENCY_META = "fanmark/latency_s"
QUEUED_META = "fanmark/queued_s"  # in a result's `_meta`: how long the call was kept in the queue
MAX_RESULT_TOKENS = 1_000_000
MAX_MEAN_S, MAX_CV = 1e6, 100.0

DISTRIBUTIONS = ("constant", "uniform", "exponential", "lognormal", "gamma")

# A number, or {"dist": one of DISTRIBUTIONS, "mean": M, "cv": C, "min": A, "max": B}: the form that scenarios have.
Latency = float | Mapping[str, Any]


@dataclass(frozen=True)
class ToolSpec:
    """One tool as `tools/list` shows it; `input_schema` is JSON Schema with bounds on every argument. Read-only."""

    name: str
    description: str
    input_schema: Mapping[str, Any]

    def listed(self) -> dict[str, Any]:
        """As `tools/list` has it."""
        hints = {"readOnlyHint": True, "openWorldHint": False}
        return {
            "name": self.name,
            "description": self.description,
            "inputSchema": self.input_schema,
            "annotations": hints,
        }


def _tool(name: str, description: str, properties: Mapping[str, Any], required: Sequence[str]) -> ToolSpec:
    schema = {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": False,
    }
    return ToolSpec(name, description + " Offline: own data, or filler text.", schema)


def _string(description: str, max_length: int, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, "minLength": 1, "maxLength": max_length, **more}


def _integer(description: str, minimum: int, maximum: int, default: int) -> dict[str, Any]:
    return {
        "type": "integer",
        "description": description,
        "minimum": minimum,
        "maximum": maximum,
        "default": default,
    }


# The shapes that agents use, as the popular servers for search, files, databases and code have them.
TOOLS: tuple[ToolSpec, ...] = (
    _tool(
        "search",
        "Search the web and return the passages that answer the query best.",
        {
            "query": _string("What to look for, as one would type it into a search engine", 200),
            "max_results": _integer("How many passages to return", 1, 20, 5),
            "recency": {
                "type": "string",
                "description": "How old a page may be",
                "enum": ["any", "year", "month", "week", "day"],
                "default": "any",
            },
        },
        ["query"],
    ),
    _tool(
        "fetch",
        "Fetch a page by its URL and return its text, from start_index on.",
        {
            "url": _string("Absolute http or https URL", 500, format="uri"),
            "max_length": _integer("Most characters to return", 100, 100_000, 5_000),
            "start_index": _integer("First character to return", 0, 1_000_000, 0),
        },
        ["url"],
    ),
    _tool(
        "read_file",
        "Read lines of a text file in the workspace.",
        {
            "path": _string("Path relative to the root of the workspace", 300),
            "start_line": _integer("First line, counted from 1", 1, 1_000_000, 1),
            "line_count": _integer("How many lines to return", 1, 2_000, 200),
        },
        ["path"],
    ),
    _tool(
        "sql_query",
        "Run one SELECT statement against a database and return the rows as text.",
        {
            "database": {
                "type": "string",
                "description": "Which database",
                "enum": ["sales", "inventory", "support"],
            },
            "statement": _string("A single SELECT statement", 1_000),
            "row_limit": _integer("Most rows to return", 1, 1_000, 50),
        },
        ["database", "statement"],
    ),
    _tool(
        "calculator",
        "Evaluate an arithmetic expression.",
        {
            "expression": _string("Numbers, + - * / ** and brackets", 200),
            "precision": _integer("Digits after the decimal point", 0, 15, 6),
        },
        ["expression"],
    ),
    _tool(
        "code_search",
        "Find lines in the source code that match a regular expression, with their surroundings.",
        {
            "pattern": _string("Regular expression", 200),
            "path": _string("Folder to search, relative to the root of the workspace", 300, default="."),
            "language": {
                "type": "string",
                "description": "Only files of this language",
                "enum": ["any", "python", "typescript", "go", "rust", "java", "c++"],
                "default": "any",
            },
            "context_lines": _integer("Lines to show before and after each match", 0, 20, 2),
        },
        ["pattern"],
    ),
    _tool(
        "list_directory",
        "List the files and folders in a folder of the workspace.",
        {
            "path": _string("Path relative to the root of the workspace", 300),
            "depth": _integer("How many levels down to go", 1, 5, 1),
        },
        ["path"],
    ),
    _tool(
        "get_weather",
        "Get the weather forecast for a place.",
        {
            "city": _string("Name of the city, with its country where that is not clear", 100),
            "days": _integer("How many days ahead", 1, 14, 3),
            "units": {"type": "string", "description": "Units", "enum": ["metric", "imperial"], "default": "metric"},
        },
        ["city"],
    ),
)


# What shows how a server behaves: progress, and calls whose time and size are the caller's to choose.
MORE_TOOLS: tuple[ToolSpec, ...] = (
    _tool(
        "slow_job",
        "Run a job that takes a while and tells of its progress.",
        {
            "seconds": {
                "type": "number",
                "description": "How long it takes",
                "minimum": 0,
                "maximum": 3_600,
                "default": 2,
            },
            "steps": _integer("How often it tells of its progress", 1, 1_000, 5),
        },
        [],
    ),
    _tool(
        "synthetic",
        "Wait and return filler text, as long and as many as the server's distributions or the arguments say.",
        {
            "latency_s": {"type": "number", "description": "Seconds to wait", "minimum": 0, "maximum": 3_600},
            "result_tokens": _integer("Words to return", 0, MAX_RESULT_TOKENS, 300),
        },
        [],
    ),
)
ALL_TOOLS = (*TOOLS, *MORE_TOOLS)


@dataclass(frozen=True)
class Behaviour:
    """How the tools answer: latency in seconds (a number or a distribution), length in tokens (None: a call does its tool's work and has
    its own length), seed of the draws. `synthetic_...`: of the tool that does nothing but wait and fill; its latency is that of the others
    where None. At most `concurrency` calls run and `queue` wait for them; None: no limit. `tools`: the names of those there are."""

    latency_s: Latency = 0.2
    result_tokens: int | None = None
    seed: int = 0
    synthetic_latency_s: Latency | None = None
    synthetic_tokens: Latency = field(
        default_factory=lambda: {"dist": "lognormal", "mean": 300, "cv": 1, "max": 20_000}
    )
    concurrency: int | None = None
    queue: int | None = None
    tools: Sequence[str] = tuple(spec.name for spec in ALL_TOOLS)
    faults: Sequence[ToolFault] = ()


def _number(spec: Mapping[str, Any], key: str, default: float) -> float:
    value = spec.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{key} = {value!r}: it must be a number >= 0")
    return float(value)


def check_latency(latency: Latency) -> None:
    """Raise ValueError, in one line, where `latency` (seconds) is neither a number >= 0 nor a distribution."""
    if not isinstance(latency, Mapping):
        if _number({"latency_s": latency}, "latency_s", 0.0) > MAX_MEAN_S:
            raise ValueError(f"latency_s = {latency!r}: it must be at most {MAX_MEAN_S:g}")
        return
    if unknown := sorted(set(latency) - {"dist", "mean", "cv", "min", "max"}):
        raise ValueError(f"{unknown[0]!r} is no part of a distribution: it may have dist, mean, cv, min, max")
    if latency.get("dist") not in DISTRIBUTIONS:
        raise ValueError(f"dist = {latency.get('dist')!r}: it must be one of {', '.join(DISTRIBUTIONS)}")
    if latency["dist"] == "uniform":
        if "min" not in latency or "max" not in latency:
            raise ValueError("a uniform distribution needs min and max")
    elif "mean" not in latency:
        raise ValueError(f"a {latency['dist']} distribution needs a mean")
    for key, most in (("mean", MAX_MEAN_S), ("cv", MAX_CV)):
        if _number(latency, key, 1.0) > most:
            raise ValueError(f"{key} = {latency[key]!r}: it must be at most {most:g}")
    if _number(latency, "min", 0.0) > _number(latency, "max", math.inf):
        raise ValueError(f"min = {latency['min']!r} is above max = {latency['max']!r}")


def draw_latency_s(latency: Latency, seed: int | str) -> float:
    """One latency in seconds, the same for the same seed. `latency` must have passed `check_latency`.

    lognormal: sigma^2 = ln(1 + cv^2), mu = ln(mean) - sigma^2 / 2. gamma: shape 1 / cv^2, scale mean x cv^2. cv defaults
    to 1; an exponential's is 1. A draw outside [min, max] is moved to the nearer end, which moves the mean too.
    """
    if not isinstance(latency, Mapping):
        return float(latency)
    rng = random.Random(f"latency {seed}")
    kind, low, high = latency["dist"], _number(latency, "min", 0.0), _number(latency, "max", math.inf)
    mean, cv = _number(latency, "mean", 0.0), _number(latency, "cv", 1.0)
    if kind == "uniform":
        drawn = rng.uniform(low, high)
    elif mean < 1e-9 or kind == "constant" or (cv < 1e-6 and kind != "exponential"):
        drawn = mean  # also below what the formulas can take in floating point
    elif kind == "exponential":
        drawn = rng.expovariate(1 / mean)
    elif kind == "gamma":
        drawn = rng.gammavariate(1 / cv**2, mean * cv**2)
    else:
        variance = math.log1p(cv**2)
        drawn = rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))
    return min(max(drawn, low), high)
