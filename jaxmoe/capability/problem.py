"""What is to be computed, as far as the choice of a kernel depends on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from jaxmoe.capability.table import COMPUTE, OPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be computed, as far as the choice of a kernel depends on it.

    >>> Problem(weight_format="nvfp4", hidden_size=2048, intermediate_size=768, num_experts=128,
    ...         top_k=8, declared_compute="w4a4").chain
    ('w4a4', 'w4a8', 'w4a16')

    Args:
      op: `moe_mlp` or `grouped_matmul`.
      weight_format: `nvfp4`, `mxfp4`, `mxfp8`, `fp8` or `bf16` (any unquantised array).
      compute: the arithmetic, strictly, or `auto`: what the checkpoint declares, or the nearest
        more accurate one that the target has.
      activation_dtype: dtype of `x`.
      result_dtype: dtype of the result of `grouped_matmul`; None is that of `x`.
      activation: name of the activation function; `grouped_matmul` has none and ignores it.
      bias: whether biases are added.
      hidden_size: `H`; for `grouped_matmul`, K.
      intermediate_size: `I`; for `grouped_matmul`, N.
      num_experts: `E`, experts of this shard.
      top_k: experts per token.
      declared_compute: what the checkpoint was made for; None stands for the most accurate
        (`w4a16` for FP4 weights).
      input_scales: whether the weights come with static scales of the activations.
      tokens: `T` (for `grouped_matmul`, the rows of x) where it is known. The variant never depends
        on it; which of the variant's tactics runs does.
    """

    op: str = "moe_mlp"
    weight_format: str
    compute: str = "auto"
    activation_dtype: str = "bfloat16"
    result_dtype: str | None = None
    activation: str = "swiglu"
    bias: bool = False
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    declared_compute: str | None = None
    input_scales: bool = False
    tokens: int | None = None

    def __post_init__(self) -> None:
        dtype = self.activation_dtype
        if not isinstance(dtype, str):
            object.__setattr__(self, "activation_dtype", np.dtype(dtype).name)
        _require("op", self.op, OPS)
        _require("weight_format", self.weight_format, COMPUTE)
        every = dict.fromkeys(c for computes in COMPUTE.values() for c in computes)
        _require("compute", self.compute, ("auto", *every))
        if self.declared_compute is not None:
            _require("declared_compute", self.declared_compute, COMPUTE[self.weight_format])
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k", "tokens"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")

    @property
    def declared(self) -> str:
        """The arithmetic that the checkpoint declares, with the default filled in."""
        return self.declared_compute or COMPUTE[self.weight_format][-1]

    @property
    def chain(self) -> tuple[str, ...]:
        """The arithmetic that will do, best first; never less accurate than the declared one."""
        if self.compute != "auto":
            return (self.compute,)
        computes = COMPUTE[self.weight_format]
        return computes[computes.index(self.declared) :]

    def __str__(self) -> str:
        compute = self.compute
        if compute == "auto":
            origin = "declares" if self.declared_compute else "declares nothing, taken as"
            compute = f"auto (the checkpoint {origin} {self.declared})"
        extras = [self.activation] * (self.op == "moe_mlp") + ["bias"] * self.bias
        extras += ["static input scales"] * self.input_scales
        return (
            f"{self.op} of {self.weight_format} weights, compute {compute}, "
            f"{', '.join([self.activation_dtype, *extras])}, H={self.hidden_size} "
            f"I={self.intermediate_size} E={self.num_experts} k={self.top_k}"
            + (f" T={self.tokens}" if self.tokens is not None else "")
        )


def _require(argument: str, value: str, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(allowed)}; got {value!r}")
