"""The decoders that jaxmoe trains and saves itself, as kept in their `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.activations import get_activation
from jaxmoe.models._architecture import Architecture, Attention, Experts, Layer
from jaxmoe.models._rope import Rope
from jaxmoe.routing import get_router


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder all of whose layers are alike: attention, then a mixture of experts.

    >>> config = DecoderConfig(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1,
    ...                        head_dim=32, intermediate_size=64, num_experts=8, top_k=2)
    >>> DecoderConfig.from_dict(config.to_dict()) == config
    True

    Args:
      hidden_size: width `H` of the residual stream.
      num_layers: number of (attention, experts) blocks.
      num_heads: query heads.
      num_kv_heads: key and value heads; divides `num_heads` (grouped-query attention).
      head_dim: width of one head; even.
      intermediate_size: width `I` of one expert.
      num_experts: experts `E` in each layer.
      top_k: experts `k` that a token takes.
      vocab_size: number of tokens; 256 for a byte-level model.
      max_length: longest sequence, in tokens; the size of the key/value cache.
      rope_theta: base of the rotary position embedding.
      norm_eps: added to the mean square in RMS norms.
      qk_norm: RMS norm on each query and key head before the rotation.
      tie_embeddings: use the embedding matrix as the output matrix too.
      router: name of a router preset of `jaxmoe.routing`.
      activation: name of an activation of `jaxmoe.activations`.

    Raises:
      ValueError: if sizes do not fit together.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int
    top_k: int
    vocab_size: int = 256
    max_length: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    qk_norm: bool = True
    tie_embeddings: bool = False
    router: str = "renormalize"
    activation: str = "swiglu"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.name} must be an int of at least 1, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads={self.num_kv_heads}, got "
                f"{self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for the rotation, got {self.head_dim}")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k must be at most num_experts={self.num_experts}, got {self.top_k}"
            )

    def architecture(self) -> Architecture:
        """The same, layer by layer."""
        attention = Attention(
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            Rope(self.head_dim, self.rope_theta),
            norm="head" if self.qk_norm else None,
        )
        experts = Experts(
            self.intermediate_size,
            self.num_experts,
            get_router(self.router, top_k=self.top_k),
            get_activation(self.activation),
        )
        return Architecture(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_length=self.max_length,
            layers=(Layer(attention, experts),) * self.num_layers,
            norm_eps=self.norm_eps,
            tie_embeddings=self.tie_embeddings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DecoderConfig:
        """Returns the config with these fields; refuses unknown and missing ones by name.

        Raises:
          ValueError: for a field that is unknown or missing, or a value out of range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := values.keys() - fields.keys():
            raise ValueError(f"unknown field {min(unknown)!r}; known are {', '.join(fields)}")
        required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
        if missing := required - values.keys():
            raise ValueError(f"field {min(missing)!r} is missing")
        return cls(**values)
