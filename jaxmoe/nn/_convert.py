"""Conversion of the MoE layers of a model: to a quantised format, and to a kernel's layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar

from flax import nnx

from jaxmoe.formats import Format

if TYPE_CHECKING:
    from jaxmoe.nn._moe import MoE

M = TypeVar("M", bound=nnx.Module)


def _convert(model: M, change: Callable[[MoE], None]) -> M:
    """A copy of the model (arrays shared) with `change` applied to its MoE layers in place."""
    from jaxmoe.nn._moe import MoE

    model = nnx.merge(*nnx.split(model))
    layers = [node for _, node in nnx.iter_graph(model) if isinstance(node, MoE)]
    if not layers:
        raise ValueError(
            f"model must contain at least one jaxmoe.nn.MoE layer, but {type(model).__name__} has "
            "none"
        )
    for layer in layers:
        change(layer)
    return model


def quantize(model: M, format: str | Format, *, method: Literal["amax", "mse"] = "amax") -> M:
    """Copies a model with the expert weights of all its MoE layers quantised and frozen.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from jaxmoe import nn
    >>> model = nnx.Sequential(nnx.Linear(16, 64, rngs=nnx.Rngs(0)),
    ...                        nn.MoE(64, 128, 8, 2, rngs=nnx.Rngs(1)))
    >>> fp4 = nn.quantize(model, "nvfp4")
    >>> fp4(jnp.ones((3, 16))).shape
    (3, 64)

    `model` is not changed; everything but the expert weights is shared with it. Routers, biases and
    shared experts keep their precision and stay trainable.

    Args:
        model: an NNX module holding `MoE` layers with unquantised weights, or one such layer.
        format: `"nvfp4"`, `"mxfp4"`, `"mxfp8"`, `"fp8"`, or the format itself.
        method: `"amax"`, or `"mse"` for a search over the scales; see `jaxmoe.quantize`.

    Returns:
        The copy.

    Raises:
        ValueError: the model has no MoE layer, a layer is quantised already, a size is not a
            multiple of the format's block, or the weights are not finite.
    """
    return _convert(model, lambda layer: layer._quantize(format, method))


def prepare(model: M, variant: str | None = None) -> M:
    """Copies a model with the FP4 weights of all its MoE layers in the layout that a kernel reads.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> from jaxmoe import nn
    >>> layer = nn.MoE(64, 128, 8, 2, weight_format="nvfp4", rngs=nnx.Rngs(0))
    >>> ready = nn.prepare(layer)
    >>> ready.layout == layer.explain().layout
    True
    >>> ready(jnp.ones((3, 64))).shape
    (3, 64)

    Without this, a native kernel repacks canonical weights inside every call. Save checkpoints from
    the canonical model: the prepared one belongs to one kind of machine. Where the selected variant
    reads canonical weights, the layer stays as it is.

    Args:
        model: an NNX module holding `MoE` layers, or one such layer.
        variant: name of a kernel variant; None takes what `MoE.explain` selects for each layer, by
            the layer's `compute` among others.

    Returns:
        The copy; `model` is not changed.

    Raises:
        ValueError: the model has no MoE layer, a layer is prepared already, or the variant is
            unknown.
        UnsupportedError: the variant does not run on this target, or not with the layer's format.
    """
    return _convert(model, lambda layer: layer._prepare(variant))
