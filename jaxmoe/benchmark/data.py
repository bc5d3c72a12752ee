"""Random weights, made without quantising anything, and random routings."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.benchmark.layers import Layer
from jaxmoe.experts import CANONICAL, ExpertWeights, Matrix, PreparedMatrix
from jaxmoe.formats import FLOAT8_E4M3, Format, get_format
from jaxmoe.kernels import fragment, layouts, panel
from jaxmoe.quantization import QuantizedTensor, dequantize

_ELEMENT_RMS = math.sqrt(68.5 / 8)  # of the sixteen e2m1 codes
_POOL = 1 << 24  # random bytes drawn; longer arrays repeat them


def _bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    """uint8 of `shape`; beyond `_POOL` the same bytes again, since only their size matters."""
    pool = np.frombuffer(rng.bytes(min(math.prod(shape), _POOL)), np.uint8)
    return _repeat(jnp.asarray(pool), shape)


@functools.partial(jax.jit, static_argnums=1)
def _repeat(pool: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # On the device: moving gigabytes there would take longer than measuring.
    size = math.prod(shape)
    return jnp.tile(pool, -(-size // pool.size))[:size].reshape(shape)


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=0)
def _replace(bits: jax.Array, start: int, size: int, values: jax.Array) -> jax.Array:
    return bits.at[..., start : start + size].set(values)


def _scale_bits(bits: jax.Array, fmt: Format) -> jax.Array:
    """Random bytes to block scales near 1 (e4m3: 0.5 to 1.9; e8m0: 0.5 or 1)."""
    if fmt.scale == FLOAT8_E4M3:
        return bits & 0x0F | 0x30
    return (bits & 1) + 126


def _global_scale(num_experts: int, k: int, fmt: Format) -> jax.Array:
    # Weights of root mean square 1 / sqrt(K), so that activations keep their size.
    value = 1 / (math.sqrt(k) * _ELEMENT_RMS) if fmt.has_global_scale else 1.0
    return jnp.full(num_experts, value, jnp.float32)


def _canonical(
    rng: np.random.Generator, e: int, n: int, k: int, fmt: Format, gated: bool
) -> QuantizedTensor:
    assert fmt.block_size is not None
    assert fmt.scale is not None
    return QuantizedTensor(
        _bytes(rng, (e, n, k // 2)),
        jax.lax.bitcast_convert_type(
            _scale_bits(_bytes(rng, (e, n, k // fmt.block_size)), fmt), fmt.scale
        ),
        _global_scale(e, k, fmt) if fmt.has_global_scale else None,
        fmt,
    )


def _panel32(
    rng: np.random.Generator, e: int, n: int, k: int, fmt: Format, gated: bool
) -> PreparedMatrix:
    size = panel.superblock_bytes(fmt)
    assert fmt.block_size is not None
    scales = panel.SUPERBLOCK // fmt.block_size * panel.LANES
    bits = _bytes(rng, (e, panel.num_bytes(n, k, fmt, gated) // size, size))
    bits = _replace(bits, 0, scales, _scale_bits(bits[..., :scales], fmt))
    return PreparedMatrix(
        data=bits.reshape(e, -1),
        global_scale=_global_scale(e, k, fmt),
        layout=panel.NAME,
        format=fmt,
        rows=n,
        k=k,
        gated=gated,
    )


def _sm90_fragment(
    rng: np.random.Generator, e: int, n: int, k: int, fmt: Format, gated: bool
) -> PreparedMatrix:
    # Padding would have to be zeros; no layer here has any.
    assert n % fragment.STRIP == k % fragment.BLOCK == 0
    size = fragment.block_bytes(fmt)
    bits = _bytes(rng, (e, fragment.num_bytes(n, k, fmt, gated) // size, size))
    scales = size - fragment.STRIP * fragment.BLOCK // 2
    # The layout's own codes: exponents -1 and 0 of NVFP4; of MXFP4 the largest and the one below,
    # with a power of two for the matrix.
    codes = bits[..., -scales:]
    codes = (codes & 0x0F) + 0x98 if fmt.has_global_scale else (codes & 1) + 243
    top = _global_scale(e, k, fmt)
    if not fmt.has_global_scale:
        top = jnp.full(e, 2.0 ** round(-math.log2(math.sqrt(k) * _ELEMENT_RMS)), jnp.float32)
    return PreparedMatrix(
        data=_replace(bits, size - scales, scales, codes).reshape(e, -1),
        global_scale=top,
        layout=fragment.NAME,
        format=fmt,
        rows=n,
        k=k,
        gated=gated,
    )


_MAKERS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {CANONICAL: _canonical, panel.NAME: _panel32, fragment.NAME: _sm90_fragment}
)


def random_experts(layer: Layer, weight_format: str, layout: str, seed: int) -> ExpertWeights:
    """Random FP4 experts in the layout of a kernel.

    >>> from jaxmoe.benchmark import TINY
    >>> random_experts(TINY, "nvfp4", "panel32", seed=0).layout
    'panel32'

    The packed bytes are drawn, not computed, because quantising and rearranging a large layer
    takes far longer than measuring it. Layouts without a maker of their own are prepared from
    canonical bytes.

    Args:
      layer: sizes.
      weight_format: `nvfp4` or `mxfp4`.
      layout: a key of `jaxmoe.kernels.layouts.LAYOUTS`, or `canonical`.
      seed: of the random bytes.
    """
    fmt = get_format(weight_format)
    rng = np.random.default_rng(seed)
    e, h, i = layer.num_experts, layer.hidden_size, layer.intermediate_size

    def matrix(n: int, k: int, gated: bool) -> Matrix:
        if layout in _MAKERS:
            return _MAKERS[layout](rng, e, n, k, fmt, gated)
        return layouts.pack(_canonical(rng, e, n, k, fmt, gated), layout, gated)

    return ExpertWeights(matrix(2 * i, h, True), matrix(h, i, False))


def random_tokens(layer: Layer, tokens: int, dtype: Any, seed: int) -> tuple[jax.Array, ...]:
    """`x[T, H]`, `expert_ids[T, k]` and `weights[T, k]`: k distinct experts, all alike."""
    rng = np.random.default_rng(seed)
    score = rng.random((tokens, layer.num_experts), np.float32)
    ids = np.argpartition(score, layer.top_k - 1, axis=1)[:, : layer.top_k].astype(np.int32)
    weights = rng.uniform(0.5, 1.5, ids.shape).astype(np.float32)
    weights /= weights.sum(axis=1, keepdims=True)
    x = jax.random.normal(jax.random.key(seed), (tokens, layer.hidden_size), jnp.float32)
    return x.astype(dtype), jnp.asarray(ids), jnp.asarray(weights)


def _expert(w: Matrix, expert: jax.Array) -> jax.Array:
    """`f64[N, K]`, exactly what the bits say."""
    index = expert[None]
    part: Any = layouts.unpack(w, index) if isinstance(w, PreparedMatrix) else w[index]
    if part.global_scale is None:
        return dequantize(part)[0].astype(jnp.float64)
    # Element times block scale is exact in float32; times the global scale only in float64.
    unscaled = dataclasses.replace(part, global_scale=jnp.ones_like(part.global_scale))
    return dequantize(unscaled)[0].astype(jnp.float64) * part.global_scale[0].astype(jnp.float64)


@jax.jit
def _expert_mlp(experts: ExpertWeights, expert: jax.Array, x: jax.Array) -> jax.Array:
    gate, up = jnp.split(x @ _expert(experts.gate_up, expert).T, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ _expert(experts.down, expert).T


def reference(experts: ExpertWeights, tokens: tuple[jax.Array, ...], rows: Any) -> np.ndarray:
    """`f64[len(rows), H]`: the layer in float64 for some of the tokens.

    Args:
      experts: weights, canonical or prepared.
      tokens: what `random_tokens` gave.
      rows: which tokens.
    """
    x, ids, weights = (np.asarray(a[jnp.asarray(rows)]) for a in tokens)
    y = np.zeros(x.shape)
    with jax.enable_x64(True):
        wide = jnp.asarray(x.astype(np.float64))
        for e in np.unique(ids):
            share = np.where(ids == e, weights.astype(np.float64), 0).sum(axis=1, keepdims=True)
            y += share * np.asarray(_expert_mlp(experts, jnp.int32(e), wide))
    return y


def distance(y: Any, expected: np.ndarray) -> float:
    """Relative L2 distance."""
    difference = np.asarray(y).astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def sample_rows(tokens: int, sample: int = 4) -> np.ndarray:
    """At most `sample` of the tokens, spread evenly, with the first and the last."""
    return np.unique(np.linspace(0, tokens - 1, sample).astype(int))


def relative_error(
    y: jax.Array, experts: ExpertWeights, tokens: tuple[jax.Array, ...], *, sample: int = 4
) -> float:
    """Relative L2 distance of `y[T, H]` from `reference`, on `sample` tokens spread evenly."""
    rows = sample_rows(len(y), sample)
    return distance(y[rows], reference(experts, tokens, rows))
