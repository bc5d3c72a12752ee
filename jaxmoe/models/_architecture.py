"""What a decoder is made of, layer by layer: plain data that `Decoder` builds from."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from jaxmoe.activations import Activation, SwiGLU
from jaxmoe.models._rope import Rope
from jaxmoe.routing import Router


@dataclasses.dataclass(frozen=True)
class Attention:
    """Grouped-query self-attention.

    Args:
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads`.
      head_dim: width of one head.
      rope: rotary positions, or None for a layer without positions.
      window: a token sees itself and the `window - 1` tokens before it; None sees all.
      chunk: a token sees only what stands in its own chunk of this many positions; None sees all.
      bias: whether query, key and value have biases.
      out_bias: whether the output matrix has one.
      norm: RMS norm of queries and keys: over each head, over all heads together, or, without a
        scale and after the rotation, `"l2"`; None for no norm.
      gated: the query matrix also makes a gate for each output feature, which goes through a
        sigmoid.
      sinks: each head has a learned logit that takes part in the softmax and nowhere else.
      temperature: `(scale, floor)` multiplies queries by `1 + scale·log(1 + ⌊(p + 1)/floor⌋)` at
        position p; None by 1.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    window: int | None = None
    chunk: int | None = None
    bias: bool = False
    out_bias: bool = False
    norm: Literal["head", "all", "l2"] | None = None
    gated: bool = False
    sinks: bool = False
    temperature: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads={self.num_kv_heads}, got "
                f"{self.num_heads}"
            )


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1).

    Args:
      num_heads: heads.
      q_rank: width of the compressed queries; None for queries that are not compressed.
      kv_rank: width of the compressed keys and values, which are all that the cache holds besides
        the one rotated key that all heads share.
      nope_dim: features of a head's query and key without positions.
      value_dim: features of a head's value.
      rope: rotary positions of the other `rope.dim` features.
      scale: factor on the scores.
      bias: whether the matrices that read or write the residual stream have biases.
    """

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    value_dim: int
    rope: Rope
    scale: float
    bias: bool = False


@dataclasses.dataclass(frozen=True)
class DeltaNet:
    """Gated delta-rule linear attention (Yang et al., arXiv:2412.06464).

    Args:
      num_key_heads: query and key heads.
      num_value_heads: value heads, a multiple of `num_key_heads`.
      key_dim: features of a query or key.
      value_dim: features of a value.
      conv_width: tokens that the causal convolution in front sees.
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int

    def __post_init__(self) -> None:
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"num_value_heads must be a multiple of num_key_heads={self.num_key_heads}, got "
                f"{self.num_value_heads}"
            )


@dataclasses.dataclass(frozen=True)
class Dense:
    """One gated MLP, `down(silu(gate(x)) · up(x))`.

    Args:
      intermediate_size: its inner width.
    """

    intermediate_size: int


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts: the arguments of `jaxmoe.nn.MoE`.

    Args:
      intermediate_size: width `I` of one expert.
      num_experts: `E`.
      router: how tokens choose.
      activation: of every expert.
      bias: whether the experts have biases.
      router_bias: whether the router's logits have a bias.
      shared: n, for a shared expert of width `n · I`; 0 for none.
      shared_gate: whether a sigmoid gate scales the shared expert.
    """

    intermediate_size: int
    num_experts: int
    router: Router
    activation: Activation = SwiGLU()  # noqa: RUF009 (frozen)
    bias: bool = False
    router_bias: bool = False
    shared: int = 0
    shared_gate: bool = False


Mixer: TypeAlias = Attention | LatentAttention | DeltaNet
FeedForward: TypeAlias = Dense | Experts


@dataclasses.dataclass(frozen=True)
class Layer:
    """One block: what mixes tokens, then what works on each."""

    mixer: Mixer
    feed_forward: FeedForward


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A decoder, layer by layer.

    >>> from jaxmoe.models import Architecture, Attention, Experts, Layer, Rope
    >>> from jaxmoe.routing import renormalize
    >>> attention = Attention(num_heads=2, num_kv_heads=1, head_dim=32, rope=Rope(32, 1e4))
    >>> experts = Experts(intermediate_size=64, num_experts=8, router=renormalize(2))
    >>> Architecture(vocab_size=256, hidden_size=64, max_length=128,
    ...              layers=(Layer(attention, experts),) * 2).num_layers
    2

    Args:
      vocab_size: number of tokens.
      hidden_size: width `H` of the residual stream.
      max_length: longest sequence, in tokens.
      layers: from first to last.
      norm_eps: added to the mean square in RMS norms.
      tie_embeddings: use the embedding matrix as the output matrix too.
    """

    vocab_size: int
    hidden_size: int
    max_length: int
    layers: tuple[Layer, ...]
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.layers)


def repetitions(layers: tuple[Layer, ...]) -> tuple[tuple[tuple[Layer, ...], int], ...]:
    """Layers as (pattern, how often it comes in a row), longest stretches first from the left.

    >>> [(len(pattern), count) for pattern, count in repetitions(("a", "b", "b", "c", "b", "c"))]
    [(1, 1), (1, 1), (2, 2)]
    """
    parts = []
    start = 0
    while start < len(layers):
        best = (1, 1)
        for period in range(1, (len(layers) - start) // 2 + 1):
            pattern = layers[start : start + period]
            count = 1
            while layers[start + count * period : start + (count + 1) * period] == pattern:
                count += 1
            if count > 1 and period * count > best[0] * best[1]:
                best = (period, count)
        period, count = best
        parts.append((layers[start : start + period], count))
        start += period * count
    return tuple(parts)
