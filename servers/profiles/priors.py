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


def kv_shards(model: Model, chip: Chip, chips: int) -> int:
    """Chips that the KV cache of a token is split over: no more than the model has KV heads, as further chips hold copies.

    Chips of SRAM are stages of a pipeline: each holds the cache of its own layers only.
    """
    return chips if chip.kind == "lpu" else min(chips, model.kv_shards)


def kv_blocks(
    model: Model, chip: Chip, chips: int, utilization: float = 0.92, block_size: int = 16, state_seqs: int = 0
) -> int:
    """KV blocks of one engine on `chips` chips, the null block included; `state_seqs` sequences' linear state is set aside.

    floor((memory * utilization - overhead - weights / g) / (bytes a token / g_kv * block size)), g_kv = min(g, KV heads).
    """
    left = _left_bytes(model, chip, chips, utilization) - state_seqs * model.state_bytes_per_seq / chips
    per_token = (model.kv_bytes_per_token + model.window_kv_bytes_per_token) / kv_shards(model, chip, chips)
    blocks = floor(left / (per_token * block_size)) if left > 0 else 0
    if blocks < 2:
        raise ProfileError(
            f"{model.id} does not fit {chips} x {chip.id}: weights take {model.total_weight_bytes / 1e9:.0f} GB of "
            f"{chips * (chip.memory_bytes or 0) / 1e9:.0f} GB; use {fewest_chips(model, chip, utilization)} chips"
        )
    return blocks


def _left_bytes(model: Model, chip: Chip, chips: int, utilization: float) -> float:
    return _usable_bytes(chip, utilization) - model.total_weight_bytes / chips


def prior_settings(model: Model, chip: Chip, chips: int | None = None, utilization: float = 0.92) -> Settings:
    """vLLM's defaults for a model on a chip, on as few chips as hold it unless told.

    A model with linear attention gets no more sequences than half of the memory beside the weights has room for state.
    """
    g = chips or fewest_chips(model, chip, utilization)
    tokens, seqs = default_budget(chip)
    state_seqs = 0
    if model.state_bytes_per_seq:
        room = max(0.0, _left_bytes(model, chip, g, utilization)) * g
        state_seqs = seqs = max(1, min(seqs, int(0.5 * room / model.state_bytes_per_seq)))
    return Settings(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        num_blocks=kv_blocks(model, chip, g, utilization, state_seqs=state_seqs),
        tensor_parallel=g,
        max_model_len=model.max_model_len,
        gpu_memory_utilization=utilization,
    )


def arithmetic_field(model: Model, chip: Chip) -> str:
    """Which figure of the chip the model's products run at: 4-bit and 8-bit weights on its 8-bit units where it has them."""
    narrow = (model.expert_weight_bytes or model.weight_bytes) <= 1.0
    if narrow and chip.flops_fp8:
        return "flops_fp8"
    return "flops_bf16"


def _flops(model: Model, chip: Chip) -> float:
    rate = chip.flops_fp8 if arithmetic_field(model, chip) == "flops_fp8" else chip.flops_bf16
    if not rate and chip.flops_fp8:
        rate = chip.flops_fp8 / 2  # unknown: 16-bit products usually run at half the 8-bit rate
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
    kv_read = (chip.bandwidth_bytes_per_s or 0.0) * eta.kv * kv_shards(model, chip, g)
    ranks = settings.data_parallel if settings.expert_parallel else 1
    link = chip.link_bytes_per_s or 32e9
    gpu = chip.kind == "gpu"
    # A pipeline of SRAM chips costs its stages whatever the batch: some 40 us a layer, from about 300 tokens/s a user for a 70B model.
    fixed_s = 4e-5 * model.depth if chip.kind == "lpu" else 1.5e-3
    collective = g > 1 and chip.kind != "lpu"
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
        fixed_s=fixed_s,
        knee=3.0,
        expert_ranks=ranks,
        collective_s=2 * model.depth * 8e-6 if collective else 0.0,
        collective_token_s=2 * model.depth * model.width * 2 * 2 * (g - 1) / (g * link) if collective else 0.0,
        graph_limit_tokens=GRAPH_LIMIT_TOKENS,
        graph_launch_s=1.5e-3 if gpu else 0.0,
        eager_launch_s=(2e-3 if model.experts else 1e-3) * model.depth if gpu else 0.0,
        ingress_s=5e-3,
        egress_s=2e-3,
        idle_w=g * (chip.idle_watts if chip.idle_watts is not None else 0.1 * watts),
        memory_w=g * 0.6 * watts,
        compute_w=g * 0.75 * watts,
    )
