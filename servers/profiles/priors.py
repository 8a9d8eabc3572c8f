"""What an engine does that nobody has measured: settings and step law of a model on a chip, from dimensions and usual efficiencies.

Expect +-50 % of such a law. The efficiencies are means of fits on Hopper and Blackwell GPUs; on other silicon they are a guess (grade C).
"""

from dataclasses import dataclass
from math import floor

from fanmark.servers.engine.step_time import GRAPH_LIMIT_TOKENS, StepLaw
from fanmark.servers.profiles.parts import Chip, Model, ProfileError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """Shares of the data sheet that are reached, each in (0, 1]."""

    weights: float = 0.75
    compute: float = 0.55
    kv: float = 0.65
    attention: float = 0.35


@dataclass(frozen=True, slots=True)
class Settings:
    """The engine's figures, named as vLLM's flags are. `num_blocks` is vLLM's num_gpu_blocks: the null block included."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int = 16
    tensor_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False
    max_model_len: int = 32768
    gpu_memory_utilization: float = 0.92
    asynchronous: bool = True


def default_budget(chip: Chip) -> tuple[int, int]:
    """vLLM's (max_num_batched_tokens, max_num_seqs) for an API server on a chip of this memory."""
    memory = chip.memory_bytes or 0.0
    if memory >= 160 * GIB:
        return 16384, 1024
    return (8192, 1024) if memory >= 70 * GIB else (2048, 256)


def _usable_bytes(chip: Chip, utilization: float) -> float:
    if not chip.memory_bytes:
        raise ProfileError(
            f"chip {chip.id}: its memory is unknown; give memory_bytes in a profile file that contains [chip]"
        )
    # Activations and graphs beyond the utilization's own margin: three real vLLM servers left 0 to 1.2 GB.
    return chip.memory_bytes * utilization - min(GIB, 0.05 * chip.memory_bytes)


def fewest_chips(model: Model, chip: Chip, utilization: float = 0.92) -> int:
    """Smallest power of two of chips whose memory holds the weights and leaves a tenth of it to the KV cache."""
    chips = 1
    while model.total_weight_bytes / chips > 0.9 * _usable_bytes(chip, utilization):
        chips *= 2
    return chips


def kv_blocks(model: Model, chip: Chip, chips: int, utilization: float = 0.92, block_size: int = 16) -> int:
    """KV blocks of one engine on `chips` chips, the null block included.

    floor((memory * utilization - overhead - weights / g) / (bytes a token / g_kv * block size)), g_kv = min(g, KV heads).
    """
    left = _usable_bytes(chip, utilization) - model.total_weight_bytes / chips
    per_token = (model.kv_bytes_per_token + model.window_kv_bytes_per_token) / min(chips, model.kv_shards)
    blocks = floor(left / (per_token * block_size)) if left > 0 else 0
    if blocks < 2:
        raise ProfileError(
            f"{model.id} does not fit {chips} x {chip.id}: weights take {model.total_weight_bytes / 1e9:.0f} GB of "
            f"{chips * (chip.memory_bytes or 0) / 1e9:.0f} GB; use {fewest_chips(model, chip, utilization)} chips"
        )
    return blocks


def prior_settings(model: Model, chip: Chip, chips: int | None = None) -> Settings:
    """vLLM's defaults for a model on a chip, on as few chips as hold it unless told."""
    g = chips or fewest_chips(model, chip)
    tokens, seqs = default_budget(chip)
    return Settings(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        num_blocks=kv_blocks(model, chip, g),
        tensor_parallel=g,
        max_model_len=model.max_model_len,
    )


def _flops(model: Model, chip: Chip) -> float:
    """The arithmetic rate that the model's weights run at: 4-bit and 8-bit weights on the chip's 8-bit units where it has them."""
    narrow = (model.expert_weight_bytes or model.weight_bytes) <= 1.0
    rate = (chip.flops_fp8 if narrow else chip.flops_bf16) or chip.flops_bf16 or chip.flops_fp8
    if not rate or not chip.bandwidth_bytes_per_s:
        raise ProfileError(
            f"chip {chip.id}: bandwidth or FLOP/s unknown; give them in a profile file that contains [chip]"
        )
    return rate


def prior_law(model: Model, chip: Chip, settings: Settings, eta: Efficiencies | None = None) -> StepLaw:
    """The step law from dimensions and data sheet; `eta` defaults to the usual efficiencies."""
    eta = eta or Efficiencies()
    g = settings.tensor_parallel
    flops = _flops(model, chip)
    read = (chip.bandwidth_bytes_per_s or 0.0) * eta.weights * g
    kv_read = (chip.bandwidth_bytes_per_s or 0.0) * eta.kv * min(g, model.kv_shards)
    ranks = settings.data_parallel if settings.expert_parallel else 1
    link = chip.link_bytes_per_s or 32e9
    gpu = chip.kind == "gpu"
    watts = chip.watts or 0.0
    return StepLaw(
        dense_s=model.resident_weight_bytes / read,
        expert_s=model.expert_weights_bytes / max(1, model.experts) / read,
        experts=model.experts,
        top_k=model.top_k,
        token_s=2.0 * model.active_params / (g * flops * eta.compute),
        context_s=model.kv_bytes_per_token / kv_read,
        window_tokens=model.attention.window_tokens if model.attention is not None else 0,
        window_context_s=model.window_kv_bytes_per_token / kv_read,
        attention_s=model.attention_flops_per_pair / (g * flops * eta.attention),
        sequence_s=5e-6 + 2.0 * model.state_bytes_per_seq / kv_read,
        fixed_s=1.5e-3,
        knee=3.0,
        expert_ranks=ranks,
        collective_s=2 * model.depth * 8e-6 if g > 1 else 0.0,
        collective_token_s=2 * model.depth * model.width * 2 * 2 * (g - 1) / (g * link) if g > 1 else 0.0,
        graph_limit_tokens=GRAPH_LIMIT_TOKENS,
        graph_launch_s=1.5e-3 if gpu else 0.0,
        eager_launch_s=1e-3 * model.depth if gpu else 0.0,
        ingress_s=5e-3,
        egress_s=2e-3,
        idle_w=g * (chip.idle_watts if chip.idle_watts is not None else 0.1 * watts),
        memory_w=g * 0.6 * watts,
        compute_w=g * 0.75 * watts,
    )
