"""A run's folder as a trace: its calls, what each of them waited for, and which of them had read a cached prefix before.

Rules of the file:
1. Only calls that ended well and were streamed are in the trace. Others may have loaded the server; how many is said.
2. A call of a query waits for the calls it depends on, tool calls included. The first calls of a query in a closed loop wait for the
   latest call of the same arm (of any arm, if it is the arm's first) that ended before; those of an open loop arrive at their times.
3. A cached prefix is the beginning of an earlier call: of the same query if one is long enough, else of the same arm. What no earlier
   call explains was in the cache before the run.
4. The server's settings are not in a run's folder, unless the server was the embedded stub.
"""

import math
import tomllib
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import msgspec

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.records import bucket_gap_s
from fanmark.loadgen.traces import PROMPT_SPAN, Served, Trace, Trigger, read_lines
from fanmark.servers.engine.request import Request
from fanmark.servers.profiles import Chip, Model, ProfileError, Settings, load_profile, prior_settings

LEAD_S = 1000.0  # before the first call of a run: time to fill the cache
_STEADY_TOKENS = 31  # gaps from which a gap is read
_ARM_COUNTS_AS = 16.0  # calls that each arm weighs in a fit, however many it has


class _Call(msgspec.Struct):
    kind: str
    arm: str = ""
    query: int = 0
    call: int = 0
    after: list[int] = []
    target: str | None = None
    samples: int = 1
    sent_at: float | None = None
    first_at: float | None = None
    done_at: float | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None
    gaps: dict[int, int] = {}


class _Stamped(msgspec.Struct):
    """A call of which all is known that a trace needs."""

    record: _Call
    sent_at: float
    first_at: float
    done_at: float
    input_tokens: int
    cached_tokens: int
    output_tokens: int


def load_run(folder: Path, model: Model, chip: Chip, kv_blocks: int | None = None) -> Trace:
    """The calls of a run's folder as a trace; its caveats say what was left out or assumed. Raises ScenarioError."""
    records: list[_Call] = read_lines(folder / "calls.jsonl", _Call)
    sent = [c for c in records if c.kind == "call" and c.sent_at is not None]
    targets = {c.target for c in sent}
    if len(targets) > 1:
        shown = ", ".join(sorted(map(str, targets)))
        raise ScenarioError(f"{folder}: calls to several targets ({shown}): a profile is fitted on a run against one")
    calls = sorted((s for c in sent if (s := _stamped(c)) is not None), key=lambda s: (s.sent_at, s.first_at))
    if len(calls) < 10:
        raise ScenarioError(f"{folder}: {len(calls)} calls with stamps and token counts: a fit needs 10 at least")
    scenario = _scenario(folder)
    stub = _stub_settings(scenario)
    settings, caveats = stub or prior_settings(model, chip), []
    if stub is None:
        caveats.append(
            f"the run does not tell the server's settings: max_num_seqs {settings.max_num_seqs}, max_num_batched_tokens "
            f"{settings.max_num_batched_tokens} and {settings.tensor_parallel} chips are defaults"
        )
    if len(sent) > len(calls):
        caveats.append(f"{len(sent) - len(calls)} calls that failed or were not streamed are left out")
    longest = max(s.input_tokens + s.output_tokens for s in calls)
    held = _blocks_held(calls, settings.block_size)
    settings = replace(
        settings,
        max_model_len=max(settings.max_model_len, longest),
        num_blocks=kv_blocks or max(settings.num_blocks, held + 1),
    )
    closed = scenario.get("load", {}).get("mode") == "closed"
    triggers = _triggers(calls, {(c.arm, c.query, c.call): c for c in records}, closed)
    requests, shared = _requests(calls, settings.block_size)
    return Trace(
        folder.name,
        model,
        chip,
        settings,
        requests,
        [_served(s) for s in calls],
        client_side=True,
        triggers=triggers,
        weights=_weights(calls),
        cached=[s.cached_tokens for s in calls],
        steady_s=[_steady_s(s) for s in calls],
        shared_tokens=shared,
        caveats=caveats,
        budget_known=stub is not None,
        blocks_known=stub is not None or kv_blocks is not None,
    )


def _stamped(c: _Call) -> _Stamped | None:
    if c.error is not None or None in (c.sent_at, c.first_at, c.done_at, c.input_tokens, c.output_tokens):
        return None
    known: Any = c
    if c.samples > 1 or not c.input_tokens or not c.output_tokens or known.first_at < known.sent_at:
        return None
    if known.first_at == known.done_at and c.output_tokens > 1:
        return None  # all tokens came at once: when the first was there is not known
    cached = min(c.cached_tokens or 0, c.input_tokens - 1)
    return _Stamped(c, known.sent_at, known.first_at, known.done_at, c.input_tokens, cached, c.output_tokens)


def _served(s: _Stamped) -> Served:
    tpot = (s.done_at - s.first_at) / (s.output_tokens - 1) if s.output_tokens > 1 else None
    return Served(s.first_at - s.sent_at, tpot, s.done_at - s.sent_at)


def _steady_s(s: _Stamped) -> float | None:
    """The gap between its tokens: their mean, stalls of three medians left out; where tokens in quick succession make up for a stall,
    the mean of the middle half. A single burst without a stall is left out as well: where one long step after another reads prompts,
    the first token of the one comes out with that of the other."""
    count = s.output_tokens - 1
    if count < _STEADY_TOKENS:
        return None
    span_s, seen = s.done_at - s.first_at, s.record.gaps
    gaps = sorted(bucket_gap_s(bucket) for bucket, n in seen.items() for _ in range(n))
    if len(gaps) != count:
        return span_s / count  # several tokens a chunk
    median_s = gaps[count // 2]
    stalls = [gap_s for gap_s in gaps if gap_s > 3.0 * median_s]
    if stalls and gaps[0] < median_s / 2.0:
        middle = gaps[count // 4 : -(count // 4)]
        return math.fsum(middle) / len(middle)
    single = gaps[0] < median_s / 3.0 <= gaps[1]
    left_out = [*stalls, *gaps[:single]]
    return (span_s - math.fsum(left_out)) / (count - len(left_out))


def _scenario(folder: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((folder / "scenario.toml").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ScenarioError(f"{folder / 'scenario.toml'}: {error}: it must be what the run wrote") from None


def _stub_settings(scenario: dict[str, Any]) -> Settings | None:
    """The embedded stub's settings, by its profile."""
    profile = scenario.get("stub", {}).get("profile")
    if profile is None or scenario.get("targets"):
        return None
    try:
        return load_profile(profile).settings
    except ProfileError:
        return None  # a file that is no longer there


def _blocks_held(calls: Sequence[_Stamped], block_size: int) -> int:
    """The most KV blocks that decoding calls held at once, cached prefixes left out: the server has at least these."""
    most = held = 0
    ends: list[tuple[float, int]] = []
    for s in sorted(calls, key=lambda s: s.first_at):
        while ends and ends[0][0] <= s.first_at:
            held -= heappop(ends)[1]
        blocks = -(-(s.input_tokens - s.cached_tokens) // block_size)
        heappush(ends, (s.done_at, blocks))
        held += blocks
        most = max(most, held)
    return max(most, max(-(-(s.input_tokens + s.output_tokens) // block_size) for s in calls))


def _weights(calls: Sequence[_Stamped]) -> list[float]:
    """Every arm counts alike, warm-up not at all."""
    counted = Counter(s.record.arm for s in calls if s.record.query >= 0)
    return [float((_ARM_COUNTS_AS / counted[s.record.arm]) ** 0.5) if s.record.query >= 0 else 0.0 for s in calls]


def _triggers(
    calls: Sequence[_Stamped], records: dict[tuple[str, int, int], _Call], closed: bool
) -> list[Trigger | None]:
    places = {id(s.record): place for place, s in enumerate(calls)}
    everything: list[tuple[float, int]] = sorted((s.done_at, place) for place, s in enumerate(calls))
    by_arm: dict[str, list[tuple[float, int]]] = {}
    for done_at, place in everything:
        by_arm.setdefault(calls[place].record.arm, []).append((done_at, place))
    triggers: list[Trigger | None] = []
    for place, s in enumerate(calls):
        found: int | None = None
        ancestors = _ancestors(s.record, records)
        waited = [places[id(c)] for c in ancestors if id(c) in places]
        if waited:
            found = max(waited, key=lambda p: calls[p].done_at)
        elif closed and not ancestors:
            before = _last(by_arm[s.record.arm], s.sent_at, place)
            found = before if before is not None else _last(everything, s.sent_at, place)
        delay_s = s.sent_at - calls[found].done_at if found is not None else 0.0
        triggers.append(Trigger(found, delay_s) if found is not None and delay_s >= 0.0 else None)
    return triggers


def _ancestors(call: _Call, records: dict[tuple[str, int, int], _Call]) -> list[_Call]:
    """The calls that it waited for; through tool calls, those that these waited for."""
    found: list[_Call] = []
    for number in call.after:
        c = records.get((call.arm, call.query, number))
        if c is not None:
            found += [c] if c.kind == "call" else _ancestors(c, records)
    return found


def _last(ended: Sequence[tuple[float, int]], sent_at: float, place: int) -> int | None:
    """The latest to end at or before `sent_at`, but itself."""
    at = bisect_right(ended, (sent_at, 1 << 60)) - 1
    while at >= 0 and ended[at][1] == place:
        at -= 1
    return ended[at][1] if at >= 0 else None


def _requests(calls: Sequence[_Stamped], block_size: int) -> tuple[list[Request], int]:
    """The requests, with token ids that are equal where prefixes were; and how many tokens were cached before the run."""
    requests: list[Request] = []
    shared = 0
    by_query: dict[tuple[str, int], list[int]] = {}
    by_arm: dict[str, list[int]] = {}
    for place, s in enumerate(calls):
        arm, query = s.record.arm, s.record.query
        cached = s.cached_tokens // block_size * block_size
        base = (place + 1) * PROMPT_SPAN
        prompt: Sequence[int] = range(base, base + s.input_tokens)
        if cached:
            earlier = [by_query.get((arm, query), []), by_arm.get(arm, [])]
            source = next((p for group in earlier for p in reversed(group) if _covers(calls[p], s, cached)), None)
            if source is None:
                shared = max(shared, cached)
                prefix: Sequence[int] = range(cached)
            else:
                prefix = [*requests[source].prompt, *requests[source].output][:cached]
            prompt = [*prefix, *prompt[cached:]]
        output = range(base + s.input_tokens, base + s.input_tokens + s.output_tokens)
        requests.append(Request(str(place), prompt, output, arrived_at=LEAD_S + s.sent_at - calls[0].sent_at))
        by_query.setdefault((arm, query), []).append(place)
        by_arm.setdefault(arm, []).append(place)
    return requests, shared


def _covers(earlier: _Stamped, s: _Stamped, cached: int) -> bool:
    """Whether it was in the cache, and is long enough."""
    in_cache = earlier.input_tokens if earlier.done_at > s.sent_at else earlier.input_tokens + earlier.output_tokens - 1
    return earlier.first_at <= s.first_at and in_cache >= cached
