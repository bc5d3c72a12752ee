"""The Flax variable types of the layer, and what differs between Flax versions about variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx


@nnx.register_variable_name("quantized")
class QuantizedParam(nnx.Variable):
    """Frozen quantised weights: a `QuantizedTensor`, or the `PreparedMatrix` made from it.

    Not an `nnx.Param`, so `nnx.grad`, `nnx.value_and_grad(..., wrt=nnx.Param)` and
    `nnx.Optimizer(..., wrt=nnx.Param)` leave it alone. In Linen it is the collection "quantized".

    >>> import jax, jaxmoe
    >>> from jaxmoe.nn import QuantizedParam
    >>> w = jaxmoe.quantize(jax.random.normal(jax.random.key(0), (8, 64, 32)), "nvfp4")
    >>> value(QuantizedParam(w)).shape
    (8, 64, 32)
    """

    @property
    def sharding(self) -> Any:
        """The shardings of the arrays, in a pytree like the value's.

        Where this is None, `nnx.eval_shape` under a mesh would put one array in the value's place.
        """
        return jax.tree.map(lambda leaf: getattr(leaf, "sharding", None), value(self))


@nnx.register_variable_name("router_state")
class CorrectionBias(nnx.Variable):
    """Per-expert bias `f32[E]` that takes part in the choice of experts, not in their weights.

    No gradient reaches it, and weight decay must not: it is not an `nnx.Param`. Load-balancing
    rules move it between steps. In Linen it is the collection "router_state".
    """


def value(variable: nnx.Variable) -> Any:
    """What the variable holds, also where that is a pytree rather than one array."""
    get_value = getattr(variable, "get_value", None)  # Flax 0.12.0 has no such method
    return variable.value if get_value is None else get_value()


def assign(variable: Any, new: Any) -> None:
    """Puts a value in the place of the variable's, whatever that is."""
    set_value = getattr(variable, "set_value", None)
    if set_value is None:
        variable.value = new
    else:
        set_value(new)


def array(variable: nnx.Variable | None) -> Any:
    """The variable's array, or None where the layer has no such parameter."""
    return None if variable is None else variable[...]


def _sharding_key() -> str:
    probe = nnx.Param(np.zeros(1), out_sharding=("axis",), eager_sharding=False)
    return "out_sharding" if tuple(nnx.spmd.get_var_pspec(probe) or ()) else "sharding_names"


# Flax renamed the metadata entry after 0.12.0 and warns about, or ignores, the other name.
SHARDING = _sharding_key()


def metadata(
    axes: Sequence[str | None] | None, extra: Mapping[str, Any], dims: str
) -> dict[str, Any]:
    """Variable metadata: `extra`, and the sharding of dims named by letter.

    `dims` spells a variable's dims in order: e(xperts), h(idden), i(ntermediate), which shard over
    the corresponding entry of `axes`, or "." for a dim that is never sharded.
    """
    if axes is None:
        return dict(extra)
    by_letter = dict(zip("ehi", axes, strict=True)) | {".": None}
    return {SHARDING: tuple(by_letter[letter] for letter in dims), **extra}


def frozen(weights: Any, about: Mapping[str, Any]) -> QuantizedParam:
    """Quantised weights `[..., E, N, K]` as a variable with the metadata of the float array.

    One sharding serves all leaves, `[..., E, N, K/2]` data, `[..., E, N, K/block]` scales and
    `[..., E]` global scales: that of their common leading axes.
    """
    if sharding := about.get(SHARDING):
        about = {**about, SHARDING: tuple(sharding)[: weights.ndim - 2]}
    return QuantizedParam(weights, **about)
