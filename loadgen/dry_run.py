"""`--dry-run`: what a run would send, from the closed forms alone. Nothing is sent. Pure."""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import msgspec
from msgspec.structs import replace

from fanmark.agents.runtime import Topology
from fanmark.loadgen.arrivals import counted_numbers, of_arm
from fanmark.loadgen.claims import held
from fanmark.loadgen.costs import dollars
from fanmark.loadgen.demand import Demand, draw_demand, expected_tokens
from fanmark.loadgen.endpoint import role_key
from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.mistakes import show
from fanmark.loadgen.prefix import PrefixCache
from fanmark.loadgen.records import Call
from fanmark.loadgen.scenario import Arm, Scenario
from fanmark.loadgen.shaping import target_key
from fanmark.loadgen.table import claim_lines, columns, number
from fanmark.loadgen.target_check import carries_key, is_private
from fanmark.loadgen.users import Session, Turn, expected_with, planned_sessions, told_tokens
from fanmark.loadgen.walk import Made, walk, walk_turn
from fanmark.servers.tokenizer import Tokenizer, vocabulary

_SUMS = ("calls", "input_tokens", "output_tokens", "dollars")

_SAMPLE = 200  # queries looked at where a closed loop's duration leaves their number open

_WALKED = 20  # queries that are walked through, for their longest context and what is fresh in them
_WALKED_OF_SESSIONS = 1000  # for they differ from turn to turn


def plan(scenario: Scenario, topologies: Mapping[str, Topology]) -> dict[str, Any]:
    """Per arm: queries, calls, tool_calls, input_tokens, fresh_tokens_at_best, output_tokens, longest_context_tokens, peak_calls_in_flight,
    seconds, dollars; the same sums for its `warmup`, which are not in the others; and the claim of its preset. At best: by a perfect prefix
    cache. Dollars take nothing for cached. The peak is an upper bound: all queries at once. What cannot be known ahead is None. The schemas
    of tool servers of one's own and the rounding of a real tokenizer are not in it; the longest context is that of the first 20 queries
    (1,000 of sessions), from which fresh tokens are extrapolated."""
    schemas = cache(partial(_schema_tokens, scenario))
    numbers = counted_numbers(scenario)
    places = planned_sessions(scenario, _SAMPLE)
    found = {
        arm.name: _arm(_Arm(scenario, arm, topologies, schemas, places[arm.name]), numbers[arm.name])
        for arm in scenario.arms
    }
    base = found[scenario.baseline.name]
    for arm in scenario.arms:
        found[arm.name]["claim"] = held(arm, partial(_per_query, found[arm.name], base))
    return found


def totals(planned: Mapping[str, Any]) -> dict[str, float | None]:
    """Calls, tokens and dollars of the whole run, warm-up included; None where an arm's are not known."""
    found: dict[str, float | None] = {}
    for key in _SUMS:
        values = [part[key] for arm in planned.values() for part in (arm, arm["warmup"])]
        found[key] = None if None in values else sum(values)
    return found


def _schema_tokens(scenario: Scenario, api: str) -> int:
    """The embedded tools' schemas in a prompt, as our stub counts them."""
    from fanmark.loadgen.lanes.virtual_tools import VirtualTools
    from fanmark.loadgen.toolset import ToolSet

    if scenario.tools.server:
        return 0
    tools = VirtualTools(0.0, 0.0)
    listed = ToolSet(tools, tools.tools, replace(scenario.tools, call=[]), embedded=True).schemas
    text = msgspec.json.encode(listed).decode() if api == "completions" else json.dumps(listed)
    return len(Tokenizer(vocabulary()).encode(text)) if listed else 0


@dataclass(frozen=True)
class _Arm:
    """An arm, and how its queries are drawn: with the schemas' length."""

    scenario: Scenario
    arm: Arm
    topologies: Mapping[str, Topology]
    schemas: Callable[[str], int]
    session_of: Mapping[int, Session]  # by the place of its queries
    turns: dict[int, Turn | None] = field(default_factory=dict)  # as they are told again

    def told(self, query: int) -> list[Turn]:
        """The turns before a query in its session, which are walked through once."""
        session = self.session_of.get(query)
        found: list[Turn] = []
        for place in range(session.first, query) if session is not None else ():
            if place not in self.turns:
                self.turns[place] = asyncio.run(walk_turn(self.demand(place), found))
            turn = self.turns[place]
            found += [] if turn is None else [turn]
        return found

    def walk(self, query: int) -> list[Made]:
        """The calls of a query."""
        demand = self.demand(query)
        return asyncio.run(walk(demand.topology, demand, self.told(query)))

    def demand(self, query: int) -> Demand:
        drawn = draw_demand(self.scenario, self.arm, self.topologies, query)
        expected = drawn.topology.expected
        if expected is None or ("tools",) not in expected(drawn.params, drawn).reads:
            return drawn
        target = self.scenario.targets.get(self.arm.target or "default")
        tokens = self.schemas(target.api if target is not None else self.scenario.stub.api)
        return dataclasses.replace(drawn, lengths={**drawn.lengths, "tools": tokens})

    def sums(self, queries: Iterable[int]) -> dict[str, Any]:
        """Calls, tool calls, tokens and dollars of these queries, by the closed form; `width` is the widest one's."""
        found: dict[str, Any] = {**dict.fromkeys(_SUMS, 0), "tool_calls": 0, "width": 0}
        numbers = list(queries)
        for i in numbers:
            demand = self.demand(i)
            assert demand.topology.expected is not None
            told = self.told(i)
            form = expected_with(demand.topology.expected(demand.params, demand), told)
            output, total = expected_tokens(form, demand.lengths, told_tokens(told))
            for key, n in (
                ("calls", form.calls),
                ("tool_calls", form.tool_calls),
                ("input_tokens", total or 0),
                ("output_tokens", output),
            ):
                found[key] += n
            found["width"] = max(found["width"], form.width)
        bills = self._bills(numbers) if self.arm.targets else {self.arm.target or "default": found}
        prices = {name: target.prices for name, target in self.scenario.targets.items()}
        made = [_bill(name, sums) for name, sums in bills.items()]
        return found | {"dollars": dollars(made, prices, found["tool_calls"], self.scenario.tools.dollars_per_call)}

    def _bills(self, queries: Iterable[int]) -> dict[str, dict[str, int]]:
        """Tokens by target, where roles have different ones: by a walk through every query."""
        found: dict[str, dict[str, int]] = {}
        for i in queries:
            for made in self.walk(i):
                name = (
                    self.arm.targets.get(role_key(made.role, self.arm.targets) or "default")
                    or self.arm.target
                    or "default"
                )
                bill = found.setdefault(name, {"input_tokens": 0, "output_tokens": 0})
                bill["input_tokens"] += made.input_tokens
                bill["output_tokens"] += made.reply.tokens
        return found


def _bill(target: str, sums: Mapping[str, int]) -> Call:
    bill = Call(query=0, arm="", call=1, after=[], kind="call", role="", round=1, due_at=0.0, target=target)
    bill.input_tokens, bill.output_tokens = sums["input_tokens"], sums["output_tokens"]
    return bill


def _per_query(found: Mapping[str, Any], base: Mapping[str, Any], unit: str, resource: str) -> float | None:
    """A resource of an arm's query, or its ratio to the baseline's ("x"); None where the plan does not know it."""
    key = "fresh_tokens_at_best" if resource == "fresh_tokens" else resource
    own, against = (arm[key] / arm["queries"] if arm.get(key) is not None else None for arm in (found, base))
    if unit != "x" or own is None:
        return own
    return own / against if against else None


def _arm(arm: _Arm, numbers: Sequence[int] | None) -> dict[str, Any]:
    scenario, load = arm.scenario, arm.scenario.load_of(arm.arm)
    times = list(of_arm(scenario, arm.arm, 1)) if load.mode == "open" else []
    queries = len(numbers) if numbers is not None else None
    windowed = load.duration is not None and not load.stages  # how many go before and after is the server's to say
    unknown = dict.fromkeys((*_SUMS, "tool_calls"))
    found: dict[str, Any] = {"queries": queries, "calls": None, "tool_calls": None, "input_tokens": None}
    found |= {
        "fresh_tokens_at_best": None,
        "output_tokens": None,
        "longest_context_tokens": None,
        "peak_calls_in_flight": None,
    }
    found |= {"seconds": times[-1] if times else load.duration, "dollars": None}
    warmup = 0 if windowed else load.warmup * load.repeats
    found["warmup"] = {"queries": None if windowed else warmup, **unknown}
    drawn_by = [arm.topologies[part.topology] for part in arm.arm.mix or [arm.arm]]
    by_model = scenario.tools.decide == "model"  # how many calls there are is the model's to say
    if any(topology.expected is None or (by_model and topology.by_model is not None) for topology in drawn_by):
        return found
    n = queries if queries is not None else _SAMPLE
    sums = arm.sums(numbers if numbers is not None else range(n))
    walked = [arm.walk(i) for i in range(min(n, _WALKED_OF_SESSIONS if arm.session_of else _WALKED))]
    longest = max((made.context_tokens for query in walked for made in query), default=0)
    at_once = load.concurrency if queries is None or load.mode == "closed" else queries // load.repeats
    found |= {"longest_context_tokens": longest, "peak_calls_in_flight": at_once * sums["width"]}
    if not windowed:
        most = max(scenario.load_of(each).warmup for each in scenario.arms)
        before = arm.sums(-1 - most * repeat - i for repeat in range(load.repeats) for i in range(load.warmup))
        found["warmup"] |= {key: before[key] for key in unknown}
    if queries is None:
        return found
    found["fresh_tokens_at_best"] = _fresh_tokens(scenario, walked, n, load.warmup > 0)
    return found | {key: sums[key] for key in unknown}


def _fresh_tokens(scenario: Scenario, walked: Sequence[Sequence[Made]], queries: int, warm: bool) -> int | None:
    """Input tokens that a perfect prefix cache does not serve, of all queries; `warm`: others went before. None where arms share it."""
    cache = scenario.workload.cache
    if cache == "call":
        fresh = [sum(made.input_tokens for made in calls) for calls in walked]
    elif cache == "query":
        fresh = [PrefixCache().fresh_tokens(calls, i) for i, calls in enumerate(walked)]
    elif cache == "run" and len(scenario.arms) > 1:
        return None
    else:
        shared = PrefixCache()
        if warm and walked:
            shared.fresh_tokens(walked[0], -1)
        fresh = [shared.fresh_tokens(calls, i) for i, calls in enumerate(walked)]
    typical = fresh[1:] or fresh
    return sum(fresh) + round((queries - len(fresh)) * sum(typical) / max(len(typical), 1))


def check_guarded(scenario: Scenario, topologies: Mapping[str, Topology], sends: str | None = None) -> None:
    """Raises ScenarioError where calls would go, with a key, to a host that is not the user's own, and nothing bounds what they cost.
    `sends`: how much that is, in words, where it is not one run."""
    if scenario.budget is not None:
        return
    for name, target in scenario.targets.items():
        for url in target.replicas:
            if carries_key(target) and not is_private(url):
                sends = sends or f"this run may send {told(totals(plan(scenario, topologies)))}"
                raise ScenarioError(
                    f"{scenario.source}: {target_key(name)} url = {show(url)}: a key goes to a host that is not private, and {sends}: "
                    "give a [budget] or --yes"
                )


def lines(planned: Mapping[str, Any]) -> list[str]:
    """The plan as a table."""
    keys = [key for key in next(iter(planned.values())) if key not in ("claim", "warmup")]
    rows = [[key.replace("_", " "), *(number(arm[key]) for arm in planned.values())] for key in keys]
    claims = claim_lines(planned, "by the closed form")
    whole, before = totals(planned), [arm["warmup"]["queries"] for arm in planned.values()]
    around = "as many more as lead-in and lead-out take" if None in before else f"{sum(before)} queries of warm-up"
    return [
        *columns([["", *planned], *rows]),
        "",
        f"whole run, with {around}: {told(whole)}",
        *([""] if claims else []),
        *claims[:-1],
    ]


def told(sums: Mapping[str, float | None]) -> str:
    """What a run sends and costs, in words."""
    if sums["calls"] is None:
        return "as many calls as it takes"
    cost = f"${sums['dollars']:,.2f}" if sums["dollars"] is not None else "dollars unknown (no prices)"
    return f"{sums['calls']:,.0f} calls, {sums['input_tokens']:,.0f} tokens in, {sums['output_tokens']:,.0f} tokens out, {cost}"
