"""Expert activations: one frozen dataclass each, with its formula, parameters and source.

All arithmetic is f32 on the output of the first GEMM with its bias already added: a bias is never
added after a clamp. A gated activation takes (gate, up), the two halves of that output; the others
take the output itself.

A parameter is one number for all experts, or one number per expert (a sequence, or an array
[num_experts]). Numbers and sequences are static: the dataclass is hashable and compares by value.
A `jax.Array` parameter is a pytree leaf instead, so it can be traced and differentiated; such an
activation is an ordinary argument of a jitted function, never a static one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "ACTIVATIONS",
    "GELU",
    "Activation",
    "GELUTanh",
    "GeGLU",
    "GeGLUTanh",
    "Identity",
    "ReLU",
    "ReLU2",
    "SiLU",
    "Situ",
    "SwiGLU",
    "SwiGLUStep",
    "get_activation",
]

Parameter: TypeAlias = float | tuple[float, ...] | jax.Array


# What a parameter's values must be, as metadata of its field.
_FINITE = {"finite": True, "positive": False}
_POSITIVE = {"finite": False, "positive": True}
_FINITE_POSITIVE = {"finite": True, "positive": True}


def _number(value: Any) -> float:
    if isinstance(value, str):  # float("7") would accept it
        raise TypeError
    return float(value)


def _static(value: Any) -> Any:
    """A parameter as a float or a tuple of floats, both hashable; a `jax.Array` as it is."""
    if isinstance(value, jax.Array) or np.ndim(value) > 1:
        return value
    return tuple(map(_number, value)) if np.ndim(value) else _number(value)


@dataclasses.dataclass(frozen=True)
class Activation:
    """Base of all activations; `activation(gate, up)` or `activation(x)` evaluates it in f32.

    >>> import jax.numpy as jnp
    >>> SwiGLU.name, SwiGLU.gated, ReLU2.gated
    ('swiglu', True, False)
    >>> ReLU2()(jnp.array([-2.0, 3.0])).tolist()
    [0.0, 9.0]
    """

    name: ClassVar[str]
    gated: ClassVar[bool]

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, _unflattener(cls))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            what = f"{type(self).__name__}: {field.name}"
            try:
                value = _static(value)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{what} must be a number, or one number per expert; got {value!r}"
                ) from error
            if np.ndim(value) > 1 or np.size(value) == 0:
                raise ValueError(
                    f"{what} must be a scalar or one value per expert, shape [num_experts]; "
                    f"got shape {np.shape(value)}"
                )
            if not isinstance(value, jax.Array):
                _check_range(what, value, **field.metadata)
            object.__setattr__(self, field.name, value)

    @staticmethod
    def formula(*operands: jax.Array) -> jax.Array:
        """f32 (gate, up, *params), or (x, *params) where not gated, broadcast together."""
        raise NotImplementedError

    def params(self, num_experts: int) -> jax.Array:
        """The parameters of every expert, in the order of the dataclass fields.

        >>> SwiGLU(alpha=1.702, beta=1.0, limit=(7.0, 5.0)).params(2).tolist()[2]
        [7.0, 5.0]

        Args:
            num_experts: E; a parameter given per expert must have this many values.

        Returns:
            f32[P, E] with P the number of fields; [0, E] for an activation without parameters.

        Raises:
            ValueError: a parameter has another number of values than `num_experts`.
        """
        rows = []
        for field in dataclasses.fields(self):
            value = jnp.asarray(getattr(self, field.name), jnp.float32)
            if value.shape not in ((), (num_experts,)):
                raise ValueError(
                    f"{type(self).__name__}: {field.name} must be a scalar or hold one "
                    f"value for each of num_experts={num_experts}; got shape {value.shape}"
                )
            rows.append(jnp.broadcast_to(value, (num_experts,)))
        return jnp.stack(rows) if rows else jnp.zeros((0, num_experts), jnp.float32)

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Evaluate on (gate, up), or on (x,) where not gated.

        Args:
            inputs: arrays of any float dtype and one shape [..., I]. Where a parameter is given per
                expert, the leading axis is the expert axis: [E, ..., I].

        Returns:
            An array of that shape in the dtype of the first input, computed in f32.

        Raises:
            ValueError: the number of inputs is wrong, or the leading axis does not match a
                per-expert parameter.
        """
        names = ("gate", "up") if self.gated else ("x",)
        if len(inputs) != len(names):
            raise ValueError(f"{self.name} takes ({', '.join(names)}); got {len(inputs)} inputs")
        first = inputs[0]
        params = [jnp.asarray(getattr(self, f.name), jnp.float32) for f in dataclasses.fields(self)]
        for field, value in zip(dataclasses.fields(self), params, strict=True):
            if value.ndim and (first.ndim == 0 or first.shape[0] != value.size):
                raise ValueError(
                    f"{type(self).__name__}: {field.name} holds {value.size} per-expert "
                    f"values, so {names[0]} must be [{value.size}, ...]; got shape {first.shape}"
                )
        params = [v.reshape(v.shape + (1,) * (first.ndim - 1)) if v.ndim else v for v in params]
        return self.formula(*(x.astype(jnp.float32) for x in inputs), *params).astype(first.dtype)


def _check_range(what: str, value: float | tuple[float, ...], *, positive: bool, finite: bool):
    values = value if isinstance(value, tuple) else (value,)
    bad = [
        v for v in values if math.isnan(v) or (finite and math.isinf(v)) or (positive and v <= 0)
    ]
    if bad:
        required = " and ".join(["finite"] * finite + ["> 0"] * positive)
        raise ValueError(f"{what} must be {required}; got {bad[0]}")


def _flatten_with_keys(activation: Activation):
    values = [(f.name, getattr(activation, f.name)) for f in dataclasses.fields(activation)]
    # Plain numbers are static, so that an activation with no array keys a jit cache by its values.
    traced = [(n, v) for n, v in values if not isinstance(v, float | tuple)]
    static = tuple((n, v) for n, v in values if isinstance(v, float | tuple))
    leaves = tuple((jax.tree_util.GetAttrKey(n), v) for n, v in traced)
    return leaves, (tuple(n for n, _ in traced), static)


def _unflattener(cls: type[Activation]):
    def unflatten(aux, leaves):
        traced, static = aux
        activation = object.__new__(cls)  # leaves may be anything a tree_map returned: no checks
        for name, value in (*static, *zip(traced, leaves, strict=True)):
            object.__setattr__(activation, name, value)
        return activation

    return unflatten


def _gelu_tanh(x: jax.Array) -> jax.Array:
    # (1 + tanh z)/2 = sigmoid(2z), which keeps its relative accuracy for negative z. In f32 it is
    # 0 or 1 beyond |x| = 16; the clip keeps x³ and its derivative finite there.
    c = jnp.clip(x, -16.0, 16.0)
    return x * jax.nn.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (c + 0.044715 * c * c * c))


@dataclasses.dataclass(frozen=True)
class SwiGLU(Activation):
    """`g·sigmoid(alpha·g)·(u + beta)`, `g = min(gate, limit)`, `u = clip(up, -limit, limit)`.

    >>> SwiGLU()                            # silu(gate)·up
    SwiGLU(alpha=1.0, beta=0.0, limit=inf)
    >>> SwiGLU.gpt_oss()
    SwiGLU(alpha=1.702, beta=1.0, limit=7.0)

    Args:
        alpha: slope inside the sigmoid; finite.
        beta: offset of the linear half; finite.
        limit: clamp of both halves, above only for the gate; > 0, `inf` for none.

    Source: Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202, section 2 (defaults);
    gpt-oss, model card arXiv:2508.10925 and its reference implementation (alpha, beta, limit).
    """

    name: ClassVar[str] = "swiglu"
    gated: ClassVar[bool] = True
    alpha: Parameter = dataclasses.field(default=1.0, metadata=_FINITE)
    beta: Parameter = dataclasses.field(default=0.0, metadata=_FINITE)
    limit: Parameter = dataclasses.field(default=math.inf, metadata=_POSITIVE)

    @classmethod
    def gpt_oss(cls) -> SwiGLU:
        """The clamped SwiGLU of gpt-oss-20b and gpt-oss-120b: alpha 1.702, beta 1, limit 7."""
        return cls(alpha=1.702, beta=1.0, limit=7.0)

    @staticmethod
    def formula(gate, up, alpha, beta, limit):  # type: ignore[override]
        gate = jnp.minimum(gate, limit)
        return gate * jax.nn.sigmoid(alpha * gate) * (jnp.clip(up, -limit, limit) + beta)


@dataclasses.dataclass(frozen=True)
class SwiGLUStep(Activation):
    """`min(silu(gate), limit)·clip(up, -limit, limit)`: the gate is clamped after silu, not before.

    >>> SwiGLUStep()(jnp.array([9.0]), jnp.array([2.0])).tolist()
    [14.0]

    Args:
        limit: clamp of both factors; > 0, `inf` for none.

    Source: Step-3.5-Flash's expert MLP (its model card and vLLM's `SwigluStepAndMul`).
    """

    name: ClassVar[str] = "swiglu_step"
    gated: ClassVar[bool] = True
    limit: Parameter = dataclasses.field(default=7.0, metadata=_POSITIVE)

    @staticmethod
    def formula(gate, up, limit):  # type: ignore[override]
        return jnp.minimum(jax.nn.silu(gate), limit) * jnp.clip(up, -limit, limit)


@dataclasses.dataclass(frozen=True)
class GeGLU(Activation):
    """`gelu(gate)·up` with the exact (erf) GELU.

    Source: Shazeer, arXiv:2002.05202, section 2.
    """

    name: ClassVar[str] = "geglu"
    gated: ClassVar[bool] = True

    @staticmethod
    def formula(gate, up):  # type: ignore[override]
        return jax.nn.gelu(gate, approximate=False) * up


@dataclasses.dataclass(frozen=True)
class GeGLUTanh(Activation):
    """`gelu_tanh(gate)·up` with the tanh approximation of GELU.

    Source: Shazeer, arXiv:2002.05202, section 2; Hendrycks & Gimpel, arXiv:1606.08415, section 2.
    """

    name: ClassVar[str] = "geglu_tanh"
    gated: ClassVar[bool] = True

    @staticmethod
    def formula(gate, up):  # type: ignore[override]
        return _gelu_tanh(gate) * up


@dataclasses.dataclass(frozen=True)
class Situ(Activation):
    """Sigmoid-tanh unit: `B·tanh(gate/B)·sigmoid(gate) · L·tanh(up/L)`, a SwiGLU with soft caps.

    >>> Situ()
    Situ(gate_softcap=4.0, up_softcap=25.0)

    Args:
        gate_softcap: B, the bound that the gate's linear factor approaches; finite, > 0.
        up_softcap: L, the bound that the linear half approaches; finite, > 0. 1e30 is no bound.

    Source: Kimi K3's expert MLP (`SituAndMul` in its published code, `beta` and `linear_beta`).
    """

    name: ClassVar[str] = "situ"
    gated: ClassVar[bool] = True
    gate_softcap: Parameter = dataclasses.field(default=4.0, metadata=_FINITE_POSITIVE)
    up_softcap: Parameter = dataclasses.field(default=25.0, metadata=_FINITE_POSITIVE)

    @staticmethod
    def formula(gate, up, gate_softcap, up_softcap):  # type: ignore[override]
        capped = gate_softcap * jnp.tanh(gate / gate_softcap) * jax.nn.sigmoid(gate)
        return capped * (up_softcap * jnp.tanh(up / up_softcap))


@dataclasses.dataclass(frozen=True)
class ReLU2(Activation):
    """`max(x, 0)²`, not gated.

    Source: So et al., "Primer", arXiv:2109.08668 (squared ReLU); Nemotron-4, arXiv:2402.16819.
    """

    name: ClassVar[str] = "relu2"
    gated: ClassVar[bool] = False

    @staticmethod
    def formula(x):  # type: ignore[override]
        return jnp.square(jax.nn.relu(x))


@dataclasses.dataclass(frozen=True)
class SiLU(Activation):
    """`x·sigmoid(x)`, not gated.

    Source: Elfwing et al., "Sigmoid-Weighted Linear Units", arXiv:1702.03118.
    """

    name: ClassVar[str] = "silu"
    gated: ClassVar[bool] = False

    @staticmethod
    def formula(x):  # type: ignore[override]
        return jax.nn.silu(x)


@dataclasses.dataclass(frozen=True)
class GELU(Activation):
    """`x·Φ(x) = x·(1 + erf(x/√2))/2`, not gated.

    Source: Hendrycks & Gimpel, "Gaussian Error Linear Units", arXiv:1606.08415, section 2.
    """

    name: ClassVar[str] = "gelu"
    gated: ClassVar[bool] = False

    @staticmethod
    def formula(x):  # type: ignore[override]
        return jax.nn.gelu(x, approximate=False)


@dataclasses.dataclass(frozen=True)
class GELUTanh(Activation):
    """`x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))/2`, not gated.

    Source: Hendrycks & Gimpel, arXiv:1606.08415, section 2 (the tanh approximation).
    """

    name: ClassVar[str] = "gelu_tanh"
    gated: ClassVar[bool] = False

    @staticmethod
    def formula(x):  # type: ignore[override]
        return _gelu_tanh(x)


@dataclasses.dataclass(frozen=True)
class ReLU(Activation):
    """`max(x, 0)`, not gated; its gradient at 0 is 0.

    Source: Nair & Hinton, "Rectified Linear Units Improve Restricted Boltzmann Machines", 2010.
    """

    name: ClassVar[str] = "relu"
    gated: ClassVar[bool] = False

    @staticmethod
    def formula(x):  # type: ignore[override]
        return jax.nn.relu(x)


@dataclasses.dataclass(frozen=True)
class Identity(Activation):
    """`x`, not gated."""

    name: ClassVar[str] = "identity"
    gated: ClassVar[bool] = False

    @staticmethod
    def formula(x):  # type: ignore[override]
        return x


ACTIVATIONS: Mapping[str, type[Activation]] = MappingProxyType(
    {
        cls.name: cls
        for cls in (
            SwiGLU,
            SwiGLUStep,
            GeGLU,
            GeGLUTanh,
            Situ,
            ReLU2,
            SiLU,
            GELU,
            GELUTanh,
            ReLU,
            Identity,
        )
    }
)


def get_activation(activation: str | Activation) -> Activation:
    """An activation from its name, with default parameters; an `Activation` is returned as it is.

    >>> get_activation("swiglu")
    SwiGLU(alpha=1.0, beta=0.0, limit=inf)

    Raises:
        ValueError: no activation has that name.
    """
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]()
    raise ValueError(
        f"activation must be an Activation or one of {', '.join(ACTIVATIONS)}; got {activation!r}"
    )
