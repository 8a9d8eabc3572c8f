"""Requests that a real engine served, with their stamps, and the same requests served by the engine model in virtual time.

A trace folder holds `meta.json` (model, vLLM flags, hardware) and `requests.jsonl`, a line a request: `input_toks`, `output_toks`,
`arrival_time` (Unix s) and the engine's own stamps `queued_ts`, `first_token_ts`, `last_token_ts` (monotonic s). The two clocks are
brought together by the request that was queued fastest. run_trace.py reads the same from a run's folder.
"""

import json
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lanes.virtual import APART_S
from fanmark.servers.engine.request import Request
from fanmark.servers.engine.step_time import StepLaw
from fanmark.servers.profiles import (
    Chip,
    Model,
    Profile,
    Settings,
    chip_ids,
    load_chip,
    load_model,
    model_ids,
    prior_law,
    prior_settings,
)
from fanmark.servers.replica_of import engine_config, replica_of

_END_S = 1e9  # later than any replay ends


class Served(NamedTuple):
    """Times of one request in seconds; `tpot_s` is None where there is only one token."""

    ttft_s: float
    tpot_s: float | None
    e2e_s: float


class Trigger(NamedTuple):
    """What a request waited for: the end of another (its place in the trace), and `delay_s` more."""

    place: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class Trace:
    """What was asked, by arrival, and how it was served. `client_side`: the stamps are a client's, so host costs are in them.

    `triggers`, by place: a request that has one arrives by it, whatever its `arrived_at`; empty: none has. `weights`, by place: how
    much a request's times count in a fit; empty: all alike. `cached`, by place: prompt tokens that were in the cache. `steady_s`, by place:
    the gap between its tokens but for stalls, where that is known. `shared_tokens`: a prefix of that many tokens, the ids from 0 on, is put
    into the cache before the first request.
    """

    name: str
    model: Model
    chip: Chip
    settings: Settings
    requests: list[Request]
    served: list[Served]
    client_side: bool
    triggers: list[Trigger | None] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    steady_s: list[float | None] = field(default_factory=list)
    shared_tokens: int = 0
    caveats: list[str] = field(default_factory=list)
    budget_known: bool = True
    blocks_known: bool = True

    def prior(self) -> Profile:
        """The profile of this trace's model, chip and settings that nobody has fitted yet."""
        law = prior_law(self.model, self.chip, self.settings)
        return Profile(self.name, self.model, self.chip, self.settings, law, "priors", "priors", self.chip.as_of, "C")


def replay(profile: Profile, law: StepLaw, trace: Trace) -> list[Served]:
    """The trace's requests through an engine with the trace's settings and `law`; by the order of the trace.

    They arrive at their times, or as long after what they waited for as they did: a slower law delays what follows, as it would. What a
    client sends at once arrives one by one.
    """
    if not trace.client_side:
        law = replace(law, ingress_s=0.0, egress_s=0.0)
    used = replace(profile, settings=trace.settings, law=law)
    replica = replica_of(used, engine_config(used), stream=False)
    if trace.shared_tokens:
        replica.add(Request("shared", range(trace.shared_tokens), range(1)), 0.0)
    triggers = trace.triggers or [None] * len(trace.requests)
    followers: dict[str, list[tuple[float, int]]] = {}
    due: list[tuple[float, int]] = []
    for place, (request, trigger) in enumerate(zip(trace.requests, triggers, strict=True)):
        if trigger is None:
            due.append((request.arrived_at, place))
        else:
            followers.setdefault(trace.requests[trigger.place].id, []).append((trigger.delay_s, place))
    heapify(due)
    served: dict[int, Served] = {}
    arrived: dict[str, tuple[float, int]] = {}
    sent_at: dict[int, float] = {}
    free_at, apart_s = 0.0, APART_S if trace.client_side else 0.0
    while due or len(arrived) > len(served):
        until = replica.next_at() if followers else None
        if due and (until is None or due[0][0] <= until):
            at, place = heappop(due)
            if at < free_at:
                heappush(due, (free_at, place))
                sent_at.setdefault(place, at)
                continue
            request = trace.requests[place]
            arrived[request.id] = sent_at.pop(place, at), place
            replica.add(request, at)
            free_at = at + apart_s
            continue
        for event in replica.advance(_END_S if until is None else until):
            if event.id not in arrived:
                continue
            at, place = arrived[event.id]
            tokens = len(trace.requests[place].output)
            tpot = (event.at - event.first_at) / (tokens - 1) if tokens > 1 else None
            served[place] = Served(event.first_at - at, tpot, event.at - at)
            for delay_s, follower in followers.pop(event.id, ()):
                heappush(due, (event.at + delay_s, follower))
    return [served[place] for place in range(len(trace.requests))]


def load_trace(folder: Path, model: Model | None = None, chip: Chip | None = None) -> Trace:
    """A trace folder; model and chip are those of its meta.json unless given. Raises ScenarioError naming what is missing."""
    if (folder / "requests.jsonl").is_file() and (folder / "meta.json").is_file():
        return _engine_trace(folder, model, chip)
    raise ScenarioError(f"{folder}: no trace: give a folder with requests.jsonl and meta.json")


class _Line(msgspec.Struct):
    input_toks: int
    output_toks: int
    arrival_time: float
    queued_ts: float
    first_token_ts: float
    last_token_ts: float


def read_lines(path: Path, kind: type[Any]) -> list[Any]:
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(msgspec.json.decode(line, type=kind))
        except msgspec.MsgspecError as error:
            raise ScenarioError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ScenarioError(f"{path} is empty: a trace needs at least one request")
    return found


def _engine_trace(folder: Path, model: Model | None, chip: Chip | None) -> Trace:
    try:
        meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        flags: dict[str, Any] = meta["engine_kwargs"]
    except (ValueError, KeyError, TypeError) as error:
        raise ScenarioError(
            f"{folder / 'meta.json'}: {error!r}: it must be JSON with engine_kwargs, vLLM's flags"
        ) from None
    caveats: list[str] = []
    if model is None or chip is None:
        found_model, found_chip, caveats = _parts(meta, folder.name)
        model, chip = model or found_model, chip or found_chip
    lines: list[_Line] = sorted(read_lines(folder / "requests.jsonl", _Line), key=lambda r: r.arrival_time)
    offset = min(r.queued_ts - r.arrival_time for r in lines)
    start_at = lines[0].arrival_time
    requests, served = [], []
    for number, r in enumerate(lines):
        arrived = r.arrival_time + offset
        requests.append(unique_request(str(number), r.input_toks, r.output_toks, r.arrival_time - start_at))
        tpot = (r.last_token_ts - r.first_token_ts) / (r.output_toks - 1) if r.output_toks > 1 else None
        served.append(Served(r.first_token_ts - arrived, tpot, r.last_token_ts - arrived))
    settings = _settings(meta, flags, model, chip)
    return Trace(folder.name, model, chip, settings, requests, served, client_side=False, caveats=caveats)


PROMPT_SPAN = 1 << 24


def unique_request(name: str, input_tokens: int, output_tokens: int, arrived_at: float) -> Request:
    """A request whose token ids no other name's has."""
    base = (int(name) + 1) * PROMPT_SPAN
    prompt = range(base, base + input_tokens)
    return Request(name, prompt, range(base + input_tokens, base + input_tokens + output_tokens), arrived_at=arrived_at)


def _parts(meta: dict[str, Any], folder: str) -> tuple[Model, Chip, list[str]]:
    """The model by its Hugging Face name, the chip by the device's name or the folder's; a template for one that is not known."""
    caveats = []
    name = str(meta.get("model", ""))
    short = _letters(name.rpartition("/")[2])
    models = [
        m
        for m in map(load_model, model_ids())
        if short and _letters(m.hf_id.rpartition("/")[2]) in (short, f"{short}instruct")
    ]
    if not models:
        caveats.append(f"model {name or 'without a name'} is not known: fitted from the dimensions of llama-3.1-8b")
    hardware = meta.get("hardware") or {}
    device = _letters(f"{hardware.get('device_name', '')} {folder}")
    chips = sorted((c for c in chip_ids() if _letters(c) in device), key=len)
    if not chips:
        shown = hardware.get("device_name") or folder
        caveats.append(f"chip of {shown} is not known: fitted from h100 as a template, efficiencies mean nothing")
    return (models or [load_model("llama-3.1-8b")])[0], load_chip(chips[-1] if chips else "h100"), caveats


def _letters(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def _settings(meta: dict[str, Any], flags: dict[str, Any], model: Model, chip: Chip) -> Settings:
    resolved = meta.get("resolved_config") or {}
    scheduler = resolved.get("scheduler_config") or {}
    cache = meta.get("kv_cache") or resolved.get("cache_config") or {}
    chips = int(flags.get("tensor_parallel_size") or 1)
    utilization = float(cache.get("gpu_memory_utilization") or flags.get("gpu_memory_utilization") or 0.92)
    known = {
        "max_num_seqs": flags.get("max_num_seqs") or scheduler.get("max_num_seqs"),
        "max_num_batched_tokens": flags.get("max_num_batched_tokens") or scheduler.get("max_num_batched_tokens"),
        "max_model_len": flags.get("max_model_len") or (resolved.get("model_config") or {}).get("max_model_len"),
        "num_blocks": cache.get("num_gpu_blocks"),
        "block_size": cache.get("block_size"),
        "data_parallel": flags.get("data_parallel_size"),
        "asynchronous": scheduler.get("async_scheduling"),
        "expert_parallel": flags.get("enable_expert_parallel"),
    }
    given = {key: value for key, value in known.items() if value is not None}
    return replace(prior_settings(model, chip, chips, utilization), **given)
