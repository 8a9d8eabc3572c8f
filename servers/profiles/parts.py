"""Models and chips as data: one TOML file each, typed and checked on loading.

Every file names `source`, `as_of` and `confidence` for all its figures; `[grades]` overrides them field by field. Grades: A = vendor
documentation or the model's own config.json, B = several secondary sources agree, C = one source or an estimate, U = unknown.
A figure that is not known is left out, never guessed.
"""

from typing import Literal

import msgspec

Confidence = Literal["A", "B", "C", "U"]


class ProfileError(ValueError):
    """A profile, model or chip that cannot be used: one line that says what was given, what is allowed, what to do."""


class Grade(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one figure comes from, if not from where its file says."""

    confidence: Confidence
    source: str = ""
    as_of: str = ""


class Attention(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Attention of a model. Layers: full + window + linear = all. Either `kv_heads` x `head_dim` or `kv_lora` + `rope_dim` (MLA)."""

    full_layers: int
    q_heads: int
    head_dim: int
    kv_heads: int = 0
    window_layers: int = 0
    window_tokens: int = 0
    output_gate: bool = False
    bias: bool = False
    q_lora: int = 0
    kv_lora: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    linear_layers: int = 0
    linear_key_heads: int = 0
    linear_value_heads: int = 0
    linear_head_dim: int = 0
    linear_conv: int = 4


class FeedForward(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Feed-forward layers of a model: dense ones, and mixture-of-experts ones with `experts`, `top_k` and `shared` experts."""

    dense_layers: int = 0
    dense_width: int = 0
    expert_layers: int = 0
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    shared: int = 0
    expert_bias: bool = False


class Parametric(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model known, or supposed, by its totals only. Zero: not filled in."""

    total_params: float = 0.0
    active_params: float = 0.0
    layers: int = 0
    hidden: int = 0
    experts: int = 0
    top_k: int = 0
    kv_bytes_per_token: float = 0.0


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A language model. `total_params` is the published count, which the dimensions must give within 2 %."""

    id: str
    name: str
    source: str
    as_of: str
    confidence: Confidence
    hf_id: str = ""
    license: str = ""
    notes: str = ""
    warning: str = ""
    total_params: float = 0.0
    layers: int = 0
    hidden: int = 0
    vocab: int = 0
    tied_embeddings: bool = False
    weight_bytes: float = 2.0
    expert_weight_bytes: float = 0.0
    kv_bytes: float = 2.0
    max_model_len: int = 32768
    attention: Attention | None = None
    ffn: FeedForward | None = None
    parametric: Parametric | None = None
    grades: dict[str, Grade] = {}

    def __post_init__(self) -> None:
        if self.parametric is not None:
            _check_parametric(self)
            return
        if self.attention is None or self.ffn is None:
            raise ProfileError(f"model {self.id}: needs [attention] and [ffn], or [parametric] with its totals")
        counted = self.embedding_params + self.resident_params + self.expert_params
        if abs(counted - self.total_params) > 0.02 * self.total_params:
            raise ProfileError(
                f"model {self.id}: its dimensions give {counted / 1e9:.2f}e9 parameters, total_params says "
                f"{self.total_params / 1e9:.2f}e9; they may differ by 2 %: correct one of them"
            )

    @property
    def embedding_params(self) -> float:
        """Parameters of the input embedding, of which a step reads a row a token only; 0 where the output layer shares them."""
        return 0.0 if self.tied_embeddings else float(self.vocab * self.hidden)

    @property
    def expert_params(self) -> float:
        """Parameters of all routed experts of all layers."""
        if self.parametric is not None:
            p = self.parametric
            return (p.total_params - p.active_params) / (1.0 - p.top_k / p.experts) if p.experts else 0.0
        assert self.ffn is not None
        f = self.ffn
        one = 3 * self.hidden * f.expert_width + ((2 * f.expert_width + self.hidden) if f.expert_bias else 0)
        return float(f.expert_layers * f.experts * one)

    @property
    def resident_params(self) -> float:
        """Parameters that every step reads whole: all but routed experts and input embedding."""
        if self.parametric is not None:
            return self.parametric.total_params - self.expert_params
        assert self.attention is not None and self.ffn is not None
        f, h = self.ffn, self.hidden
        ffn = f.dense_layers * 3 * h * f.dense_width
        ffn += f.expert_layers * (h * f.experts + 3 * h * f.expert_width * f.shared)
        return float(self.vocab * h + ffn + _attention_params(self.attention, h))

    @property
    def counted_params(self) -> float:
        """All parameters, recomputed from the dimensions."""
        return self.embedding_params + self.resident_params + self.expert_params

    @property
    def active_params(self) -> float:
        """Parameters that one token is multiplied with: the resident ones and top_k of the experts."""
        return self.resident_params + (self.expert_params * self.top_k / self.experts if self.experts else 0.0)

    @property
    def experts(self) -> int:
        """Routed experts a layer; 0 for a dense model."""
        return (self.parametric or self.ffn).experts  # type: ignore[union-attr]

    @property
    def top_k(self) -> int:
        """Routed experts a token."""
        return (self.parametric or self.ffn).top_k  # type: ignore[union-attr]

    @property
    def depth(self) -> int:
        """Layers."""
        return self.parametric.layers if self.parametric is not None else self.layers

    @property
    def width(self) -> int:
        """Size of the hidden state."""
        return self.parametric.hidden if self.parametric is not None else self.hidden

    @property
    def resident_weight_bytes(self) -> float:
        """Bytes of weights that every step reads."""
        return self.resident_params * self.weight_bytes

    @property
    def expert_weights_bytes(self) -> float:
        """Bytes of all routed experts of all layers."""
        return self.expert_params * (self.expert_weight_bytes or self.weight_bytes)

    @property
    def total_weight_bytes(self) -> float:
        """Bytes of all weights in memory."""
        return self.resident_weight_bytes + self.expert_weights_bytes + self.embedding_params * self.weight_bytes

    @property
    def kv_bytes_per_token(self) -> float:
        """KV cache of one token in the layers that see the whole context."""
        if self.parametric is not None:
            return self.parametric.kv_bytes_per_token
        assert self.attention is not None
        return self.attention.full_layers * self._kv_bytes_a_layer()

    @property
    def window_kv_bytes_per_token(self) -> float:
        """KV cache of one token in the layers that see a window of the context."""
        return self.attention.window_layers * self._kv_bytes_a_layer() if self.attention is not None else 0.0

    def _kv_bytes_a_layer(self) -> float:
        assert self.attention is not None
        a = self.attention
        if a.kv_lora:
            return (a.kv_lora + a.rope_dim) * self.kv_bytes
        return 2 * a.kv_heads * a.head_dim * self.kv_bytes

    @property
    def state_bytes_per_seq(self) -> float:
        """State of the linear-attention layers of one sequence, in 32 bits: read and written by each of its tokens."""
        if self.attention is None:
            return 0.0
        a = self.attention
        return 4.0 * a.linear_layers * a.linear_value_heads * a.linear_head_dim**2

    @property
    def attention_flops_per_pair(self) -> float:
        """Floating-point operations for one (query token, context token) pair in all layers that see the whole context."""
        if self.attention is None:
            return 4.0 * self.depth * self.width
        a = self.attention
        dims = a.head_dim + (a.value_dim or a.head_dim)
        return 2.0 * a.full_layers * a.q_heads * dims

    @property
    def kv_shards(self) -> int:
        """Chips that the KV cache of one sequence can be split over; beyond that its heads are copied."""
        if self.attention is None:
            return 8  # grouped-query attention has 4 or 8 heads in nearly all published models
        return 1 if self.attention.kv_lora else self.attention.kv_heads


def _check_parametric(model: Model) -> None:
    p = model.parametric
    assert p is not None
    missing = [
        n for n in ("total_params", "active_params", "layers", "hidden", "kv_bytes_per_token") if not getattr(p, n)
    ]
    if missing:
        return  # a template: it can be listed, not used
    if not 0 < p.active_params <= p.total_params:
        raise ProfileError(f"model {model.id}: active_params must lie in (0, total_params]")
    if p.experts and not 0 < p.top_k < p.experts:
        raise ProfileError(f"model {model.id}: top_k = {p.top_k} must lie in 1..{p.experts - 1}")
    if p.experts and model.resident_params < 0:
        raise ProfileError(
            f"model {model.id}: top_k of {p.experts} experts alone exceed active_params: raise it or lower top_k"
        )


def unfilled(model: Model) -> list[str]:
    """The sizes that a parametric model still lacks."""
    p = model.parametric
    if p is None:
        return []
    names = ("total_params", "active_params", "layers", "hidden", "kv_bytes_per_token")
    return [name for name in names if not getattr(p, name)]


def _attention_params(a: Attention, hidden: int) -> int:
    softmax_layers = a.full_layers + a.window_layers
    q_dim = a.q_heads * a.head_dim
    if a.kv_lora:
        nope = a.head_dim - a.rope_dim
        one = hidden * a.q_lora + a.q_lora * q_dim + hidden * (a.kv_lora + a.rope_dim)
        one += a.kv_lora * a.q_heads * (nope + a.value_dim) + a.q_heads * a.value_dim * hidden
    else:
        kv_dim = a.kv_heads * a.head_dim
        one = hidden * q_dim * (2 if a.output_gate else 1) + 2 * hidden * kv_dim + q_dim * hidden
        if a.bias:
            one += q_dim + 2 * kv_dim + hidden
    key_dim, value_dim = a.linear_key_heads * a.linear_head_dim, a.linear_value_heads * a.linear_head_dim
    linear = hidden * 2 * (key_dim + value_dim + a.linear_value_heads) + value_dim * hidden
    linear += (2 * key_dim + value_dim) * a.linear_conv
    return softmax_layers * one + a.linear_layers * linear


class Chip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An accelerator. A figure that is not known is None and prints as "U"."""

    id: str
    name: str
    source: str
    as_of: str
    confidence: Confidence
    notes: str = ""
    kind: Literal["gpu", "lpu", "asic"] = "gpu"
    memory_bytes: float | None = None
    bandwidth_bytes_per_s: float | None = None
    flops_bf16: float | None = None
    flops_fp8: float | None = None
    flops_fp4: float | None = None
    link_bytes_per_s: float | None = None
    watts: float | None = None
    idle_watts: float | None = None
    hour_dollars: list[float] = []
    grades: dict[str, Grade] = {}


def grade_of(part: Model | Chip, field: str) -> Grade:
    """Confidence, source and date of one figure of a model or chip."""
    own = part.grades.get(field)
    if own is None:
        return Grade(part.confidence, part.source, part.as_of)
    return Grade(own.confidence, own.source or part.source, own.as_of or part.as_of)
