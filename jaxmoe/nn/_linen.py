"""The Linen twin of the NNX layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen, nnx

from jaxmoe.activations import Activation, SwiGLU
from jaxmoe.formats import BF16, Format, get_format
from jaxmoe.nn._moe import MoE
from jaxmoe.quantization import quantize
from jaxmoe.routing import Router


class LinenMoE(linen.Module):
    """`MoE` as a `flax.linen` module: the same arguments, parameters and numbers.

    >>> import jax, jax.numpy as jnp
    >>> from jaxmoe.nn import LinenMoE
    >>> layer = LinenMoE(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2)
    >>> x = jnp.ones((4, 10, 64))
    >>> variables = layer.init(jax.random.key(0), x)
    >>> layer.apply(variables, x).shape
    (4, 10, 64)
    >>> out, sown = layer.apply(variables, x, mutable="intermediates")
    >>> sown["intermediates"]["router_aux"][0].expert_counts.sum().item()
    80

    Parameters are in the collection "params", frozen weights (`weight_format="nvfp4"`) in
    "quantized", the router's correction bias in "router_state". `quantize` turns trained variables
    into those of an FP4 layer. Apply it under `jax.jit`: outside, the bridge from NNX draws unused
    initial weights in every call.

    Attributes and methods are those of `MoE`, which documents them.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    _: dataclasses.KW_ONLY
    router: Router | str = "renormalize"
    activation: Activation | str = SwiGLU()
    use_bias: bool = False
    router_bias: bool = False
    shared_experts: int = 0
    shared_gate: bool = False
    weight_format: str | Format = BF16
    compute: str = "auto"
    qat: str | Format | None = None
    implementation: str | Sequence[str] | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., jax.Array] = nnx.initializers.lecun_normal()
    bias_init: Callable[..., jax.Array] = nnx.initializers.zeros_init()
    kernel_axes: tuple[str | None, str | None, str | None] | None = None
    kernel_metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bias_metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def setup(self) -> None:
        arguments = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("parent", "name")
        }
        self.layer = nnx.bridge.to_linen(MoE, **arguments)
        linen.share_scope(self, self.layer)

    def __call__(
        self, x: jax.Array, *, router_logits: jax.Array | None = None, return_aux: bool = False
    ) -> Any:
        """As `MoE.__call__`; sows "router_aux" when the collection "intermediates" is mutable."""
        out, aux = self.layer(x, router_logits=router_logits, return_aux=True)
        self.sow("intermediates", "router_aux", aux)
        return (out, aux) if return_aux else out

    def quantize(
        self,
        variables: Mapping[str, Any],
        format: str | Format,
        *,
        method: Literal["amax", "mse"] = "amax",
    ) -> tuple[LinenMoE, dict[str, Any]]:
        """The FP4 layer and its variables, from this layer's trained variables.

        >>> import jax, jax.numpy as jnp
        >>> from jaxmoe.nn import LinenMoE
        >>> layer = LinenMoE(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2)
        >>> x = jnp.ones((3, 64))
        >>> fp4, variables = layer.quantize(layer.init(jax.random.key(0), x), "nvfp4")
        >>> fp4.apply(variables, x).shape, sorted(variables)
        ((3, 64), ['params', 'quantized'])

        Args:
            variables: those of this layer alone (inside a model: its entry of every collection).
            format: as for `jaxmoe.nn.quantize`.
            method: as for `jaxmoe.nn.quantize`.

        Returns:
            The layer with that `weight_format`, and its variables; arrays that stay are shared.
        """
        params = dict(variables["params"])
        frozen = {
            name: quantize(linen.unbox(params.pop(name)), format, method=method)
            for name in ("gate_up", "down")
        }
        layer = self.clone(weight_format=get_format(format).name, qat=None)
        return layer, {**variables, "params": params, "quantized": frozen}
