"""Parameters and lengths that were published or measured, by name: the explicit table of them all, each with its source.

A preset whose claim is told is under test: the claim stands beside what was measured, and is no result of ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Claim:
    """What somebody says a query costs: from `low` to `high` times the baseline ("x") or in number ("per query"). It rarely says of what:
    `resources` are those that it is held against."""

    text: str
    unit: Literal["x", "per query"]
    low: float
    high: float
    resources: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Preset:
    """A topology's parameters and lengths as a scenario writes them; what is left out has its default."""

    name: str
    summary: str
    topology: str
    source: str
    params: Mapping[str, Any] = field(default_factory=dict)
    workload: Mapping[str, Any] = field(default_factory=dict)
    claim: Claim | None = None


_COSTS = ("calls", "input_tokens", "fresh_tokens", "output_tokens", "latency_s", "work_s", "gpu_s", "dollars")
_FOUR_AGENTS = Claim(
    text="a query costs 1.5 to 2.5 times a single pass, not 4 times",
    unit="x",
    low=1.5,
    high=2.5,
    resources=_COSTS,
    source="coverage of the launch of Grok 4.20 (nextbigfuture.com, 17 February 2026); in no document of xAI",
)
_TABLE = (
    Preset(
        name="du-debate",
        summary="debate as in its first paper: no system prompt, own history, majority vote by the client",
        topology="debate",
        source="arXiv 2305.14325, and its code (gen_gsm.py); a later round repeats the question, so F = 40 + question",
        params={"agents": 3, "rounds": 2, "judge": "none", "transcript": "full"},
        workload={"system": 0, "role": 0, "question": 200, "instruction": 240},
    ),
    Preset(
        name="sparse-debate",
        summary="every agent hears its two neighbours on a ring",
        topology="debate",
        source="the ring: arXiv 2406.11776; a saving of 94.5 % of tokens by silence: arXiv 2502.04790. The sizes are ours",
        params={"agents": 6, "rounds": 3, "judge": "none", "transcript": "full", "neighbours": 2},
    ),
    Preset(
        name="group-debate",
        summary="three groups debate among themselves; after each stage they pass one answer on",
        topology="debate",
        source="arXiv 2409.14051 (there a summary is passed on; it saves up to 51.7 % of a debate's tokens). The sizes are ours",
        params={"agents": 6, "rounds": 4, "judge": "none", "groups": 3, "stage_rounds": 2},
    ),
    Preset(
        name="four-agent-debate",
        summary="four agents, two rounds and a judge",
        topology="debate",
        source="the shape that the claim brings to mind, by this tool's defaults",
        params={"agents": 4, "rounds": 2, "judge": "last"},
        claim=_FOUR_AGENTS,
    ),
    Preset(
        name="mad",
        summary="two sides and a judge, three rounds at most",
        topology="two-sided-debate",
        source="arXiv 2305.19118; how often its judge ends a debate early is not published: set stop_probability",
        params={"rounds": 3, "system": "own"},
    ),
    Preset(
        name="chateval",
        summary="three referees with a role each speak one by one",
        topology="round-robin",
        source="arXiv 2308.07201 (two to four referees, one by one)",
        params={"agents": 3, "rounds": 2, "system": "own"},
    ),
    Preset(
        name="grok-4",
        summary="leader and three specialists in short rounds",
        topology="panel",
        source="docs.x.ai, multi-agent: agent_count 4, a leader synthesises. Rounds and lengths are not published: they are ours",
        params={"specialists": 3, "rounds": 2},
        workload={"turn": 100},
        claim=_FOUR_AGENTS,
    ),
    Preset(
        name="grok-16",
        summary="leader and fifteen specialists in short rounds",
        topology="panel",
        source="docs.x.ai, multi-agent: agent_count 16 (effort high). Rounds and lengths are not published: they are ours",
        params={"specialists": 15, "rounds": 2},
        workload={"turn": 100},
    ),
    Preset(
        name="deep-research",
        summary="a lead, four researchers with three tools at once, a citation pass",
        topology="orchestrator",
        source="anthropic.com/engineering/multi-agent-research-system (3 to 5 subagents, 3 or more tools each); the rest is ours",
        params={"workers": 4, "waves": 1, "tool_calls": 9, "tools_per_step": 3, "citations": True},
        workload={"tool_result": 1000},
        claim=Claim(
            text="about 15 times the tokens of a chat",
            unit="x",
            low=15,
            high=15,
            resources=("input_tokens", "output_tokens"),
            source="anthropic.com/engineering/multi-agent-research-system, 13 June 2025",
        ),
    ),
    Preset(
        name="research-agent",
        summary="one agent with tools, as each researcher of deep-research",
        topology="tool-chain",
        source="anthropic.com/engineering/multi-agent-research-system compares it with many; the sizes are ours",
        params={"tool_calls": 9, "tools_per_step": 3},
        workload={"tool_result": 1000},
        claim=Claim(
            text="about 4 times the tokens of a chat",
            unit="x",
            low=4,
            high=4,
            resources=("input_tokens", "output_tokens"),
            source="anthropic.com/engineering/multi-agent-research-system, 13 June 2025",
        ),
    ),
    Preset(
        name="self-consistency-40",
        summary="forty samples of one prompt",
        topology="self-consistency",
        source="arXiv 2203.11171",
        params={"samples": 40},
    ),
    Preset(
        name="tot-game24",
        summary="tree of thought on the Game of 24",
        topology="tree-of-thought",
        source="arXiv 2305.10601: d = 3, b = 5, three votes; thought and vote are so long that the output is its 5.5k tokens a case",
        params={"depth": 3, "samples": 5, "beam": 5, "votes": 3},
        workload={"answer": 70, "vote": 10},
    ),
    Preset(
        name="moa",
        summary="three layers of six proposers",
        topology="mixture-of-agents",
        source="arXiv 2406.04692",
        params={"layers": 3, "agents": 6},
    ),
    Preset(
        name="moa-lite",
        summary="two layers of six proposers",
        topology="mixture-of-agents",
        source="arXiv 2406.04692",
        params={"layers": 2, "agents": 6},
    ),
    Preset(
        name="coding-tracelab",
        summary="a request to a coding agent, as traced: few tool calls mostly, hundreds at times",
        topology="coding-agent",
        source="TraceLab, arXiv 2606.30560: 10.8 tool calls a request, median 2; 523 tokens out and 6.4k new a step of 1.2 tool calls. "
        "Without the context of the session before it, which is most of the 153.7k that a step reads",
        params={
            "tool_calls": {"dist": "lognormal", "mean": 12.2, "cv": 6.0, "max": 300},
            "context_limit": 100000,
        },
        workload={"action": 436, "tool_result": 4900},
    ),
    Preset(
        name="tools-10-50",
        summary="a tool chain of 10 to 50 tool calls",
        topology="tool-chain",
        source="the claim's range, each number in it as likely",
        params={"tool_calls": {"dist": "uniform", "mean": 30, "cv": 0.385, "min": 10, "max": 50}},
        claim=Claim(
            text="a tool-using agent makes 10 to 50 sub-queries a question",
            unit="per query",
            low=10,
            high=50,
            resources=("calls", "tool_calls"),
            source="said by vendors, with no trace; TraceLab (arXiv 2606.30560) has 2 tool calls a request in the median, p90 30",
        ),
    ),
)


def presets() -> Mapping[str, Preset]:
    """All presets by name."""
    return {preset.name: preset for preset in _TABLE}
