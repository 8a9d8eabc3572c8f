"""Requests that a real engine served, with their stamps, and the same requests served by the engine model in virtual time.

A trace folder holds `meta.json` (model, vLLM flags, hardware) and `requests.jsonl`, a line a request: `input_toks`, `output_toks`,
`arrival_time` (Unix s) and the engine's own stamps `queued_ts`, `first_token_ts`, `last_token_ts` (monotonic s). The two clocks are
brought together by the request that was queued fastest. A run's folder (calls.jsonl) gives the same from the client's side.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fanmark.loadgen.errors import ScenarioError
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


@dataclass(frozen=True, slots=True)
class Trace:
    """What was asked, by arrival, and how it was served. `client_side`: the stamps are a client's, so host costs are in them.

    `shared_tokens`: the longest prefix that was in the cache; it is put there before the first request.
    """

    name: str
    model: Model
    chip: Chip
    settings: Settings
    requests: list[Request]
    served: list[Served]
    client_side: bool
    shared_tokens: int = 0
    caveats: list[str] = field(default_factory=list)

    def prior(self) -> Profile:
        """The profile of this trace's model, chip and settings that nobody has fitted yet."""
        law = prior_law(self.model, self.chip, self.settings)
        return Profile(self.name, self.model, self.chip, self.settings, law, "priors", "priors", self.chip.as_of, "C")


def replay(profile: Profile, law: StepLaw, trace: Trace) -> list[Served]:
    """The trace's requests, at their times, through an engine with the trace's settings and `law`; by the order of the trace."""
    if not trace.client_side:
        law = replace(law, ingress_s=0.0, egress_s=0.0)
    used = replace(profile, settings=trace.settings, law=law)
    replica = replica_of(used, engine_config(used), stream=False)
    done = {}
    if trace.shared_tokens:
        replica.add(Request("shared", range(trace.shared_tokens), range(1)), 0.0)
    for request in trace.requests:
        replica.add(request, request.arrived_at)
    for event in replica.advance(_END_S):
        done[event.id] = event
    served = []
    for request in trace.requests:
        event, tokens = done[request.id], len(request.output)
        tpot = (event.at - event.first_at) / (tokens - 1) if tokens > 1 else None
        served.append(Served(event.first_at - request.arrived_at, tpot, event.at - request.arrived_at))
    return served


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


def _lines(path: Path, kind: type[Any]) -> list[Any]:
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
    lines: list[_Line] = sorted(_lines(folder / "requests.jsonl", _Line), key=lambda r: r.arrival_time)
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


class _Call(msgspec.Struct):
    kind: str
    sent_at: float | None = None
    first_at: float | None = None
    done_at: float | None = None
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None


_LEAD_S = 1000.0  # before the first call of a run: time to fill the cache


def load_run(folder: Path, model: Model, chip: Chip, settings: Settings) -> Trace:
    """The calls of a run's folder that ended well, as a trace. What was cached is taken to be the same prefix for all of them.

    A run does not know the server's settings: they are given. Raises ScenarioError.
    """
    calls = [c for c in _lines(folder / "calls.jsonl", _Call) if c.kind == "call" and c.error is None]
    calls = sorted(
        (c for c in calls if c.sent_at is not None and c.output_tokens and c.input_tokens), key=lambda c: c.sent_at
    )
    requests, served, shared = [], [], 0
    for number, c in enumerate(calls):
        if c.first_at is None or c.done_at is None:
            continue
        cached = min(c.cached_tokens or 0, c.input_tokens - 1) // settings.block_size * settings.block_size
        shared = max(shared, cached)
        arrived = _LEAD_S + c.sent_at - calls[0].sent_at
        requests.append(unique_request(str(number), c.input_tokens, c.output_tokens, arrived, shared=cached))
        tpot = (c.done_at - c.first_at) / (c.output_tokens - 1) if c.output_tokens > 1 else None
        served.append(Served(c.first_at - c.sent_at, tpot, c.done_at - c.sent_at))
    if len(requests) < 10:
        raise ScenarioError(f"{folder}: {len(requests)} calls with stamps and token counts: a fit needs 10 at least")
    caveats = ["the server's settings are not in a run: vLLM's defaults were taken"]
    return Trace(
        folder.name, model, chip, settings, requests, served, client_side=True, shared_tokens=shared, caveats=caveats
    )


_PROMPT_SPAN = 1 << 24


def unique_request(name: str, input_tokens: int, output_tokens: int, arrived_at: float, shared: int = 0) -> Request:
    """A request whose token ids no other name's has, but for the first `shared`, which are those of all."""
    base = (int(name) + 1) * _PROMPT_SPAN
    prompt = range(base, base + input_tokens)
    ids: Sequence[int] = prompt if not shared else [*range(shared), *prompt[shared:]]
    return Request(name, ids, range(base + input_tokens, base + input_tokens + output_tokens), arrived_at=arrived_at)


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
