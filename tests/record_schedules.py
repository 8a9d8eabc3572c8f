# mypy: ignore-errors
"""Record what vLLM's own Scheduler decides, step by step (not a test: needs vLLM, no GPU; runs in vLLM's own environment).

usage: python tests/record_schedules.py MODEL_DIR OUT_DIR SEED [SEED ...]        writes OUT_DIR/SEED.json

MODEL_DIR holds a config.json and a tokenizer. The format is that of tests/data/vllm_schedules, with more in it: `config` may have
`asynchronous` (two steps on their way) and `watermark`, a request `output` (its forced tokens) and `salt`. Later prompts continue
earlier conversations, output included, as agents' do. Asynchronous: a step's `finished` are those of the result handled after it.
"""

import json
import os
import random
import sys
from collections import deque
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")

_MAX_STEPS = 5000


def workload(seed: int) -> dict[str, Any]:
    """A random small configuration and its requests."""
    draw = random.Random(seed)
    config = {
        "max_num_seqs": draw.choice([2, 3, 6, 12]),
        "max_num_batched_tokens": draw.choice([48, 64, 128, 256, 512]),
        "block_size": draw.choice([8, 16, 16]),
        "num_blocks": draw.choice([34, 40, 60, 100, 300]),
        "max_model_len": draw.choice([256, 512]),
        "policy": draw.choice(["fcfs", "fcfs", "priority"]),
        "long_prefill_token_threshold": draw.choice([0, 0, 20, 40]),
        "prefix_caching": draw.random() < 0.9,
        "watermark": draw.choice([0.0, 0.0, 0.0, 0.1]),
        "asynchronous": draw.random() < 0.6,
    }
    size = config["block_size"]
    limit = min((config["num_blocks"] - 1) * size - size, config["max_model_len"])
    heads = [_text(draw, draw.choice([16, 32, 40, 100])) for _ in range(2)]
    requests: list[dict[str, Any]] = []
    step = 0
    for i in range(draw.randrange(8, 28)):
        prompt = draw.choice(heads) if draw.random() < 0.7 else []
        kind = draw.random()
        if requests and kind < 0.25:
            before = draw.choice(requests)
            prompt = before["prompt"] + before["output"]
        elif requests and kind < 0.4:
            prompt = draw.choice(requests)["prompt"]
        if kind > 0.1:
            prompt = prompt + _text(draw, draw.randrange(1, 120))
        output = [7] * draw.randrange(1, 60) if draw.random() < 0.5 else _text(draw, draw.randrange(1, 60))
        prompt = prompt[: limit - len(output) - 1] or [5]
        if draw.random() < 0.15:
            prompt = prompt[: max(1, len(prompt) // size * size)]
        requests.append(
            {
                "id": str(i),
                "prompt": prompt,
                "output": output,
                "max_tokens": len(output),
                "add_at": step,
                "priority": draw.randrange(3) if config["policy"] == "priority" else 0,
                "abort_at": step + draw.randrange(1, 30) if draw.random() < 0.15 else None,
                "salt": draw.choice(["", "", "", "pepper"]),
            }
        )
        step += draw.choice([0, 0, 0, 1, 3, 10])
    return {"seed": seed, "config": config, "requests": requests}


def _text(draw: random.Random, tokens: int) -> list[int]:
    return [draw.randrange(100, 4000) for _ in range(tokens)]


class Recorder:
    """vLLM's scheduler with a sampler that returns the forced outputs."""

    def __init__(self, model: str, case: dict[str, Any]) -> None:
        import torch
        from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.structured_output import StructuredOutputManager

        config = case["config"]
        size = config["block_size"]
        names = (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "policy",
            "long_prefill_token_threshold",
            "watermark",
        )
        vllm_config = VllmConfig(
            model_config=ModelConfig(model=model, dtype="bfloat16", seed=0, max_model_len=config["max_model_len"]),
            scheduler_config=SchedulerConfig(
                **{name: config[name] for name in names},
                enable_chunked_prefill=True,
                is_encoder_decoder=False,
                async_scheduling=config["asynchronous"],
            ),
            cache_config=CacheConfig(block_size=size, enable_prefix_caching=config["prefix_caching"]),
        )
        vllm_config.cache_config.num_gpu_blocks = config["num_blocks"]
        spec = FullAttentionSpec(block_size=size, num_kv_heads=1, head_size=1, dtype=torch.float32)
        blocks = KVCacheConfig(config["num_blocks"], [], [KVCacheGroupSpec(["layer"], spec)])
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(size, sha256) if config["prefix_caching"] else None
        self._scheduler = (AsyncScheduler if config["asynchronous"] else Scheduler)(
            vllm_config=vllm_config,
            kv_cache_config=blocks,
            structured_output_manager=StructuredOutputManager(vllm_config),
            block_size=size,
            log_stats=True,
        )
        self._depth = 2 if config["asynchronous"] else 1
        self._flights: deque[tuple[Any, list[str]]] = deque()
        self._given: dict[str, int] = {}
        self._outputs = {request["id"]: request["output"] for request in case["requests"]}
        self.alive: set[str] = set()

    def add(self, request: dict[str, Any]) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        self.alive.add(request["id"])
        self._given[request["id"]] = 0
        self._scheduler.add_request(
            Request(
                request_id=request["id"],
                prompt_token_ids=request["prompt"],
                sampling_params=SamplingParams(max_tokens=request["max_tokens"], ignore_eos=True),
                pooling_params=None,
                block_hasher=self._hasher,
                priority=request["priority"],
                arrival_time=float(request["id"]),
                cache_salt=request["salt"] or None,
            )
        )

    def abort(self, request_id: str) -> None:
        from vllm.v1.request import RequestStatus

        self._scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.alive.discard(request_id)

    def step(self) -> dict[str, Any]:
        """Schedule once and, when enough steps are on their way, handle the oldest result."""
        scheduler = self._scheduler
        decided = scheduler.schedule()
        again = decided.scheduled_cached_reqs
        cached = {new.req_id: new.num_computed_tokens for new in decided.scheduled_new_reqs}
        for request_id, tokens in zip(again.req_ids, again.num_computed_tokens, strict=True):
            if request_id in again.resumed_req_ids:
                cached[request_id] = tokens
        record: dict[str, Any] = {
            "scheduled": dict(decided.num_scheduled_tokens),
            "preempted": sorted(decided.preempted_req_ids or ()),
            "finished": [],
            "cached": cached,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "usage": round(scheduler.kv_cache_manager.usage, 6),
        }
        if decided.num_scheduled_tokens:
            sampling = [i for i in decided.num_scheduled_tokens if self._samples(i)]
            self._flights.append((decided, sampling))
        if self._flights and (len(self._flights) == self._depth or not decided.num_scheduled_tokens):
            record["finished"] = self._handle()
        return record

    def _samples(self, request_id: str) -> bool:
        return not self._scheduler.requests[request_id].is_prefill_chunk

    def _handle(self) -> list[str]:
        from vllm.v1.outputs import ModelRunnerOutput

        decided, sampling = self._flights.popleft()
        ids = list(decided.num_scheduled_tokens)
        tokens = []
        for request_id in ids:
            sampled = []
            if request_id in sampling and request_id in self.alive:
                sampled = [self._outputs[request_id][self._given[request_id]]]
                self._given[request_id] += 1
            tokens.append(sampled)
        self._scheduler.update_from_output(
            decided,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={request_id: place for place, request_id in enumerate(ids)},
                sampled_token_ids=tokens,
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )
        done = [i for i in ids if i in self.alive and i not in self._scheduler.requests]
        self.alive.difference_update(done)
        return done


def record(model: str, seed: int) -> dict[str, Any]:
    import vllm

    case = workload(seed)
    recorder, steps = Recorder(model, case), list[dict[str, Any]]()
    todo = deque(case["requests"])
    while todo or recorder.alive:
        number = len(steps)
        while todo and todo[0]["add_at"] <= number:
            recorder.add(todo.popleft())
        for request in case["requests"]:
            if request["abort_at"] == number and request["id"] in recorder.alive:
                recorder.abort(request["id"])
        steps.append(recorder.step())
        if number > _MAX_STEPS:
            raise SystemExit(f"seed {seed} does not end")
    return {"vllm": vllm.__version__, **case, "steps": steps}


if __name__ == "__main__":
    model_dir, out_dir, *seeds = sys.argv[1:]
    for one in map(int, seeds):
        made = record(model_dir, one)
        Path(out_dir, f"{one}.json").write_text(json.dumps(made, separators=(",", ":")))
        steps = made["steps"]
        print(one, len(steps), "steps", sum(len(step["preempted"]) for step in steps), "preemptions", flush=True)
