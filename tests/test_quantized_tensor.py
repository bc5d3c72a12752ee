"""QuantizedTensor through JAX's transforms and storage; check; unify_global_scale; qwix."""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.formats import FORMATS, MXFP4, NVFP4
from jaxmoe.quantization import (
    QuantizedTensor,
    check,
    dequantize,
    from_qarray,
    quantize,
    to_qarray,
    unify_global_scale,
)


@functools.cache
def tensor(format, shape=(4, 6, 64), seed=0):
    return quantize(jax.random.normal(jax.random.key(seed), shape), format)


def assert_identical(a, b):
    assert a.format == b.format
    leaves_a, leaves_b = (jax.tree.leaves_with_path(x) for x in (a, b))
    assert [path for path, _ in leaves_a] == [path for path, _ in leaves_b]
    for (path, x), (_, y) in zip(leaves_a, leaves_b, strict=True):
        assert x.dtype == y.dtype, path
        assert x.shape == y.shape, path
        x, y = (np.atleast_1d(np.asarray(v)) for v in (x, y))
        np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8), err_msg=str(path))


# --- properties ----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", list(FORMATS))
def test_properties(format):
    q = tensor(format)
    assert q.shape == (4, 6, 64)
    assert q.ndim == 3
    assert q.size == 4 * 6 * 64
    global_bytes = 16 if q.format.has_global_scale else 0
    assert q.nbytes == q.size * q.format.bits_per_element / 8 + global_bytes
    assert repr(q) == f"QuantizedTensor({format}[4, 6, 64])"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(q)]
    expected = [".data"] + [".scale"] * (q.scale is not None)
    assert paths == expected + [".global_scale"] * (q.global_scale is not None)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_packed_and_elements_are_the_same_bits(format):
    q = tensor(format)
    wide = QuantizedTensor(q.elements(), q.scale, q.global_scale, q.format)
    assert wide.data.dtype == ml_dtypes.float4_e2m1fn
    assert wide.shape == q.shape
    assert wide.nbytes == q.nbytes
    check(wide)
    np.testing.assert_array_equal(np.asarray(wide.packed()), np.asarray(q.data))
    np.testing.assert_array_equal(np.asarray(dequantize(wide)), np.asarray(dequantize(q)))
    np.testing.assert_array_equal(np.asarray(jax.jit(dequantize)(wide)), np.asarray(dequantize(q)))
    assert_identical(jax.jit(lambda w: w)(wide), wide)
    codes = np.asarray(wide.data).view(np.uint8) & 15
    np.testing.assert_array_equal(codes[..., 0::2] | codes[..., 1::2] << 4, np.asarray(q.data))


@pytest.mark.parametrize("format", ["mxfp8", "fp8", "bf16"])
def test_packed_needs_fp4(format):
    for method in ("packed", "elements"):
        with pytest.raises(ValueError, match=f"{method}.. needs FP4 elements, .* {format}"):
            getattr(tensor(format), method)()


@pytest.mark.parametrize("leaf", [None, object(), 3, jax.ShapeDtypeStruct((2, 8), jnp.uint8)])
def test_unflatten_accepts_anything(leaf):
    q = tensor("nvfp4")
    treedef = jax.tree.structure(q)
    rebuilt = jax.tree.unflatten(treedef, [leaf] * 3)
    assert rebuilt.data is leaf
    assert repr(rebuilt).startswith("QuantizedTensor(nvfp4")


def test_import_needs_no_flax():
    code = (
        "import sys, jaxmoe.quantization; assert not {'flax', 'qwix', 'orbax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ})


# --- indexing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize(
    "index",
    [
        2,
        slice(1, 3),
        (slice(None), slice(2, 4)),
        (1, slice(0, 3)),
        (Ellipsis,),
        (Ellipsis, slice(1, 5), slice(None)),
        np.array([3, 0]),
        (np.array([3, 0]), slice(1, 2)),
    ],
    ids=str,
)
def test_getitem(format, index):
    q = tensor(format)
    part = check(q[index])
    np.testing.assert_array_equal(np.asarray(dequantize(part)), np.asarray(dequantize(q)[index]))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ((0, 0), "rows must be selected by a slice, got 0; use"),
        ((0, slice(2), slice(2)), "at most 2 indices"),
        ((Ellipsis, slice(0, 32)), "at most 2 indices"),
        (None, "at most 2 indices"),
    ],
    ids=str,
)
def test_getitem_refuses(index, message):
    with pytest.raises(IndexError, match=message):
        tensor("nvfp4")[index]


# --- JAX transforms ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", list(FORMATS))
def test_jit_vmap_scan(format):
    q = tensor(format)
    assert_identical(jax.jit(lambda q: q)(q), q)
    assert_identical(jax.vmap(lambda q: q)(q), q)
    shapes = []

    def body(total, expert):
        shapes.append(expert.shape)
        return total + dequantize(expert).sum(), expert

    _, stacked = jax.lax.scan(body, jnp.float32(0), q)
    assert shapes == [(6, 64)] * len(shapes)
    assert_identical(stacked, q)
    taken = jax.jit(lambda q, i: q[i])(q, 2)
    assert_identical(taken, q[2])
    abstract = jax.eval_shape(lambda: q)
    assert abstract.shape == q.shape
    assert abstract.nbytes == q.nbytes
    assert repr(abstract) == repr(q)


def test_format_is_part_of_the_jit_cache_key():
    traced = []

    @jax.jit
    def f(q):
        traced.append(q.format)
        return q.data

    leaves = [jnp.zeros((4, 32), jnp.uint8), None, None]
    for format in (NVFP4, MXFP4, NVFP4):
        f(QuantizedTensor(*leaves, format))
    assert traced == [NVFP4, MXFP4]


def test_donation():
    q = jax.tree.map(lambda leaf: leaf.copy(), tensor("nvfp4"))
    expected = dequantize(q)
    moved = jax.jit(lambda q: q, donate_argnums=0)(q)
    assert q.data.is_deleted()
    assert q.scale.is_deleted()
    np.testing.assert_array_equal(np.asarray(dequantize(moved)), np.asarray(expected))


def test_sharding_over_host_devices():
    """Experts and rows over a mesh of four CPU devices, in a process that has them."""
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from jaxmoe.quantization import QuantizedTensor, check, dequantize, quantize

        assert len(jax.devices()) == 4
        mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        x = jax.random.normal(jax.random.key(0), (8, 8, 64))
        for format in ("nvfp4", "mxfp4", "mxfp8", "fp8", "bf16"):
            q = quantize(x, format)
            split = jax.device_put(q, NamedSharding(mesh, P("expert")))
            assert check(split).shape == q.shape
            assert split.data.sharding.shard_shape(split.data.shape)[0] == 2
            want = np.asarray(dequantize(q))
            got = jax.jit(dequantize)(split)
            assert got.sharding.spec[0] == "expert", got.sharding
            np.testing.assert_array_equal(np.asarray(got), want)
            local = jax.shard_map(
                lambda q: dequantize(q), mesh=mesh, in_specs=P("expert"), out_specs=P("expert")
            )
            np.testing.assert_array_equal(np.asarray(jax.jit(local)(split)), want)
            placed = jax.jit(lambda x: quantize(x, format))(
                jax.device_put(x, NamedSharding(mesh, P("expert")))
            )
            for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(q)):
                np.testing.assert_array_equal(
                    np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)
                )
            rows = QuantizedTensor(P(None, "expert"), None, None, q.format)
            if q.scale is None and q.global_scale is None:
                spec = jax.tree.map(lambda s: NamedSharding(mesh, s), rows)
                jax.device_put(q, spec)
        print("ok")
    """
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "ok", result.stderr


# --- storage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", list(FORMATS))
def test_orbax_round_trip(format, tmp_path):
    import orbax.checkpoint as ocp

    tree = {"layer": {"down": tensor(format)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", tree)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        restored = checkpointer.restore(tmp_path / "checkpoint", abstract)
    assert_identical(restored["layer"]["down"], tree["layer"]["down"])


@pytest.mark.parametrize("format", list(FORMATS))
def test_safetensors_round_trip(format, tmp_path):
    from safetensors.numpy import load_file, save_file

    q = tensor(format)
    tensors = {name: np.asarray(leaf) for name, leaf in q.tensors("down.").items()}
    assert ("down.scale" in tensors) == (q.scale is not None)
    # The oldest readers know no 8-bit float: bits as uint8 must do as well as the dtype.
    for name in ("down.scale", "down.data"):
        if name in tensors and tensors[name].itemsize == 1:
            tensors[name] = tensors[name].view(np.uint8)
    save_file(tensors, tmp_path / "w.safetensors")
    loaded = load_file(tmp_path / "w.safetensors")
    assert_identical(QuantizedTensor.from_tensors(loaded, format, "down."), q)


@pytest.mark.parametrize("format", list(FORMATS))
def test_tensors_round_trip_in_their_own_dtypes(format):
    q = tensor(format)
    tensors = q.tensors()
    assert tensors["data"].dtype == (jnp.uint8 if q.format.is_fp4 else q.format.element)
    assert_identical(QuantizedTensor.from_tensors(tensors, format), q)


def test_from_tensors_names_what_is_missing():
    tensors = tensor("nvfp4").tensors("up.")
    del tensors["up.scale"]
    with pytest.raises(KeyError, match=r"up\.scale.* is missing: nvfp4 needs it; there are"):
        QuantizedTensor.from_tensors(tensors, "nvfp4", "up.")


# --- create and check ----------------------------------------------------------------------------


def test_create_views_bits_and_broadcasts():
    q = tensor("nvfp4")
    bits = np.asarray(q.scale).view(np.uint8)
    for total in (q.global_scale, q.global_scale[:, None], q.global_scale[:, None, None]):
        assert_identical(QuantizedTensor.create("nvfp4", q.data, bits, total), q)
    assert_identical(
        QuantizedTensor.create("nvfp4", np.asarray(q.data), q.scale, q.global_scale), q
    )
    ones = QuantizedTensor.create("nvfp4", q.data, bits)
    np.testing.assert_array_equal(np.asarray(ones.global_scale), np.ones(4))
    m = tensor("mxfp8")
    created = QuantizedTensor.create(
        "mxfp8", np.asarray(m.data).view(np.uint8), np.asarray(m.scale).view(np.uint8)
    )
    assert_identical(created, m)


def damaged(format, **leaves):
    q = tensor(format)
    merged = {"data": q.data, "scale": q.scale, "global_scale": q.global_scale, **leaves}
    return QuantizedTensor(**merged, format=q.format)


def with_byte(leaf, byte):
    bits = np.asarray(leaf).view(np.uint8).copy()
    bits[1, 2, 3 if bits.shape[-1] > 3 else 1] = byte
    return jnp.asarray(bits.view(leaf.dtype))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: damaged("nvfp4", data=jnp.zeros((4, 6, 32), jnp.int8)),
         r"w\.data: nvfp4 needs dtype float4_e2m1fn or uint8, got int8"),
        (lambda: damaged("mxfp8", data=jnp.zeros((4, 6, 64), jnp.uint8)),
         r"w\.data: mxfp8 needs dtype float8_e4m3fn, got uint8"),
        (lambda: damaged("nvfp4", data=jnp.zeros((4, 6, 28), jnp.uint8)),
         "K must be a multiple of 16 for nvfp4, got K = 56"),
        (lambda: QuantizedTensor(jnp.zeros(16, jnp.uint8), None, None, MXFP4),
         r"needs shape \[..., N, K\], got \[16\]"),
        (lambda: damaged("nvfp4", scale=None),
         r"w\.scale: nvfp4 needs float8_e4m3fn\[4, 6, 4\], got None"),
        (lambda: damaged("mxfp4", scale=jnp.zeros((4, 6, 2), jnp.uint8)),
         r"needs float8_e8m0fnu\[4, 6, 2\], got uint8\[4, 6, 2\]"),
        (lambda: damaged("nvfp4", scale=tensor("nvfp4").scale[:, :5]),
         r"needs float8_e4m3fn\[4, 6, 4\], got float8_e4m3fn\[4, 5, 4\]"),
        (lambda: damaged("nvfp4", global_scale=jnp.float32(1)),
         r"w\.global_scale: nvfp4 needs float32\[4\], got float32\[\]"),
        (lambda: damaged("nvfp4", global_scale=None), r"needs float32\[4\], got None"),
        (lambda: damaged("mxfp4", global_scale=jnp.ones(4)), r"mxfp4 has none, got float32\[4\]"),
        (lambda: damaged("bf16", scale=jnp.ones(4)), "bf16 has none"),
        (lambda: damaged("nvfp4", scale=with_byte(tensor("nvfp4").scale, 0x7F)),
         "scale: must be finite and not negative, but 1 of 96"),
        (lambda: damaged("nvfp4", scale=with_byte(tensor("nvfp4").scale, 0xFF)),
         "scale: must be finite and not negative, but 1 of 96"),
        (lambda: damaged("nvfp4", scale=with_byte(tensor("nvfp4").scale, 0x81)),
         "scale: must be finite and not negative, but 1 of 96"),
        (lambda: damaged("nvfp4", scale=with_byte(tensor("nvfp4").scale, 0)),
         "> 0 where the block has an element that is not 0, but 1 of 96"),
        (lambda: damaged("mxfp4", scale=with_byte(tensor("mxfp4").scale, 0xFF)),
         r"scale: must be finite \(0xFF is NaN\), but 1 of 48"),
        *[
            (functools.partial(damaged, format, global_scale=jnp.array([1, bad, 1, 1.0])),
             "global_scale: must be finite and > 0, but 1 of 4")
            for format in ("nvfp4", "fp8")
            for bad in (0.0, -1.0, np.nan, np.inf)
        ],
    ],
)  # fmt: skip
def test_check_refuses(make, message):
    q = make()
    with pytest.raises(ValueError, match=message):
        check(q)


def test_check_accepts_zero_blocks_of_either_sign():
    q = damaged("nvfp4", data=jnp.full((4, 6, 32), 0x88, jnp.uint8))
    zero = QuantizedTensor(q.data, jnp.zeros_like(q.scale), q.global_scale, q.format)
    assert check(zero) is zero


def test_check_inside_jit():
    bad = damaged("nvfp4", global_scale=jnp.array([1, 0, 1, 1.0]))

    @jax.jit
    def constant(x):
        check(bad)
        return x

    with pytest.raises(ValueError, match="global_scale: must be finite and > 0"):
        constant(1.0)
    jax.jit(lambda q: check(q, "w"))(bad)  # traced: values unknown
    abstract = jax.eval_shape(lambda: bad)
    assert check(abstract) is abstract
    with pytest.raises(ValueError, match=r"down\.scale: nvfp4 needs"):
        jax.eval_shape(lambda q: check(q, "down"), damaged("nvfp4", scale=None))


# --- unify_global_scale --------------------------------------------------------------------------


def rescaled(q, factor):
    """The same bits under a global scale `factor` times as large."""
    return QuantizedTensor(q.data, q.scale, q.global_scale * factor, q.format)


def values(*parts):
    return np.concatenate([np.asarray(dequantize(part)) for part in parts], -2)


@pytest.mark.parametrize("factor", [1.0, 0.5, 4.0, 2.0**-5, 2.0**5])
def test_unify_powers_of_two_are_exact(factor):
    gate = tensor("nvfp4")
    up = rescaled(tensor("nvfp4", shape=(4, 10, 64), seed=1), 0)
    up = QuantizedTensor(up.data, up.scale, gate.global_scale * factor, up.format)
    joined, report = unify_global_scale(gate, up)
    assert joined.shape == (4, 16, 64)
    np.testing.assert_array_equal(values(joined), values(gate, up))
    np.testing.assert_array_equal(np.asarray(report.max_error), 0)
    np.testing.assert_array_equal(np.asarray(report.relative_l2), 0)
    assert str(report) == "global scales unified exactly in all 4 matrices"
    check(joined)
    if factor <= 1:
        np.testing.assert_array_equal(
            np.asarray(joined.global_scale), np.asarray(gate.global_scale)
        )
        np.testing.assert_array_equal(np.asarray(joined.data[:, :6]), np.asarray(gate.data))
        np.testing.assert_array_equal(np.asarray(joined.data[:, 6:]), np.asarray(up.data))


def test_unify_takes_the_smaller_scale_where_only_that_is_exact():
    # A scale of 2^-9 under elements 0.5 and 6 cannot be halved, one of 224 can be doubled.
    data = jnp.full((1, 2, 8), 0x17, jnp.uint8)
    small = QuantizedTensor.create("nvfp4", data, np.full((1, 2, 1), 0x01, np.uint8), [1.0])
    large = QuantizedTensor.create("nvfp4", data, np.full((1, 2, 1), 0x76, np.uint8), [2.0])
    joined, report = unify_global_scale(small, large)
    assert joined.global_scale.tolist() == [1.0]
    np.testing.assert_array_equal(values(joined), values(small, large))
    assert "exactly" in str(report)


@pytest.mark.parametrize("factor", [3.0, 1 / 3, 0.77, 1000.0])
def test_unify_requantises_and_reports(factor):
    gate, up = tensor("nvfp4"), tensor("nvfp4", seed=1)
    up = rescaled(up, np.array([factor, 1, factor, 1], np.float32))
    up = QuantizedTensor(
        up.data, up.scale, up.global_scale.at[1].set(gate.global_scale[1]), up.format
    )
    joined, report = unify_global_scale(gate, up)
    check(joined)
    old, new = values(gate, up).astype(np.float64), values(joined).astype(np.float64)
    change = np.abs(new - old)
    largest = np.abs(old).reshape(4, 12, 4, 16).max(-1)
    error = (change.reshape(4, 12, 4, 16).max(-1) / largest).max((1, 2))
    l2 = np.linalg.norm(change, axis=(1, 2)) / np.linalg.norm(old, axis=(1, 2))
    np.testing.assert_allclose(np.asarray(report.max_error), error, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(report.relative_l2), l2, rtol=1e-4)
    assert error[1] == 0
    assert error[0] > 0
    # e4m3 block scales are within 2^-4 of any, and the search keeps the elements on their grid.
    assert l2.max() < 0.04
    assert "requantised" in str(report)
    # The larger part's blocks already stand on the shared scale.
    kept = (gate, up)[factor > 1]
    rows = slice(0, 6) if factor <= 1 else slice(6, 12)
    np.testing.assert_array_equal(new[0, rows], np.asarray(dequantize(kept))[0])


def test_unify_zero_matrix_changes_nothing():
    gate = tensor("nvfp4")
    up = quantize(jnp.zeros((4, 6, 64)), "nvfp4")
    joined, report = unify_global_scale(gate, up)
    np.testing.assert_array_equal(values(joined), values(gate, up))
    assert "exactly" in str(report)


def test_unify_under_jit_and_for_one_matrix():
    gate, up = tensor("nvfp4")[0], rescaled(tensor("nvfp4", seed=1)[1], 3.0)
    joined, report = unify_global_scale(gate, up)
    assert joined.shape == (12, 64)
    assert joined.global_scale.shape == report.max_error.shape == ()
    assert "1 of 1 matrices requantised" in str(report)
    assert_identical(jax.jit(unify_global_scale)(gate, up)[0], joined)


def test_unify_of_nothing():
    for shape in ((0, 6, 64), (4, 0, 64)):
        q = quantize(jnp.zeros(shape), "nvfp4")
        joined, report = unify_global_scale(q, q)
        assert joined.shape == (shape[0], 2 * shape[1], 64)
        assert report.max_error.shape == shape[:1]


def test_unify_fp8():
    gate, up = tensor("fp8"), tensor("fp8", seed=1)
    up = QuantizedTensor(up.data, None, gate.global_scale * 0.25, up.format)
    joined, report = unify_global_scale(gate, up)
    np.testing.assert_allclose(values(joined), values(gate, up), rtol=2**-4, atol=1e-4)
    assert np.asarray(report.max_error).max() <= 2**-8
    check(joined)


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8", "bf16"])
def test_unify_only_joins_formats_without_a_global_scale(format):
    gate, up = tensor(format), tensor(format, shape=(4, 10, 64), seed=1)
    joined, report = unify_global_scale(gate, up)
    np.testing.assert_array_equal(values(joined), values(gate, up))
    assert "exactly in all 4" in str(report)
    check(joined)


def test_unify_refuses():
    with pytest.raises(ValueError, match="up: must have gate's format nvfp4, got mxfp4"):
        unify_global_scale(tensor("nvfp4"), tensor("mxfp4"))
    with pytest.raises(ValueError, match=r"up: must have gate's shape \[4, 6, 64\] but for N"):
        unify_global_scale(tensor("nvfp4"), tensor("nvfp4", shape=(4, 6, 32)))
    with pytest.raises(ValueError, match=r"up\.global_scale: must be finite and > 0"):
        unify_global_scale(tensor("nvfp4"), rescaled(tensor("nvfp4"), 0.0))


# --- qwix ----------------------------------------------------------------------------------------


@pytest.fixture
def qwix():
    return pytest.importorskip("qwix", reason="qwix needs a newer JAX than the oldest supported")


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "mxfp8", "fp8"])
def test_qarray_round_trip(format, qwix):
    q = tensor(format)
    array = to_qarray(q)
    assert isinstance(array, qwix.QArray)
    assert array.shape == q.shape
    np.testing.assert_allclose(
        np.asarray(qwix.dequantize(array)),
        np.asarray(dequantize(q)),
        rtol=0 if format != "nvfp4" else 2.0**-23,
    )
    back = from_qarray(array, format)
    np.testing.assert_array_equal(
        np.asarray(back.data).view(np.uint8), np.asarray(q.data).view(np.uint8)
    )
    np.testing.assert_allclose(
        np.asarray(dequantize(back)), np.asarray(dequantize(q)), rtol=2.0**-22
    )
    if format != "nvfp4":
        assert_identical(back, q)
    else:
        np.testing.assert_array_equal(
            np.asarray(back.scale).view(np.uint8), np.asarray(q.scale).view(np.uint8)
        )


@pytest.mark.parametrize(("format", "tile"), [("nvfp4", 16), ("mxfp4", 32)])
def test_qarray_made_by_qwix(format, tile, qwix):
    x = jax.random.normal(jax.random.key(0), (4, 6, 64))
    array = qwix.quantize(x, format, channelwise_axes=[0, 1], tiled_axes={2: tile})
    q = from_qarray(array, format)
    np.testing.assert_array_equal(np.asarray(dequantize(q)), np.asarray(qwix.dequantize(array)))


def test_qarray_of_wider_tiles_repeats_scales(qwix):
    q = tensor("mxfp4")
    scale = jnp.full((4, 1, 1), 2.0)
    wide = from_qarray(qwix.QArray(qvalue=q.elements(), scale=scale), "mxfp4")
    np.testing.assert_array_equal(np.asarray(wide.scale).view(np.uint8), 128)


def test_qarray_refuses(qwix):
    q = tensor("mxfp4")
    elements, ones = q.elements(), jnp.ones((4, 6, 2))
    with pytest.raises(ValueError, match=r"values that mxfp4 cannot hold exactly; quantize\("):
        from_qarray(qwix.QArray(qvalue=elements, scale=3 * ones), "mxfp4")
    scale = jax.random.uniform(jax.random.key(0), (4, 6, 4))
    with pytest.raises(ValueError, match="values that nvfp4 cannot hold"):
        from_qarray(qwix.QArray(qvalue=elements, scale=scale), "nvfp4")
    with pytest.raises(ValueError, match="mxfp8 needs float8_e4m3fn, got float4_e2m1fn"):
        from_qarray(qwix.QArray(qvalue=elements, scale=ones), "mxfp8")
    with pytest.raises(ValueError, match=r"mxfp4 needs shape \[4, 6, 2\] or one that tiles it"):
        from_qarray(qwix.QArray(qvalue=elements, scale=jnp.ones((4, 6, 4))), "mxfp4")
    with pytest.raises(ValueError, match="zero_point: must be None"):
        from_qarray(qwix.QArray(elements, ones, zero_point=elements[:, :, :1]), "mxfp4")
    with pytest.raises(ValueError, match="needs scales, and bf16 has none"):
        to_qarray(tensor("bf16"))


def test_doctests():
    """The examples of the public functions."""
    import doctest

    from jaxmoe import _quantize, _quantized_tensor, _unify_global_scale, formats

    names = {"jax": jax, "jnp": jnp, "np": np, "quantize": quantize}
    for module in (formats, _quantize, _quantized_tensor, _unify_global_scale):
        result = doctest.testmod(module, extraglobs=names)
        assert result.failed == 0, module
        assert result.attempted > 0, module
