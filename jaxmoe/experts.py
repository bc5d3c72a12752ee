"""Expert weights: the canonical form that checkpoints hold, and the form that one kernel reads."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp

from jaxmoe.formats import BF16, Format
from jaxmoe.quantization import QuantizedTensor, check, unify_global_scale

CANONICAL = "canonical"
_SMALLEST_INPUT_SCALE = 2.0**-100  # times the smallest e4m3, 2^-9, it is far from f32's smallest


@dataclasses.dataclass(frozen=True)
class PreparedMatrix:
    """One FP4 matrix per expert in the layout that one family of kernels reads; see `prepare`.

    Args:
      data: `uint8[E, bytes]`, elements and block scales in the layout's order.
      global_scale: `f32[E]` (ones for formats that have none).
      layout: name of the layout, compared with the kernel's at trace time.
      format: format of the weights.
      rows: `N`.
      k: `K`.
      gated: whether the rows are `[gate; up]` and the layout pairs them.
    """

    data: jax.Array
    global_scale: jax.Array
    layout: str
    format: Format
    rows: int
    k: int
    gated: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape `(E, N, K)`."""
        return (*self.data.shape[:-1], self.rows, self.k)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)


Matrix: TypeAlias = QuantizedTensor | PreparedMatrix | jax.Array


@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """Weights of all experts of one MoE layer.

    >>> import jax, jaxmoe
    >>> key = jax.random.key(0)
    >>> gate_up = jax.random.normal(key, (8, 2 * 64, 32))
    >>> down = jax.random.normal(key, (8, 32, 64))
    >>> experts = jaxmoe.ExpertWeights(
    ...     jaxmoe.quantize(gate_up, "nvfp4"), jaxmoe.quantize(down, "nvfp4"))
    >>> experts.num_experts, experts.hidden_size, experts.format.name
    (8, 32, 'nvfp4')

    Args:
      gate_up: `[E, 2I, H]`, gate rows first, then up rows; `[E, I, H]` for an activation without
        gate. A `QuantizedTensor` (canonical order, as checkpoints have it), a `PreparedMatrix`
        (made by `prepare`), or a floating-point array (unquantised, trainable).
      down: `[E, H, I]`, of the same kind and format.
      gate_up_bias: `f32[E, 2I]` (`[E, I]` without gate) or None.
      down_bias: `f32[E, H]` or None.
      gate_up_input_scale: `f32[]` or None: the static global scale of x where a kernel quantises
        it, amax / (448 * 6) for NVFP4 and amax / 448 for e4m3, as ModelOpt's `input_scale`; the
        largest of all experts', since x is quantised once for all. None takes that of each token
        (NVFP4, e4m3), or none (MXFP8). Kernels that read x as it is ignore it, and `explain` says
        so.
      down_input_scale: the same of what the second product reads.
      declared_compute: the arithmetic that the weights were made for (`"w4a4"`), which
        `compute="auto"` takes where the target has it; None for the most accurate. Input scales
        alone declare nothing.
    """

    gate_up: Matrix
    down: Matrix
    gate_up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None
    gate_up_input_scale: jax.Array | None = None
    down_input_scale: jax.Array | None = None
    declared_compute: str | None = None

    @property
    def num_experts(self) -> int:
        """`E`."""
        return self.down.shape[0]

    @property
    def hidden_size(self) -> int:
        """`H`, the width of the layer's input and output."""
        return self.down.shape[1]

    @property
    def intermediate_size(self) -> int:
        """`I`, the width between the two products."""
        return self.down.shape[2]

    @property
    def format(self) -> Format:
        """Format of the weights; `BF16` stands for any unquantised array."""
        return format_of(self.down)

    @property
    def has_input_scales(self) -> bool:
        """Whether there is a static scale for either product."""
        return self.gate_up_input_scale is not None or self.down_input_scale is not None

    @property
    def layout(self) -> str:
        """`"canonical"`, or the layout that `prepare` brought the weights into."""
        return self.down.layout if isinstance(self.down, PreparedMatrix) else CANONICAL

    @classmethod
    def from_parts(
        cls,
        gate: QuantizedTensor | jax.Array,
        up: QuantizedTensor | jax.Array,
        down: QuantizedTensor | jax.Array,
        gate_bias: jax.Array | None = None,
        up_bias: jax.Array | None = None,
        down_bias: jax.Array | None = None,
    ) -> tuple[ExpertWeights, Any]:
        """Joins separately stored gate `[E, I, H]` and up `[E, I, H]` matrices.

        Their per-expert global scales may differ; one of the two is then requantised, because a
        kernel applies one global scale to the fused matrix.

        Returns:
          The weights, and the report of `unify_global_scale` (None for unquantised weights).

        Raises:
          ValueError: if the shapes or formats of the parts differ, or only one bias is given.
        """
        if gate.shape != up.shape:
            raise ValueError(f"up must have gate's shape {gate.shape}, got {up.shape}")
        if (gate_bias is None) != (up_bias is None):
            raise ValueError("gate_bias and up_bias must be given together, got only one of them")
        bias = None
        if gate_bias is not None and up_bias is not None:
            bias = jnp.concatenate([gate_bias, up_bias], axis=-1)
        if isinstance(gate, QuantizedTensor) and isinstance(up, QuantizedTensor):
            gate_up, report = unify_global_scale(gate, up)
            return cls(gate_up, down, bias, down_bias), report
        if isinstance(gate, QuantizedTensor) or isinstance(up, QuantizedTensor):
            raise ValueError("gate and up must both be QuantizedTensor or both plain arrays")
        return cls(jnp.concatenate([gate, up], axis=-2), down, bias, down_bias), None


def is_plain(w: Matrix) -> TypeGuard[jax.Array]:
    """Whether `w` is an unquantised array."""
    return not isinstance(w, QuantizedTensor | PreparedMatrix)


def format_of(w: Matrix) -> Format:
    """Format of a matrix; `BF16` stands for any unquantised array."""
    return w.format if isinstance(w, QuantizedTensor | PreparedMatrix) else BF16


jax.tree_util.register_dataclass(
    PreparedMatrix,
    data_fields=["data", "global_scale"],
    meta_fields=["layout", "format", "rows", "k", "gated"],
)
jax.tree_util.register_dataclass(
    ExpertWeights,
    data_fields=[
        *("gate_up", "down", "gate_up_bias", "down_bias"),
        *("gate_up_input_scale", "down_input_scale"),
    ],
    meta_fields=["declared_compute"],
)


def check_experts(experts: ExpertWeights, gated: bool) -> None:
    """Raises a ValueError that names the argument if shapes, dtypes or scales do not fit together.

    Values are looked at only where they are concrete; under a transformation the shapes are.
    """
    if not isinstance(experts, ExpertWeights):
        raise TypeError(
            f"experts must be jaxmoe.ExpertWeights, got {type(experts).__name__}; wrap the two "
            "matrices: ExpertWeights(gate_up, down)"
        )
    gate_up, down = experts.gate_up, experts.down
    for name, w in (("gate_up", gate_up), ("down", down)):
        check_matrix(w, f"experts.{name}")
    if _kind(gate_up) != _kind(down):
        raise ValueError(
            "experts.gate_up and experts.down must have one format and layout, got "
            f"{_kind(gate_up)} and {_kind(down)}"
        )
    if isinstance(gate_up, PreparedMatrix) and gate_up.gated != gated:
        raise ValueError(
            f"experts were prepared with gated={gate_up.gated}, but the activation is "
            f"{'gated' if gated else 'not gated'}; prepare the canonical weights with gated={gated}"
        )
    e, h, i = down.shape
    rows = i * (2 if gated else 1)
    if tuple(gate_up.shape) != (e, rows, h):
        kind = "[E, 2I, H] for a gated" if gated else "[E, I, H] for an ungated"
        raise ValueError(
            f"experts.gate_up must have shape {kind} activation = {(e, rows, h)} to go with "
            f"experts.down [E, H, I] = {(e, h, i)}, got {tuple(gate_up.shape)}"
        )
    check_bias(experts.gate_up_bias, (e, rows), "experts.gate_up_bias")
    check_bias(experts.down_bias, (e, h), "experts.down_bias")
    check_input_scale(experts.gate_up_input_scale, "experts.gate_up_input_scale")
    check_input_scale(experts.down_input_scale, "experts.down_input_scale")


def check_matrix(w: Matrix, name: str) -> None:
    """Raises a ValueError unless `w` is a well-formed `[E, N, K]` matrix of any kind."""
    if not isinstance(w, QuantizedTensor | PreparedMatrix) and not (
        hasattr(w, "dtype") and jnp.issubdtype(w.dtype, jnp.floating)
    ):
        raise ValueError(
            f"{name} must be a QuantizedTensor, a PreparedMatrix or a floating-point array, got "
            f"{getattr(w, 'dtype', type(w).__name__)}; wrap packed FP4 data in QuantizedTensor"
        )
    if isinstance(w, QuantizedTensor):
        check(w, name)
    if w.ndim != 3:
        raise ValueError(f"{name} must have 3 axes [E, N, K], got shape {tuple(w.shape)}")


def check_bias(bias: jax.Array | None, shape: tuple[int, int], name: str) -> None:
    """Raises a ValueError unless `bias` is None or a floating-point array of `shape`."""
    if bias is not None and (
        tuple(bias.shape) != shape or not jnp.issubdtype(bias.dtype, jnp.floating)
    ):
        raise ValueError(
            f"{name} must be a floating-point array of shape {shape}, got "
            f"{bias.dtype}{list(bias.shape)}"
        )


def check_input_scale(scale: Any, name: str) -> None:
    """Raises a ValueError unless `scale` is None or a floating-point scalar.

    Where its value is known, it must be finite, and large enough that its reciprocal is too.
    """
    if scale is None:
        return
    if jnp.shape(scale) != () or not jnp.issubdtype(jnp.result_type(scale), jnp.floating):
        raise ValueError(
            f"{name} must be a floating-point scalar, one for all experts, got "
            f"{jnp.result_type(scale)}{list(jnp.shape(scale))}; take the largest of theirs"
        )
    if isinstance(scale, jax.core.Tracer) or not getattr(scale, "is_fully_addressable", True):
        return
    if not _SMALLEST_INPUT_SCALE <= float(scale) < float("inf"):
        raise ValueError(
            f"{name} must be finite and at least 2^-100, got {float(scale)}; leave it out to have "
            "each token scaled by itself"
        )


def _kind(w: Matrix) -> str:
    if not isinstance(w, QuantizedTensor | PreparedMatrix):
        return str(w.dtype)
    return f"{w.format.name} in layout {getattr(w, 'layout', CANONICAL)}"


def prepare(
    experts: ExpertWeights | QuantizedTensor,
    variant: str | None = None,
    *,
    gated: bool = True,
    compute: str = "auto",
) -> ExpertWeights | PreparedMatrix | QuantizedTensor:
    """Rearranges canonical FP4 weights once into the layout that a kernel variant reads.

    >>> import jax, jaxmoe
    >>> w = jax.random.normal(jax.random.key(0), (4, 64, 32))
    >>> experts = jaxmoe.ExpertWeights(jaxmoe.quantize(w, "mxfp4"),
    ...                                jaxmoe.quantize(w.swapaxes(1, 2)[..., :32], "mxfp4"))
    >>> jaxmoe.prepare(experts, "cpu_portable").layout
    'panel32'

    `experts` is not changed. Experts are rearranged one after the other, so the peak of extra
    memory is the result and one expert. Do this once, before serving: `moe_mlp` accepts canonical
    weights too, and then rearranges them inside every call.

    Args:
      experts: canonical weights of a layer, or one `QuantizedTensor` `[E, N, K]` for
        `grouped_matmul`.
      variant: name of a variant (`jaxmoe.capabilities()` lists them). None takes what the
        capability table selects for bfloat16 activations on the current target.
      gated: whether the layer's activation has a gate, so that `gate_up` is `[gate; up]`.
      compute: the arithmetic that the weights are for, as `moe_mlp` and `grouped_matmul` will be
        told: a kernel of W4A8 reads another layout than one of W4A16.

    Returns:
      The weights in the variant's layout; `experts` itself where that is the canonical one (`xla`).

    Raises:
      ValueError: if the weights are inconsistent, prepared already, or the variant is unknown.
      UnsupportedError: if the variant does not read weights of this format, or does not compute
        what was asked for.
    """
    from jaxmoe import kernels

    if isinstance(experts, QuantizedTensor):
        check_matrix(experts, "experts")
    else:
        check_experts(experts, gated)
        if experts.layout != CANONICAL:
            raise ValueError(
                f"experts must be canonical, got layout {experts.layout!r}; prepare from the "
                "canonical weights"
            )
    layout = kernels.layout_for(experts, variant, gated, compute)
    if layout == CANONICAL:
        return experts
    if isinstance(experts, QuantizedTensor):
        return kernels.to_layout(experts, layout, gated=False)
    return dataclasses.replace(
        experts,
        gate_up=kernels.to_layout(experts.gate_up, layout, gated=gated),
        down=kernels.to_layout(experts.down, layout, gated=False),
    )
