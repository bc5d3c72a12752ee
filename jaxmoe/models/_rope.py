"""Rotary position embedding and the ways in which checkpoints stretch it to longer contexts."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
    """All frequencies divided by `factor`.

    Source: Chen et al., "Position Interpolation", arXiv:2306.15595.
    """

    factor: float

    def stretch(self, rope: Rope, frequency: np.ndarray) -> np.ndarray:
        """The new frequencies."""
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Low frequencies divided by `factor`, high ones kept, a linear ramp over the dims between.

    Args:
      factor: of the context.
      original_length: context in training, in tokens.
      beta_fast: dims that turn more often than this in `original_length` are kept.
      beta_slow: dims that turn less often are divided.
      truncate: round the ends of the ramp outwards to whole dims.
      amplitude: factor on the rotated features, `0.1·log(factor) + 1` in the paper.

    Source: Peng et al., "YaRN", arXiv:2309.00071, section 3.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0

    def stretch(self, rope: Rope, frequency: np.ndarray) -> np.ndarray:
        """The new frequencies."""

        def dim_that_turns(times: float) -> float:
            wavelengths = self.original_length / (times * 2 * math.pi)
            return rope.dim * math.log(wavelengths) / (2 * math.log(rope.theta))

        low, high = dim_that_turns(self.beta_fast), dim_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rope.dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(rope.dim // 2) - low) / (high - low), 0, 1)
        return frequency * (1 - ramp) + frequency / self.factor * ramp


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Long wavelengths divided by `factor`, short ones kept, a blend between.

    Args:
      factor: of the context.
      original_length: context in training, in tokens.
      low: wavelengths above `original_length / low` are stretched in full.
      high: wavelengths below `original_length / high` are kept.

    Source: Llama 3.1's published model code (`apply_scaling`).
    """

    factor: float
    original_length: int
    low: float
    high: float

    def stretch(self, rope: Rope, frequency: np.ndarray) -> np.ndarray:
        """The new frequencies."""
        turns = self.original_length * frequency / (2 * math.pi)
        kept = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequency * kept + frequency / self.factor * (1 - kept)


Scaling: TypeAlias = Linear | Yarn | Llama3


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

    >>> Rope(dim=4, theta=10000.0).frequency.tolist()
    [1.0, 0.009999999776482582]

    Args:
      dim: how many features of a head turn, the first ones; even.
      theta: base of the frequencies `theta ** (-2i / dim)`.
      interleaved: feature 2i turns with 2i + 1; otherwise i with i + dim/2.
      scaling: how the frequencies are stretched.
    """

    dim: int
    theta: float
    interleaved: bool = False
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"dim must be even and at least 2 for the rotation, got {self.dim}")

    @property
    def frequency(self) -> np.ndarray:
        """`f32[dim / 2]`, radians per position."""
        frequency = self.theta ** (-np.arange(0, self.dim, 2, dtype=np.float64) / self.dim)
        if self.scaling is not None:
            frequency = self.scaling.stretch(self, frequency)
        return frequency.astype(np.float32)

    @property
    def amplitude(self) -> float:
        """Factor on the features that turn."""
        return self.scaling.amplitude if isinstance(self.scaling, Yarn) else 1.0


def rotate(x: jax.Array, position: jax.Array, rope: Rope) -> jax.Array:
    """Turns the first `rope.dim` features of each head by its token's position.

    Args:
      x: `[B, T, N, D]`, D at least `rope.dim`.
      position: `i32[B, T]`.
      rope: how.

    Returns:
      `[B, T, N, D]` in x.dtype, computed in float32. Interleaved pairs come out as halves: scores
      do not change, as long as queries and keys are turned alike.
    """
    turning, rest = x[..., : rope.dim].astype(jnp.float32), x[..., rope.dim :]
    angle = position.astype(jnp.float32)[:, :, None, None] * rope.frequency
    cos, sin = jnp.cos(angle) * rope.amplitude, jnp.sin(angle) * rope.amplitude
    if rope.interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = jnp.split(turning, 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1)
