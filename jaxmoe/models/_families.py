"""Families of decoders on Hugging Face: `config.json` to `Architecture` and tensor names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe import routing
from jaxmoe.activations import SwiGLU
from jaxmoe.models._architecture import (
    Architecture,
    Attention,
    DeltaNet,
    Dense,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    Mixer,
)
from jaxmoe.models._rope import Linear, Llama3, Rope, Scaling, Yarn


@dataclasses.dataclass(frozen=True)
class Names:
    """What a family calls its tensors, where families differ.

    Args:
      root: in front of everything but the output matrix.
      head: the output matrix.
      feed_forward: the part after the second norm.
      router: the router, in the feed-forward part.
      correction_bias: the bias of its choice, likewise.
      shared: the shared expert, likewise.
      expert_parts: the gate, up and down matrices of one expert.
      norm_offset: added to the stored scales of norms (but not of the norm inside a DeltaNet).
    """

    root: str = "model"
    head: str = "lm_head"
    feed_forward: str = "mlp"
    router: str = "gate"
    correction_bias: str = "gate.e_score_correction_bias"
    shared: str = "shared_experts"
    expert_parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    norm_offset: float = 0.0


class Config:
    """A config.json whose missing fields are named."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def __getitem__(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise ValueError(f"lacks the field {key!r}")
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        """The field, or `default` where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses a field that has none of these values; a missing one has the first.

        Raises:
          ValueError: naming the field, what it may be and what it is.
        """
        value = self.get(key, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"has {key}={value!r}, which is not supported; it must be "
                f"{' or '.join(map(repr, allowed))}"
            )


def _scaling(c: Config) -> tuple[Config, Scaling | None]:
    """The rope parameters, in their new or old place, and how frequencies are stretched."""
    given = c.get("rope_parameters") or c.get("rope_scaling") or {}
    p = Config({"rope_theta": c.get("rope_theta"), **given})
    kind = p.get("rope_type", p.get("type", "default"))
    original = p.get("original_max_position_embeddings", c.get("max_position_embeddings"))
    if kind == "default":
        return p, None
    if kind == "linear":
        return p, Linear(p["factor"])
    if kind == "llama3":
        return p, Llama3(p["factor"], original, p["low_freq_factor"], p["high_freq_factor"])
    if kind == "yarn":
        factor = p.get("factor", c["max_position_embeddings"] / original)
        if p.get("mscale") and p.get("mscale_all_dim"):
            amplitude = _mscale(factor, p["mscale"]) / _mscale(factor, p["mscale_all_dim"])
        else:
            amplitude = _mscale(factor, 1.0)
        return p, Yarn(
            factor,
            original,
            beta_fast=p.get("beta_fast") or 32.0,
            beta_slow=p.get("beta_slow") or 1.0,
            truncate=p.get("truncate", True),
            amplitude=p.get("attention_factor", amplitude),
        )
    raise ValueError(
        f"has rope_type={kind!r}, which is not supported; it must be 'default', 'linear', "
        "'yarn' or 'llama3'"
    )


def _mscale(factor: float, by: float) -> float:
    return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0


def _rope(c: Config, head_dim: int, *, theta: float, interleaved: bool = False) -> Rope:
    p, scaling = _scaling(c)
    partial = p.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    return Rope(int(head_dim * partial), float(p.get("rope_theta", theta)), interleaved, scaling)


def _attention(c: Config, *, theta: float, **options: Any) -> Attention:
    """Grouped-query attention with the fields that all families name alike."""
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim", c["hidden_size"] // heads)
    bias = c.get("attention_bias", False)
    return Attention(
        heads,
        c.get("num_key_value_heads", heads),
        head_dim,
        **{"rope": _rope(c, head_dim, theta=theta), "bias": bias, "out_bias": bias, **options},
    )


def _architecture(c: Config, layers: list[Layer], *, eps: float) -> Architecture:
    c.only("hidden_act", "silu")
    return Architecture(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        max_length=c["max_position_embeddings"],
        layers=tuple(layers),
        norm_eps=c.get("rms_norm_eps", eps),
        tie_embeddings=c.get("tie_word_embeddings", False),
    )


def _softmax_router(c: Config) -> routing.Router:
    preset = routing.renormalize_naive if c.get("norm_topk_prob", False) else routing.default
    return preset(c["num_experts_per_tok"])


def _num_experts(c: Config) -> int:
    return c.get("num_experts", c.get("num_local_experts")) or c["num_experts"]


def _sparse(c: Config, index: int, experts: Experts) -> FeedForward:
    """Qwen's rule for which layers have experts."""
    dense = index in c.get("mlp_only_layers", ()) or (index + 1) % c.get("decoder_sparse_step", 1)
    return Dense(c["intermediate_size"]) if dense else experts


def _qwen3_moe(c: Config) -> tuple[Architecture, Names]:
    window = c.get("sliding_window") if c.get("use_sliding_window", False) else None
    attention = _attention(c, theta=10000.0, norm="head", window=window)
    experts = Experts(c["moe_intermediate_size"], _num_experts(c), _softmax_router(c))
    layers = [Layer(attention, _sparse(c, i, experts)) for i in range(c["num_hidden_layers"])]
    return _architecture(c, layers, eps=1e-6), Names()


def _mixtral(c: Config) -> tuple[Architecture, Names]:
    attention = _attention(c, theta=1e6, window=c.get("sliding_window"))
    experts = Experts(
        c["intermediate_size"],
        c["num_local_experts"],
        routing.renormalize_naive(c["num_experts_per_tok"]),
    )
    layers = [Layer(attention, experts)] * c["num_hidden_layers"]
    names = Names(feed_forward="block_sparse_moe", expert_parts=("w1", "w3", "w2"))
    return _architecture(c, layers, eps=1e-5), names


def _gpt_oss(c: Config) -> tuple[Architecture, Names]:
    experts = Experts(
        c["intermediate_size"],
        c["num_local_experts"],
        routing.renormalize(c["num_experts_per_tok"]),
        SwiGLU(c.get("swiglu_alpha", 1.702), 1.0, c.get("swiglu_limit", 7.0)),
        bias=True,
        router_bias=True,
    )
    full = _attention(c, theta=150000.0, sinks=True)
    kinds = {
        "full_attention": full,
        "sliding_attention": dataclasses.replace(full, window=c["sliding_window"]),
    }
    count = c["num_hidden_layers"]
    types = c.get("layer_types", ["sliding_attention", "full_attention"] * count)[:count]
    layers = [Layer(kinds[kind], experts) for kind in types]
    return _architecture(c, layers, eps=1e-5), Names(router="router")


def _deepseek_v3(c: Config) -> tuple[Architecture, Names]:
    c.only("scoring_func", "sigmoid")
    c.only("topk_method", "noaux_tc")
    c.only("moe_layer_freq", 1)
    p, scaling = _scaling(c)
    rope = Rope(
        c["qk_rope_head_dim"],
        float(p.get("rope_theta", 10000.0)),
        c.get("rope_interleave", True),
        scaling,
    )
    scale = (c["qk_nope_head_dim"] + rope.dim) ** -0.5
    if scaling is not None and p.get("mscale_all_dim"):
        scale *= _mscale(p["factor"], p["mscale_all_dim"]) ** 2
    attention = LatentAttention(
        c["num_attention_heads"],
        c.get("q_lora_rank"),
        c["kv_lora_rank"],
        c["qk_nope_head_dim"],
        c["v_head_dim"],
        rope,
        scale,
        bias=c.get("attention_bias", False),
    )
    router = routing.deepseek_v3(
        c["num_experts_per_tok"],
        num_groups=c.get("n_group", 1),
        topk_group=c.get("topk_group", 1),
        scale=c.get("routed_scaling_factor", 1.0),
    )
    if not c.get("norm_topk_prob", True):
        router = dataclasses.replace(router, renormalize=False)
    experts = Experts(
        c["moe_intermediate_size"],
        c["n_routed_experts"],
        router,
        shared=c.get("n_shared_experts", 0),
    )
    dense = c.get("first_k_dense_replace", 0)
    layers = [
        Layer(attention, Dense(c["intermediate_size"]) if i < dense else experts)
        for i in range(c["num_hidden_layers"])
    ]
    return _architecture(c, layers, eps=1e-6), Names()


def _minimax_m2(c: Config) -> tuple[Architecture, Names]:
    c.only("scoring_func", "sigmoid")
    c.only("use_routing_bias", True)
    c.only("qk_norm_type", "per_layer")
    head_dim = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    rope = _rope(c, head_dim, theta=5e6)
    if (dim := c.get("rotary_dim")) is not None:
        rope = dataclasses.replace(rope, dim=dim)
    norm = "all" if c.get("use_qk_norm", True) else None
    experts = Experts(
        c["intermediate_size"],
        c["num_local_experts"],
        routing.minimax2(c["num_experts_per_tok"]),
    )
    layer = Layer(_attention(c, theta=5e6, rope=rope, norm=norm), experts)
    names = Names(
        feed_forward="block_sparse_moe",
        expert_parts=("w1", "w3", "w2"),
        correction_bias="e_score_correction_bias",
    )
    return _architecture(c, [layer] * c["num_hidden_layers"], eps=1e-6), names


def _qwen3_next(c: Config) -> tuple[Architecture, Names]:
    head_dim = c.get("head_dim", 256)
    partial = Config({"partial_rotary_factor": 0.25, **c.values})
    kinds: dict[str, Mixer] = {
        "full_attention": _attention(
            c,
            theta=10000.0,
            rope=_rope(partial, head_dim, theta=10000.0),
            norm="head",
            gated=True,
        ),
        "linear_attention": DeltaNet(
            c["linear_num_key_heads"],
            c["linear_num_value_heads"],
            c["linear_key_head_dim"],
            c["linear_value_head_dim"],
            c["linear_conv_kernel_dim"],
        ),
    }
    width, shared = c["moe_intermediate_size"], c["shared_expert_intermediate_size"]
    if shared % width:
        raise ValueError(
            f"has shared_expert_intermediate_size={shared}, which must be a multiple of "
            f"moe_intermediate_size={width}"
        )
    experts = Experts(
        width, _num_experts(c), _softmax_router(c), shared=shared // width, shared_gate=True
    )
    count = c["num_hidden_layers"]
    interval = c.get("full_attention_interval", 4)
    types = c.get("layer_types") or [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(count)
    ]
    layers = [Layer(kinds[kind], _sparse(c, i, experts)) for i, kind in enumerate(types)]
    names = Names(shared="shared_expert", norm_offset=1.0)
    return _architecture(c, layers, eps=1e-6), names


def _llama4(c: Config) -> tuple[Architecture, Names]:
    if c.get("text_config") is not None:
        architecture, names = _llama4(Config(c["text_config"]))
        return architecture, dataclasses.replace(
            names, root="language_model.model", head="language_model.lm_head"
        )
    c.only("num_experts_per_tok", 1)
    count = c["num_hidden_layers"]
    interval = c.get("no_rope_layer_interval", 4)
    rotated = c.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(count)]
    step = c.get("interleave_moe_layer_step", 1)
    sparse = c.get("moe_layers", range(step - 1, count, step))
    turned = _attention(
        c,
        theta=500000.0,
        chunk=c.get("attention_chunk_size"),
        norm="l2" if c.get("use_qk_norm", True) else None,
    )
    assert turned.rope is not None
    turned = dataclasses.replace(turned, rope=dataclasses.replace(turned.rope, interleaved=True))
    tuned = (c.get("attn_scale", 0.1), c.get("floor_scale", 8192))
    still = dataclasses.replace(
        turned,
        rope=None,
        chunk=None,
        norm=None,
        temperature=tuned if c.get("attn_temperature_tuning", True) else None,
    )
    experts = Experts(c["intermediate_size"], c["num_local_experts"], routing.llama4(), shared=1)
    layers = [
        Layer(
            turned if rotated[i] else still,
            experts if i in sparse else Dense(c["intermediate_size_mlp"]),
        )
        for i in range(count)
    ]
    names = Names(feed_forward="feed_forward", router="router", shared="shared_expert")
    return _architecture(c, layers, eps=1e-5), names


FAMILIES: Mapping[str, Callable[[Config], tuple[Architecture, Names]]] = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "minimax_m2": _minimax_m2,
    "qwen3_next": _qwen3_next,
    "llama4": _llama4,
    "llama4_text": _llama4,
}
"""The readers of config.json, by its `model_type`."""


def read_config(config: Mapping[str, Any]) -> tuple[Architecture, Names]:
    """The architecture that a config.json describes, and what its tensors are called.

    Raises:
      ValueError: for an unknown model_type, a missing field, or one that is not supported.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ValueError(f"has model_type={kind!r}; known are {', '.join(FAMILIES)}")
    return FAMILIES[kind](Config(config))
