"""The NNX Mixture-of-Experts layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe import ops, routing
from jaxmoe.activations import Activation, SwiGLU, get_activation
from jaxmoe.capability import Resolution
from jaxmoe.experts import CANONICAL, ExpertWeights, PreparedMatrix
from jaxmoe.experts import prepare as prepare_experts
from jaxmoe.formats import BF16, Format, get_format
from jaxmoe.nn import _convert
from jaxmoe.nn._variables import (
    CorrectionBias,
    InputScale,
    array,
    assign,
    frozen,
    metadata,
    value,
)
from jaxmoe.quantization import fake_quantize
from jaxmoe.quantization import quantize as quantize_array

Initializer = Callable[..., jax.Array]
Method = Literal["amax", "mse"]

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class MoE(nnx.Module):
    """Mixture-of-Experts feed-forward layer with unquantised (trainable) or FP4 (frozen) experts.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> from jaxmoe.nn import MoE
    >>> layer = MoE(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2, rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(1), (4, 10, 64))
    >>> layer(x).shape
    (4, 10, 64)
    >>> out, aux = layer(x, return_aux=True)
    >>> aux.expert_counts.sum().item()              # 4 * 10 tokens, 2 experts each
    80
    >>> fp4 = layer.quantize("nvfp4")
    >>> fp4(x).shape
    (4, 10, 64)

    Every matrix is stored `[out, in]`, as in PyTorch checkpoints and as the kernels read it:

    | attribute | shape | variable |
    |---|---|---|
    | `router` | `[E, H]` | `nnx.Param` |
    | `router_bias` | `[E]` | `nnx.Param`, or None |
    | `correction_bias` | `f32[E]` | `CorrectionBias`, or None if the router selects without it |
    | `gate_up` | `[E, 2I, H]`, gate rows first | `nnx.Param`, or `QuantizedParam` |
    | `down` | `[E, H, I]` | as `gate_up` |
    | `gate_up_bias`, `down_bias` | `[E, 2I]`, `[E, H]` | `nnx.Param`, or None |
    | `gate_up_input_scale`, `down_input_scale` | `f32[]` | `InputScale`, or None |
    | `shared_gate_up`, `shared_down` | `[2nI, H]`, `[H, nI]` | `nnx.Param`, or None |
    | `shared_gate` | `[1, H]` | `nnx.Param`, or None |

    An activation without gate halves the rows: I in place of 2I.

    Router logits and weights are computed in float32 whatever the dtype of `x`. `RouterAux` (load
    balance loss, router z-loss, expert counts) is returned on request, and sown as the
    `nnx.Intermediate` "router_aux" while `nnx.capture` records. Flax versions without `nnx.capture`
    only return it.

    Args:
        hidden_size: `H`, width of the input and output.
        intermediate_size: `I`, width of one expert between its two matrices.
        num_experts: `E`.
        top_k: `k`, experts per token.
        router: a `jaxmoe.routing.Router`, or the name of a preset; default "renormalize" (softmax
            over the chosen logits). It also says whether there is a correction bias, and whether
            the weight multiplies the expert's input or its output.
        activation: a `jaxmoe.activations` instance or name; default SwiGLU.
        use_bias: whether the experts have biases.
        router_bias: whether the router's logits have a bias.
        shared_experts: n; adds a dense MLP of width `n * intermediate_size` that every token
            visits, never quantised.
        shared_gate: whether the sigmoid of one more product with the token scales the shared
            experts' output (Qwen2-MoE, Qwen3-Next).
        weight_format: "bf16" for trainable experts stored in `param_dtype`; "nvfp4", "mxfp4" (or
            "mxfp8", "fp8") for frozen ones.
        compute: arithmetic of the expert products: "auto", "w4a16", "w4a8", "w4a4"; see `moe_mlp`.
        declared_compute: the arithmetic that the weights were made for, which `compute="auto"`
            takes where the target has it; None for the most accurate.
        input_scales: whether activations have static scales, to be set from a checkpoint; ones at
            first. See `ExpertWeights`.
        qat: name of a format for quantisation-aware training: the forward pass sees the experts'
            weights rounded to it, gradients pass straight through.
        implementation: kernel variant or provider, or a sequence of them; None selects the best.
        dtype: dtype of the computation and of the output; None for that of `x`.
        param_dtype: dtype of the trainable parameters.
        kernel_init: Flax initializer, called with `(key, (in, out), dtype)` for the router, the
            shared experts' matrices and every expert's.
        bias_init: Flax initializer of the biases.
        kernel_axes: mesh or logical axis names of the dims (E, H, I), e.g.
            `("expert", None, "mlp")`; becomes every parameter's sharding metadata. Quantised
            weights are sharded over experts only.
        kernel_metadata: further metadata of the matrices' variables.
        bias_metadata: further metadata of the biases' variables.
        rngs: source of the initial values (stream "params").

    Raises:
        ValueError: a size is not positive, top_k exceeds num_experts or differs from the router's,
            a size is not a multiple of the block of `weight_format` or `qat`, or `qat` is combined
            with a quantised `weight_format`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        router: routing.Router | str = "renormalize",
        activation: Activation | str = SwiGLU(),  # noqa: B008 (frozen)
        use_bias: bool = False,
        router_bias: bool = False,
        shared_experts: int = 0,
        shared_gate: bool = False,
        weight_format: str | Format = BF16,
        compute: str = "auto",
        declared_compute: str | None = None,
        input_scales: bool = False,
        qat: str | Format | None = None,
        implementation: str | Sequence[str] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = nnx.initializers.lecun_normal(),  # noqa: B008 (stateless)
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008 (stateless)
        kernel_axes: tuple[str | None, str | None, str | None] | None = None,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        rngs: nnx.Rngs,
    ):
        sizes = {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_experts": num_experts,
            "top_k": top_k,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts={num_experts}, got {top_k}")
        if shared_experts < 0:
            raise ValueError(f"shared_experts must be at least 0, got {shared_experts}")

        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.shared_experts = shared_experts
        self.routing = routing.get_router(router, top_k=top_k)
        activation = get_activation(activation)
        # An activation with array parameters is data of the layer, one with numbers is static.
        self.activation = nnx.data(activation) if jax.tree.leaves(activation) else activation
        self.weight_format = get_format(weight_format).name
        self.qat = None if qat is None else get_format(qat).name
        self.compute = compute
        self.declared_compute = declared_compute
        self.implementation = (
            implementation
            if implementation is None or isinstance(implementation, str)
            else tuple(implementation)
        )
        self.dtype = dtype
        self.param_dtype = param_dtype
        if self.qat is not None and self.quantized:
            raise ValueError(
                f"qat must be None for frozen {self.weight_format} weights, got {self.qat!r}; "
                'train with weight_format="bf16" and call quantize() afterwards'
            )
        for format_name in (self.weight_format, self.qat):
            _check_blocks(format_name, hidden_size, intermediate_size)

        def kernel(shape: tuple[int, int], axes: str) -> nnx.Param:
            init = kernel_init(rngs.params(), shape, param_dtype).T
            return nnx.Param(init, **metadata(kernel_axes, kernel_metadata, axes))

        def bias(shape: tuple[int, ...], axes: str) -> nnx.Param:
            init = bias_init(rngs.params(), shape, param_dtype)
            return nnx.Param(init, **metadata(kernel_axes, bias_metadata, axes))

        def experts(shape: tuple[int, int], axes: str) -> nnx.Variable:
            keys = jax.random.split(rngs.params(), num_experts)
            about = metadata(kernel_axes, kernel_metadata, axes)

            def one(key: jax.Array) -> jax.Array:
                return kernel_init(key, shape, param_dtype).T

            if not self.quantized:
                return nnx.Param(jax.vmap(one)(keys), **about)
            # One expert at a time: all of them in param_dtype may not fit in memory.
            weights = jax.lax.map(lambda key: quantize_array(one(key), self.weight_format), keys)
            return frozen(weights, about)

        e, h, i = num_experts, hidden_size, intermediate_size
        halves = 2 if activation.gated else 1
        self.router = kernel((h, e), ".h")
        self.router_bias = bias((e,), ".") if router_bias else nnx.data(None)
        self.correction_bias = (
            CorrectionBias(jnp.zeros(e, jnp.float32), **metadata(kernel_axes, {}, "."))
            if self.routing.selection_bias
            else nnx.data(None)
        )
        self.gate_up = experts((h, halves * i), "eih")
        self.down = experts((i, h), "ehi")
        self.gate_up_bias = bias((e, halves * i), "ei") if use_bias else nnx.data(None)
        self.down_bias = bias((e, h), "eh") if use_bias else nnx.data(None)
        if shared_gate and not shared_experts:
            raise ValueError(
                "shared_gate must be False without shared experts, got True with shared_experts=0"
            )

        def input_scale() -> Any:
            if not input_scales:
                return nnx.data(None)
            return InputScale(jnp.float32(1), **metadata(kernel_axes, {}, ""))

        self.gate_up_input_scale = input_scale()
        self.down_input_scale = input_scale()
        if shared_experts and any(jnp.ndim(p) for p in dataclasses.astuple(activation)):
            raise ValueError(
                "activation must have uniform parameters when shared_experts > 0, got one with a "
                f"value per expert: {activation}"
            )
        wide = shared_experts * i
        self.shared_gate_up = kernel((h, halves * wide), "ih") if wide else nnx.data(None)
        self.shared_down = kernel((wide, h), "hi") if wide else nnx.data(None)
        self.shared_gate = kernel((h, 1), ".h") if shared_gate else nnx.data(None)

    def __call__(
        self, x: jax.Array, *, router_logits: jax.Array | None = None, return_aux: bool = False
    ) -> Any:
        """Applies the layer to the last axis of `x`.

        Args:
            x: `[..., H]`, floating point; the leading axes hold tokens and may be empty.
            router_logits: `[..., E]` to use in place of the layer's router.
            return_aux: whether to return the router's `RouterAux` too.

        Returns:
            `[..., H]` in `dtype` (that of `x` where the layer has none), or `(out, aux)`.

        Raises:
            ValueError: `x` or `router_logits` has the wrong shape or dtype.
            UnsupportedError: `implementation` names a kernel that cannot do this layer.
        """
        if (
            x.ndim < 1
            or x.shape[-1] != self.hidden_size
            or not jnp.isdtype(x.dtype, "real floating")
        ):
            raise ValueError(
                f"x must be a floating-point array [..., hidden_size={self.hidden_size}], got "
                f"{x.dtype}{list(x.shape)}"
            )
        batch = x.shape[:-1]
        tokens = x.reshape(-1, self.hidden_size)
        if router_logits is None:
            logits = self.logits(tokens)
        elif router_logits.shape == (*batch, self.num_experts):
            logits = router_logits.reshape(-1, self.num_experts).astype(jnp.float32)
        else:
            raise ValueError(
                f"router_logits must have shape {(*batch, self.num_experts)} to go with x "
                f"{x.shape}, got {router_logits.shape}"
            )
        chosen = self.routing(logits, selection_bias=array(self.correction_bias))

        tokens = tokens.astype(self.dtype or x.dtype)
        out = ops.moe_mlp(
            tokens,
            self.experts(),
            chosen.expert_ids,
            chosen.weights,
            activation=self.activation,
            compute=self.compute,
            weight_on_input=self.routing.weight_on_input,
            implementation=self.implementation,
        )
        if self.shared_experts:
            out = out + self._shared(tokens)
        out = out.reshape(*batch, self.hidden_size)

        capturing = self._capturing()
        if not (return_aux or capturing):
            return out
        aux = routing.aux(logits, chosen, score_fn=self.routing.score_fn)
        if capturing:
            self.sow(nnx.Intermediate, "router_aux", aux)
        return (out, aux) if return_aux else out

    def logits(self, tokens: jax.Array) -> jax.Array:
        """Router logits `f32[..., E]` of `tokens[..., H]`, accumulated in float32."""
        out = jnp.einsum(
            "...h,eh->...e",
            tokens.astype(jnp.float32),
            self.router[...].astype(jnp.float32),
            precision="highest",
        )
        return out if self.router_bias is None else out + self.router_bias[...].astype(jnp.float32)

    def experts(self) -> ExpertWeights:
        """The expert weights as `jaxmoe.moe_mlp` takes them, fake-quantised where `qat` is set."""
        gate_up, down = value(self.gate_up), value(self.down)
        if self.qat is not None:
            gate_up, down = fake_quantize(gate_up, self.qat), fake_quantize(down, self.qat)
        return self._experts(gate_up, down)

    def _experts(self, gate_up: Any, down: Any) -> ExpertWeights:
        return ExpertWeights(
            gate_up,
            down,
            array(self.gate_up_bias),
            array(self.down_bias),
            array(self.gate_up_input_scale),
            array(self.down_input_scale),
            self.declared_compute,
        )

    def explain(self, dtype: Any = None) -> Resolution:
        """Which kernel this layer runs on the current target, and why no other.

        >>> from flax import nnx
        >>> import jaxmoe
        >>> from jaxmoe.nn import MoE
        >>> layer = MoE(64, 128, 8, 2, weight_format="nvfp4", rngs=nnx.Rngs(0))
        >>> with jaxmoe.override(target="sm_120"):
        ...     layer.explain("bfloat16").selected
        'xla'

        Args:
            dtype: dtype of the activations; None for the layer's `dtype`, or bfloat16 without one.

        Returns:
            The `Resolution`; it prints as a table.

        Raises:
            UnsupportedError: `implementation` names only kernels that cannot run this layer.
        """
        experts = self._experts(value(self.gate_up), value(self.down))
        problem = ops.moe_mlp_problem(
            dtype or self.dtype or jnp.bfloat16,
            jax.eval_shape(
                lambda e: jax.tree.map(lambda a: a[(0,) * (e.down.ndim - 3)], e), experts
            ),
            self.top_k,
            self.activation,
            self.compute,
        )
        return ops.explain(problem, self.implementation)

    @property
    def quantized(self) -> bool:
        """Whether the expert weights are quantised, and so frozen."""
        return self.weight_format != BF16.name

    @property
    def layout(self) -> str:
        """Layout of the expert weights: "canonical", or the one that `prepare` made."""
        down = value(self.down)
        return down.layout if isinstance(down, PreparedMatrix) else CANONICAL

    def quantize(self, format: str | Format, *, method: Method = "amax") -> MoE:
        """A copy with quantised, frozen expert weights; see `jaxmoe.nn.quantize`.

        >>> from flax import nnx
        >>> from jaxmoe.nn import MoE
        >>> fp4 = MoE(64, 128, 8, 2, rngs=nnx.Rngs(0)).quantize("mxfp4", method="mse")
        >>> fp4.weight_format
        'mxfp4'
        """
        return _convert.quantize(self, format, method=method)

    def prepare(self, variant: str | None = None) -> MoE:
        """A copy in the layout of the selected kernel, or of `variant`; see `jaxmoe.nn.prepare`."""
        return _convert.prepare(self, variant)

    def _shared(self, tokens: jax.Array) -> jax.Array:
        """The shared experts: one dense MLP, products accumulated in float32."""
        gate_up = array(self.shared_gate_up).astype(tokens.dtype)
        down = array(self.shared_down).astype(tokens.dtype)
        hidden = jnp.einsum("th,ih->ti", tokens, gate_up, preferred_element_type=jnp.float32)
        parts = jnp.split(hidden, 2, axis=-1) if self.activation.gated else [hidden]
        hidden = self.activation(*parts).astype(tokens.dtype)
        out = jnp.einsum("ti,hi->th", hidden, down)
        if self.shared_gate is None:
            return out
        gate = jnp.einsum(
            "th,oh->to", tokens, array(self.shared_gate), preferred_element_type=jnp.float32
        )
        return out * jax.nn.sigmoid(gate).astype(out.dtype)

    def _capturing(self) -> bool:
        captures = getattr(self, "__captures__", ())
        return any(type(variable) is nnx.Intermediate for variable in captures)

    def _quantize(self, format: str | Format, method: Method) -> None:
        format = get_format(format)
        if self.quantized:
            raise ValueError(
                f"the layer's weights are {self.weight_format} already; quantize the unquantised "
                f"layer to {format.name} instead"
            )
        if format is BF16:
            raise ValueError("format must be a quantised one, got 'bf16'")
        _check_blocks(format.name, self.hidden_size, self.intermediate_size)
        for name in ("gate_up", "down"):
            param = getattr(self, name)
            weights = quantize_array(param[...], format, method=method)
            setattr(self, name, frozen(weights, param.get_metadata()))
        self.weight_format = format.name
        self.qat = None

    def _set_experts(self, experts: ExpertWeights) -> None:
        """Takes weights of the layer's sizes, in any format, with what they declare."""
        plain = experts.format is BF16
        for name in ("gate_up", "down"):
            about = getattr(self, name).get_metadata()
            weights = getattr(experts, name)
            setattr(self, name, nnx.Param(weights, **about) if plain else frozen(weights, about))
        if experts.gate_up_bias is not None and experts.down_bias is not None:
            assign(self.gate_up_bias, experts.gate_up_bias.astype(self.param_dtype))
            assign(self.down_bias, experts.down_bias.astype(self.param_dtype))
        for name in ("gate_up_input_scale", "down_input_scale"):
            scale = getattr(experts, name)
            setattr(self, name, nnx.data(None if scale is None else InputScale(scale)))
        self.declared_compute = experts.declared_compute
        self.weight_format = experts.format.name

    def _prepare(self, variant: str | None) -> None:
        if self.layout != CANONICAL:
            raise ValueError(
                f"the layer is prepared already, for layout {self.layout!r}; prepare the canonical "
                "layer instead"
            )
        if self.quantized:
            variant = variant or self.explain().selected

            def one_layer(experts: ExpertWeights) -> Any:
                if experts.down.ndim > 3:  # a stack of layers
                    return jax.lax.map(one_layer, experts)
                return prepare_experts(
                    experts, variant, gated=self.activation.gated, compute=self.compute
                )

            experts = one_layer(
                ExpertWeights(
                    value(self.gate_up),
                    value(self.down),
                    declared_compute=self.declared_compute,
                )
            )
            for name in ("gate_up", "down"):
                about = getattr(self, name).get_metadata()
                setattr(self, name, frozen(getattr(experts, name), about))


def _check_blocks(format_name: str | None, hidden_size: int, intermediate_size: int) -> None:
    block = None if format_name is None else get_format(format_name).block_size
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if block is not None and size % block:
            raise ValueError(
                f"{name} must be a multiple of {block}, the block of {format_name}, got {size}"
            )
