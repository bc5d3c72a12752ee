"""Activations as NVFP4 and MXFP8, bit for bit against the oracle's own rules."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from jaxmoe import _codecs as codecs
from jaxmoe.kernels import operands

RULES = {"w4a4": oracle.nvfp4_rows, "w4a8": oracle.mxfp8_rows}
COMPILED = {compute: jax.jit(operands.OPERANDS[compute]) for compute in RULES}
every_rule = pytest.mark.parametrize("compute", RULES)


def rows(dtype=np.float32, seed=0):
    """Rows of every size; blocks far below their row's largest; ties; zeros; odd values."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1500, 96)) * np.exp2(rng.integers(-60, 60, (1500, 1)))
    x[::3] *= np.exp2(rng.integers(-16, 1, (500, 96)))
    x[1::7] = rng.integers(-24, 25, x[1::7].shape) / 4  # small grids: full of ties
    x[2::31] = 0
    x[3::17, 32:64] = 0
    return x.astype(dtype).astype(np.float32)


def check(compute, x, input_scale):
    scale = None if input_scale is None else jnp.float32(input_scale)
    values, factor = COMPILED[compute](jnp.asarray(x), scale)
    want, want_factor = RULES[compute](x, input_scale)
    assert values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(values).astype(np.float64), want)
    np.testing.assert_array_equal(np.asarray(factor).astype(np.float64), want_factor)


@every_rule
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("input_scale", [None, 0.0017, 1.0, 3e-20])
def test_every_value_is_that_of_the_rule(compute, dtype, input_scale):
    x = rows(dtype)
    check(compute, x, input_scale)


@every_rule
def test_shapes(compute):
    for shape in ((0, 32), (3, 0), (2, 3, 64)):
        values, factor = jax.eval_shape(operands.OPERANDS[compute], jnp.ones(shape), None)
        assert values.shape == shape
        assert factor.shape == (*shape[:-1], 1)


@every_rule
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("input_scale", [None, 0.01])
def test_what_is_not_finite_poisons_its_row_alone(compute, bad, input_scale):
    x = rows()[:8]
    x[3, 5] = bad
    scale = None if input_scale is None else jnp.float32(input_scale)
    values, factor = COMPILED[compute](jnp.asarray(x), scale)
    assert np.isnan(factor[3, 0])
    others = np.delete(np.arange(8), 3)
    want, _ = RULES[compute](x[others], input_scale)
    np.testing.assert_array_equal(np.asarray(values).astype(np.float64)[others], want)


def test_quotients_are_rounded_correctly():
    rng = np.random.default_rng(0)
    x, d = np.abs(rng.standard_normal((2, 200_000))) * np.exp2(rng.integers(-60, 60, (2, 200_000)))
    x, d = x.astype(np.float32), d.astype(np.float32)
    near = d * (rng.integers(1, 64, d.shape) / 8).astype(np.float32)  # quotients near short numbers
    for a in (x, near, near.astype(ml_dtypes.bfloat16).astype(np.float32)):
        want = a / d
        np.testing.assert_array_equal(jax.jit(codecs.divide)(a, d), want)
    assert codecs.divide(jnp.float32(0), jnp.float32(3)) == 0
    assert codecs.divide(jnp.float32(2.0**100), jnp.float32(2.0**-100)) == np.inf
    assert codecs.divide(jnp.float32(2.0**-120), jnp.float32(2.0**120)) == 0


def test_sums_are_rounded_to_bfloat16_under_jit_too():
    x = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    got = jax.jit(lambda x: operands.round_sums(x) * 1)(x)
    np.testing.assert_array_equal(got, x.astype(ml_dtypes.bfloat16).astype(np.float32))
