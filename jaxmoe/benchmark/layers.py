"""The layers and token counts that benchmarks and tests share: data only."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType

from jaxmoe.formats import Format, get_format


@dataclasses.dataclass(frozen=True)
class Layer:
    """The expert MLPs of one MoE layer, with SwiGLU and without biases.

    >>> layer = LAYERS["qwen3-30b-a3b"]
    >>> layer.flops(tokens=1) / 1e6, layer.expert_bytes("mxfp4") / 2**20
    (75.497472, 2.390625)

    Args:
      name: the key in `LAYERS`.
      hidden_size: `H`.
      intermediate_size: `I`.
      num_experts: `E`, experts that the weights hold and the routing draws from.
      top_k: `k`, experts per token.
      source: where the sizes come from.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    source: str = ""

    def flops(self, tokens: int) -> int:
        """Floating-point operations of the three products: `6 T k H I`."""
        return 6 * tokens * self.top_k * self.hidden_size * self.intermediate_size

    def expert_bytes(self, weight_format: str | Format) -> float:
        """Bytes of one expert's packed weights, block scales included."""
        elements = 3 * self.hidden_size * self.intermediate_size
        return elements * get_format(weight_format).bits_per_element / 8

    def weight_bytes(self, weight_format: str | Format) -> float:
        """Bytes of all experts' packed weights."""
        return self.num_experts * self.expert_bytes(weight_format)


LAYERS: Mapping[str, Layer] = MappingProxyType(
    {
        layer.name: layer
        for layer in (
            Layer("qwen3-30b-a3b", 2048, 768, 128, 8, "Qwen/Qwen3-30B-A3B config.json"),
            Layer("gpt-oss-20b", 2880, 2880, 32, 4, "openai/gpt-oss-20b config.json"),
            Layer("gpt-oss-120b", 2880, 2880, 128, 4, "openai/gpt-oss-120b config.json"),
            Layer("mixtral-8x7b", 4096, 14336, 8, 2, "mistralai/Mixtral-8x7B-v0.1 config.json"),
            Layer(
                "deepseek-v3-ep8",
                7168,
                2048,
                32,
                8,
                "deepseek-ai/DeepSeek-V3 config.json; one of 8 expert-parallel shards, with all "
                "8 choices of its tokens local",
            ),
        )
    }
)

TINY = Layer("tiny", 256, 128, 8, 2, "runs in a second: for tests and for trying the benchmark")
"""Not a model's layer."""

TOKENS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "cpu": (1, 8, 64, 512, 2048),
        "gpu": (1, 16, 64, 256, 1024, 4096, 16384),
    }
)
"""Token counts by platform: decode, small batches, prefill."""


def get_layer(name: str) -> Layer:
    """The layer of that name, `tiny` included.

    >>> get_layer("mixtral-8x7b").num_experts
    8

    Raises:
      ValueError: no layer has that name; the message lists those that exist.
    """
    known = {**LAYERS, TINY.name: TINY}
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"layer {name!r} is unknown; the layers are {', '.join(known)}"
            + (f". Did you mean {close[0]!r}?" if close else "")
        )
    return known[name]


def expected_experts(layer: Layer, tokens: int) -> float:
    """Mean number of distinct experts among T tokens with k distinct choices each.

    >>> expected_experts(LAYERS["mixtral-8x7b"], 2)
    3.5
    """
    return layer.num_experts * (1 - (1 - layer.top_k / layer.num_experts) ** tokens)
