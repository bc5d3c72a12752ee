"""What the choice of a tactic depends on."""

from __future__ import annotations

import dataclasses

from jaxmoe import _processor
from jaxmoe.activations import ACTIVATIONS
from jaxmoe.capability import Resolution

BUCKETS = tuple(2**n for n in range(17))
"""Numbers of tokens that tables hold: 1, 2, 4, ... 65536."""


def bucket(tokens: int) -> int:
    """The smallest of `BUCKETS` that is not below `tokens`; the last one beyond all.

    >>> bucket(64), bucket(65), bucket(10**6)
    (64, 128, 65536)
    """
    return next((b for b in BUCKETS if b >= tokens), BUCKETS[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key:
    """The problem of one table entry.

    Args:
      device: the device's name as JAX gives it, `"NVIDIA H100 80GB HBM3"`; of a CPU, to which JAX
        gives none, that of this machine's processor with the number of usable cores.
      variant: the kernel variant.
      compute: its arithmetic.
      op: `moe_mlp` or `grouped_matmul`.
      weight_format: format of the weights.
      activation_dtype: dtype of `x`.
      hidden_size: `H`; K of `grouped_matmul`.
      intermediate_size: `I`; N of `grouped_matmul`.
      num_experts: `E`, experts of this shard.
      top_k: experts per token; 1 for `grouped_matmul`.
      gated: whether the activation has a gate, which doubles the first matrix. What else the
        activation computes is too little to count.
      tokens: one of `BUCKETS`: T, or the rows of `grouped_matmul`; 0 while that is not known.
    """

    device: str
    variant: str
    compute: str
    op: str
    weight_format: str
    activation_dtype: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    gated: bool
    tokens: int

    @classmethod
    def of(cls, resolution: Resolution) -> Key:
        """The key of a resolved problem.

        >>> from jaxmoe.capability import Problem, Target, resolve
        >>> problem = Problem(weight_format="nvfp4", hidden_size=2048, intermediate_size=768,
        ...                   num_experts=128, top_k=8, tokens=100)
        >>> key = Key.of(resolve(problem, Target.from_name("h100")))
        >>> key.device, key.variant, key.tokens
        ('h100', 'xla', 128)
        """
        problem = resolution.problem
        mlp = problem.op == "moe_mlp"
        device = resolution.target.device_kind
        activation = ACTIVATIONS.get(problem.activation)
        return cls(
            device=_processor.name() if device.lower() == "cpu" else device,
            variant=resolution.variant,
            compute=str(resolution.compute),
            op=problem.op,
            weight_format=problem.weight_format,
            activation_dtype=problem.activation_dtype,
            hidden_size=problem.hidden_size,
            intermediate_size=problem.intermediate_size,
            num_experts=problem.num_experts,
            top_k=problem.top_k if mlp else 1,
            gated=mlp and activation is not None and activation.gated,
            tokens=0 if problem.tokens is None else bucket(problem.tokens),
        )

    def at(self, tokens: int) -> Key:
        """The key for that many tokens."""
        return dataclasses.replace(self, tokens=bucket(tokens))
