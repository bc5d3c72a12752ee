"""The CPU library's FFI handlers, called directly, past every check that jaxmoe makes in Python.

The reference and the weight packer are this file's own, in NumPy float64 from the format
definitions, so that an error shared by the library's packer and kernels cannot hide.
"""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

_cpu = pytest.importorskip("jaxmoe._cpu", reason="the native CPU library is not built")

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
BLOCK = {"nvfp4": 16, "mxfp4": 32}
SCALE_DTYPE = {"nvfp4": ml_dtypes.float8_e4m3fn, "mxfp4": ml_dtypes.float8_e8m0fnu}
MANIFEST = _cpu.manifest()
RUNNABLE = [
    name
    for name, entry in MANIFEST["variants"].items()
    if set(entry["features"]) <= set(_cpu.cpu_features())
]
COMPUTES = ["w4a16", "w4a8"]
# Variants with kernels on integers.
INTEGER = {
    "w4a16": {"cpu_avx2", "cpu_avx_vnni", "cpu_avx512_vnni", "cpu_avx512_bf16", "cpu_amx"},
}
INTEGER["w4a8"] = INTEGER["w4a16"] | {"cpu_avx512"}
GATED = {
    "swiglu": True,
    "swiglu_step": True,
    "geglu": True,
    "geglu_tanh": True,
    "situ": True,
    "relu2": False,
    "silu": False,
    "gelu": False,
    "gelu_tanh": False,
    "relu": False,
    "identity": False,
}
PARAMS = {"swiglu": (1.702, 1.0, 7.0), "swiglu_step": (7.0,), "situ": (4.0, 25.0)}
# Measured relative L2 errors, with some room: 3e-7 for f32; bf16 output rounding is 1.7e-3.
TOLERANCE = {"float32": 1e-6, "bfloat16": 3e-3}


@pytest.fixture(scope="module", autouse=True)
def _targets():
    jax.devices(
        "cpu"
    )  # a backend first: a failing registration is then an error and not the end of JAX
    for name, capsule in _cpu.registrations().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")


# ---- reference -----------------------------------------------------------------------------------


class Weights:
    """Random weights [E, N, K] as codes, scale bytes and global scales."""

    def __init__(self, rng, experts, n, k, fmt, exact=False):
        block = BLOCK[fmt]
        self.format = fmt
        self.codes = rng.integers(0, 16, (experts, n, k), dtype=np.uint8)
        if fmt == "nvfp4":
            bytes_ = rng.integers(0x28, 0x48, (experts, n, k // block), dtype=np.uint8)
            self.global_scale = rng.uniform(0.5, 2.0, experts).astype(np.float32)
        else:
            bytes_ = rng.integers(124, 130, (experts, n, k // block), dtype=np.uint8)
            self.global_scale = np.ones(experts, np.float32)
        if exact:
            one = 0x38 if fmt == "nvfp4" else 127
            bytes_ = np.where(
                rng.random(bytes_.shape) < 0.5, one, one + (8 if fmt == "nvfp4" else 1)
            )
            bytes_ = bytes_.astype(np.uint8)
            self.global_scale[:] = 0.5
        self.scale_bytes = bytes_

    def values(self):
        scale = self.scale_bytes.view(SCALE_DTYPE[self.format]).astype(np.float64)
        scale = np.repeat(scale, BLOCK[self.format], axis=-1)
        return E2M1[self.codes] * scale * self.global_scale[:, None, None].astype(np.float64)

    def pack(self, gated):
        return np.stack(
            [
                pack_panel32(c, s, BLOCK[self.format], gated)
                for c, s in zip(self.codes, self.scale_bytes, strict=True)
            ]
        )


def pack_panel32(codes, scales, block, gated):
    """Packs one expert, codes [N, K] and scale bytes [N, K / block], from panel32's definition."""
    n, k = codes.shape
    if gated:
        half = n // 2
        panels = -(-half // 16)
        rows = [
            [16 * p + i if 16 * p + i < half else None for i in range(16)]
            + [half + 16 * p + i if 16 * p + i < half else None for i in range(16)]
            for p in range(panels)
        ]
    else:
        panels = -(-n // 32)
        rows = [[32 * p + i if 32 * p + i < n else None for i in range(32)] for p in range(panels)]
    k_pad = -(-k // 64) * 64
    out = []
    for lanes in rows:
        c = np.zeros((32, k_pad), np.uint8)
        s = np.zeros((32, k_pad // block), np.uint8)
        for lane, row in enumerate(lanes):
            if row is not None:
                c[lane, :k], s[lane, : k // block] = codes[row], scales[row]
        for k0 in range(0, k_pad, 64):
            out.append(s[:, k0 // block : (k0 + 64) // block].T.reshape(-1))
            packed = c[:, k0 : k0 + 64 : 2] | (c[:, k0 + 1 : k0 + 64 : 2] << 4)
            out.append(packed.reshape(32, 8, 4).transpose(1, 0, 2).reshape(-1))
    return np.concatenate(out)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def swiglu(gate, up, alpha, beta, limit):
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate * sigmoid(alpha * gate) * (up + beta)


def situ(gate, up, gate_bound, up_bound):
    bounded_gate = gate_bound * np.tanh(gate / gate_bound) * sigmoid(gate)
    return bounded_gate * (up_bound * np.tanh(up / up_bound))


ACTIVATIONS = {
    "swiglu": swiglu,
    "swiglu_step": lambda g, u, lim: np.minimum(g * sigmoid(g), lim) * np.clip(u, -lim, lim),
    "geglu": lambda g, u: gelu(g) * u,
    "geglu_tanh": lambda g, u: gelu_tanh(g) * u,
    "situ": situ,
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x * sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": lambda x: np.maximum(x, 0),
    "identity": lambda x: x,
}


class Layer:
    """Operands and attributes of one moe_mlp call, with its float64 reference."""

    def __init__(
        self,
        *,
        tokens=5,
        hidden=96,
        intermediate=80,
        experts=6,
        top_k=2,
        fmt="nvfp4",
        dtype="float32",
        activation="swiglu",
        bias=True,
        offset=0,
        weight_on_input=False,
        exact=False,
        seed=0,
    ):
        rng = np.random.default_rng(seed)
        if fmt == "mxfp4":
            intermediate = -(-intermediate // 32) * 32
        self.gated = GATED[activation]
        self.tokens, self.hidden, self.intermediate = tokens, hidden, intermediate
        self.experts, self.top_k, self.offset = experts, top_k, offset
        self.format, self.dtype, self.activation = fmt, dtype, activation
        self.weight_on_input = weight_on_input
        rows = 2 * intermediate if self.gated else intermediate
        self.gate_up = Weights(rng, experts, rows, hidden, fmt, exact)
        self.down = Weights(rng, experts, hidden, intermediate, fmt, exact)
        if exact:
            # One power of two a row: activations are single weights, which bf16 holds exactly.
            x = np.zeros((tokens, hidden), np.float32)
            x[np.arange(tokens), rng.integers(0, hidden, tokens)] = rng.choice(
                [-2, -1, 1, 2], tokens
            )
        else:
            # Products of order one, where activations bend.
            spread = np.sqrt((self.gate_up.values() ** 2).mean() * hidden)
            x = (rng.standard_normal((tokens, hidden)) * 3 / spread).astype(np.float32)
        self.x = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        self.bias1 = rng.standard_normal((experts, rows)).astype(np.float32) if bias else None
        self.bias2 = rng.standard_normal((experts, hidden)).astype(np.float32) if bias else None
        params = np.array(PARAMS.get(activation, ()), np.float32)
        variation = 1 + 0.1 * np.arange(experts, dtype=np.float32)
        self.params = (
            params[:, None] * variation if params.size else np.zeros((0, experts), np.float32)
        )
        ids = [rng.permutation(experts)[:top_k] for _ in range(tokens)]
        self.expert_ids = np.array(ids, np.int32).reshape(tokens, top_k) + np.int32(offset)
        self.weights = rng.uniform(0.1, 1, (tokens, top_k)).astype(np.float32)
        if exact:
            self.weights[:] = 0.5

    def reference(self):
        w1, w2 = self.gate_up.values(), self.down.values()
        x = self.x.astype(np.float64)
        out = np.zeros((self.tokens, self.hidden))
        for t in range(self.tokens):
            for j in range(self.top_k):
                e = int(self.expert_ids[t, j]) - self.offset
                if not 0 <= e < self.experts:
                    continue
                weight = float(self.weights[t, j])
                y = w1[e] @ (x[t] * weight if self.weight_on_input else x[t])
                if self.bias1 is not None:
                    y = y + self.bias1[e]
                parts = np.split(y, 2) if self.gated else [y]
                params = self.params[:, e].astype(np.float64)
                z = w2[e] @ ACTIVATIONS[self.activation](*parts, *params)
                if self.bias2 is not None:
                    z = z + self.bias2[e]
                out[t] += z if self.weight_on_input else weight * z
        return out

    def operands(self):
        absent = np.zeros(0, np.float32)
        return {
            "x": self.x,
            "gate_up": self.gate_up.pack(self.gated),
            "gate_up_global": self.gate_up.global_scale,
            "down": self.down.pack(False),
            "down_global": self.down.global_scale,
            "gate_up_bias": absent if self.bias1 is None else self.bias1,
            "down_bias": absent if self.bias2 is None else self.bias2,
            "activation_params": self.params,
            "expert_ids": self.expert_ids,
            "weights": self.weights,
            "expert_offset": np.int32(self.offset),
        }

    def attributes(self, variant):
        return {
            "variant": variant,
            "format": self.format,
            "activation": self.activation,
            "hidden_size": np.int64(self.hidden),
            "intermediate_size": np.int64(self.intermediate),
            "weight_on_input": self.weight_on_input,
            "tactic": "",
            "compute": "w4a16",
        }

    def workspace(self, variant):
        return _cpu.workspace_bytes(
            "moe_mlp",
            tokens=self.tokens,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_experts=self.experts,
            top_k=self.top_k,
            gated=self.gated,
            x_dtype=self.dtype,
            variant=variant,
            compute="w4a16",
        )

    def run(self, variant, *, out=None, workspace=None, operands=(), attributes=()):
        """Calls the handler; `operands` and `attributes` replace some of the right ones."""
        out = out or jax.ShapeDtypeStruct((self.tokens, self.hidden), self.dtype)
        size = self.workspace(variant) if workspace is None else workspace
        work = jax.ShapeDtypeStruct((size,), jnp.uint8)
        call = jax.ffi.ffi_call("jaxmoe_moe_mlp_cpu_v1", (out, work))
        values = {**self.operands(), **dict(operands)}
        attrs = {**self.attributes(variant), **dict(attributes)}
        arrays = [jnp.asarray(value) for value in values.values()]
        return np.asarray(call(*arrays, **attrs)[0])


def relative_error(got, want):
    got = got.astype(np.float64)
    return np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)


def variants_for(dtype):
    return [v for v in RUNNABLE if dtype == "bfloat16" or v != "cpu_avx512_bf16"]


CASES = [(v, d) for d in ("float32", "bfloat16") for v in variants_for(d)]
TACTICS = [
    (v, d, tactic)
    for v, d in CASES
    for tactic in MANIFEST["variants"][v]["tactics"]
    if tactic != "integer" or (d == "bfloat16" and v in INTEGER["w4a16"])
]


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "dtype"), CASES)
@pytest.mark.parametrize("fmt", BLOCK)
@pytest.mark.parametrize("tokens", [1, 7, 70])
def test_moe_mlp_matches_float64(variant, dtype, fmt, tokens):
    layer = Layer(tokens=tokens, fmt=fmt, dtype=dtype)
    assert relative_error(layer.run(variant), layer.reference()) < TOLERANCE[dtype]


@pytest.mark.parametrize("variant", variants_for("float32"))
@pytest.mark.parametrize("activation", GATED)
def test_activations(variant, activation):
    layer = Layer(tokens=9, activation=activation, fmt="mxfp4")
    assert relative_error(layer.run(variant), layer.reference()) < TOLERANCE["float32"]


@pytest.mark.parametrize(("variant", "dtype"), CASES)
@pytest.mark.parametrize("fmt", BLOCK)
def test_exact_grid_is_exact(variant, dtype, fmt):
    layer = Layer(tokens=33, fmt=fmt, dtype=dtype, activation="relu", exact=True, bias=False)
    want = layer.reference().astype(layer.x.dtype).astype(np.float64)
    np.testing.assert_array_equal(layer.run(variant).astype(np.float64), want)


@pytest.mark.parametrize("variant", RUNNABLE)
def test_expert_shards_add_up(variant):
    whole = Layer(tokens=20, dtype="bfloat16", experts=6, bias=False)
    total = np.zeros((whole.tokens, whole.hidden))
    for first in (0, 2, 4):
        shard = Layer(tokens=20, dtype="bfloat16", experts=6, bias=False)
        shard.experts, shard.offset = 2, first
        for weights in (shard.gate_up, shard.down):
            weights.codes = weights.codes[first : first + 2]
            weights.scale_bytes = weights.scale_bytes[first : first + 2]
            weights.global_scale = weights.global_scale[first : first + 2]
        shard.params = shard.params[:, first : first + 2]
        assert relative_error(shard.run(variant), shard.reference()) < TOLERANCE["bfloat16"]
        total += shard.run(variant)
    assert relative_error(total, whole.reference()) < 2 * TOLERANCE["bfloat16"]


@pytest.mark.parametrize("variant", RUNNABLE)
def test_no_local_expert_and_no_tokens(variant):
    layer = Layer(tokens=3, dtype="bfloat16")
    far = layer.run(variant, operands={"expert_offset": np.int32(1000)})
    assert (far.astype(np.float32) == 0).all()
    assert Layer(tokens=0, dtype="bfloat16").run(variant).shape == (0, 96)


@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_weight_on_input(variant, dtype):
    layer = Layer(tokens=24, top_k=1, dtype=dtype, weight_on_input=True)
    assert relative_error(layer.run(variant), layer.reference()) < TOLERANCE[dtype]


@pytest.mark.parametrize("variant", RUNNABLE)
def test_same_bits_every_time(variant):
    layer = Layer(tokens=40, hidden=256, intermediate=128, dtype="bfloat16")
    first = layer.run(variant)
    for _ in range(5):
        np.testing.assert_array_equal(layer.run(variant).view(np.uint16), first.view(np.uint16))


def run_grouped(variant, x, weights, sizes, *, offset=0, bias=None, overrides=()):
    """Calls the grouped_matmul handler; `overrides` replace arguments of the call by name."""
    experts, n, k = weights.codes.shape
    rows = x.shape[0]
    size = _cpu.workspace_bytes(
        "grouped_matmul",
        rows=rows,
        n=n,
        k=k,
        num_experts=experts,
        num_groups=len(sizes),
        x_dtype=str(x.dtype),
        variant=variant,
        compute="w4a16",
    )
    operands = {
        "x": x,
        "w": weights.pack(False),
        "w_global": weights.global_scale,
        "bias": np.zeros(0, np.float32) if bias is None else bias,
        "group_sizes": np.asarray(sizes, np.int32),
        "group_offset": np.int32(offset),
    }
    attributes = {
        "variant": variant,
        "format": weights.format,
        "n": np.int64(n),
        "k": np.int64(k),
        "tactic": "",
        "compute": "w4a16",
    }
    overrides = dict(overrides)
    out = overrides.pop("out", jax.ShapeDtypeStruct((rows, n), x.dtype))
    for name, value in overrides.items():
        (operands if name in operands else attributes)[name] = value
    work = jax.ShapeDtypeStruct((size,), jnp.uint8)
    call = jax.ffi.ffi_call("jaxmoe_grouped_matmul_cpu_v1", (out, work))
    return np.asarray(call(*map(jnp.asarray, operands.values()), **attributes)[0])


@pytest.mark.parametrize(("variant", "dtype"), CASES)
@pytest.mark.parametrize("fmt", BLOCK)
@pytest.mark.parametrize("offset", [0, 1])
def test_grouped_matmul_matches_float64(variant, dtype, fmt, offset):
    rng = np.random.default_rng(3)
    weights = Weights(rng, 3, 40, 96, fmt)
    sizes = [2, 20, 0, 9, 5]
    x = rng.standard_normal((50, 96)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    bias = rng.standard_normal((3, 40)).astype(np.float32)
    want = np.zeros((50, 40))
    starts = np.cumsum([0, *sizes])
    for expert, value in enumerate(weights.values()):
        rows = slice(starts[expert + offset], starts[expert + offset + 1])
        want[rows] = x[rows].astype(np.float64) @ value.T + bias[expert]
    got = run_grouped(variant, x, weights, sizes, offset=offset, bias=bias)
    assert relative_error(got, want) < TOLERANCE[dtype]
    assert (got[(want == 0).all(axis=1)].astype(np.float32) == 0).all()


# ---- tactics -------------------------------------------------------------------------------------


def test_tactics_are_those_that_a_variant_has_kernels_for():
    for name, entry in MANIFEST["variants"].items():
        assert {compute: set(tactics) for compute, tactics in entry["computes"].items()} == {
            compute: {"stream", "tiles"} | ({"integer"} if name in INTEGER[compute] else set())
            for compute in COMPUTES
        }
        assert set(entry["tactics"]) == set().union(*entry["computes"].values())
        assert set(entry["tactics"].values()) == {0}  # bytes of shared memory


@pytest.mark.parametrize(("variant", "dtype", "tactic"), TACTICS)
@pytest.mark.parametrize("fmt", BLOCK)
@pytest.mark.parametrize("tokens", [1, 7, 83])
def test_every_tactic_matches_float64(variant, dtype, tactic, fmt, tokens):
    # Expert 5 takes none; with 83 tokens expert 0 takes all of them, in a row over two segments.
    layer = Layer(tokens=tokens, fmt=fmt, dtype=dtype, top_k=3, hidden=352)
    layer.expert_ids[layer.expert_ids == 5] = -1
    layer.expert_ids[:, 0] = 0
    first, second = (layer.run(variant, attributes={"tactic": tactic}) for _ in range(2))
    assert relative_error(first, layer.reference()) < TOLERANCE[dtype]
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize(("variant", "dtype", "tactic"), TACTICS)
def test_every_tactic_on_the_exact_grid(variant, dtype, tactic):
    layer = Layer(tokens=33, dtype=dtype, activation="relu", exact=True, bias=False)
    want = layer.reference().astype(layer.x.dtype).astype(np.float64)
    got = layer.run(variant, attributes={"tactic": tactic})
    np.testing.assert_array_equal(got.astype(np.float64), want)


@pytest.mark.parametrize(("variant", "dtype", "tactic"), TACTICS)
def test_every_tactic_without_work(variant, dtype, tactic):
    attributes = {"tactic": tactic}
    assert Layer(tokens=0, dtype=dtype).run(variant, attributes=attributes).shape == (0, 96)
    far = {"expert_offset": np.int32(1000)}
    got = Layer(tokens=3, dtype=dtype).run(variant, operands=far, attributes=attributes)
    assert (got.astype(np.float32) == 0).all()


@pytest.mark.parametrize(("variant", "dtype", "tactic"), TACTICS)
@pytest.mark.parametrize("fmt", BLOCK)
def test_every_tactic_of_grouped_matmul(variant, dtype, tactic, fmt):
    rng = np.random.default_rng(4)
    weights = Weights(rng, 4, 40, 224, fmt)
    sizes = [1, 0, 150, 19]
    x = rng.standard_normal((173, 224)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    want = np.zeros((173, 40))
    ends = np.cumsum(sizes)
    for value, size, end in zip(weights.values(), sizes, ends, strict=True):
        want[end - size : end] = x[end - size : end].astype(np.float64) @ value.T
    got = run_grouped(variant, x, weights, sizes, overrides={"tactic": tactic})
    assert relative_error(got, want) < TOLERANCE[dtype]
    assert (got[ends[-1] :].astype(np.float32) == 0).all()


@pytest.mark.parametrize(("variant", "dtype"), CASES)
def test_a_tactic_is_what_the_library_would_choose_for_such_rows(variant, dtype):
    """By results before they are rounded to bf16: another kernel sums in another order."""
    rng = np.random.default_rng(6)
    weights = Weights(rng, 1, 64, 1024, "nvfp4")
    x = rng.standard_normal((100, 1024)).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )

    def product(rows, tactic):
        out = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
        overrides = {"tactic": tactic, "out": out}
        return run_grouped(variant, x[:rows], weights, [rows], overrides=overrides).tobytes()

    assert product(1, "") == product(1, "stream") != product(1, "tiles")
    assert product(100, "") == product(100, "tiles") != product(100, "stream")


MOST_INTEGER_ROWS = {"cpu_amx": 4, "cpu_avx512_bf16": 4, "cpu_avx2": 16}
ANY_ROWS = {"cpu_avx512_vnni", "cpu_avx_vnni"}


@pytest.mark.parametrize("variant", sorted(INTEGER["w4a16"] & set(RUNNABLE)))
def test_up_to_which_row_integers_are_the_librarys_own_choice(variant):
    """Of 16 bits: what they round shows in some of the results' last bits."""
    rng = np.random.default_rng(8)
    weights = Weights(rng, 1, 2048, 1024, "nvfp4")
    x = rng.standard_normal((300, 1024)).astype(ml_dtypes.bfloat16)

    def product(rows, tactic):
        overrides = {"tactic": tactic}
        return run_grouped(variant, x[:rows], weights, [rows], overrides=overrides).tobytes()

    most = MOST_INTEGER_ROWS.get(variant)
    assert (most is None) == (variant in ANY_ROWS)
    for rows in [1, most or 300]:
        assert product(rows, "") == product(rows, "integer") != product(rows, "tiles")
    if most:
        assert product(most + 1, "") != product(most + 1, "integer")


@pytest.mark.parametrize(("variant", "dtype"), CASES)
@pytest.mark.parametrize("rows", [1, 8, 9, 100])
def test_every_tactic_multiplies_the_same_8_bit_integers(variant, dtype, rows):
    """Of w4a8; float32 rows too, since this arithmetic rounds them by itself."""
    rng = np.random.default_rng(7)
    weights = Weights(rng, 1, 64, 1024, "nvfp4")
    # What such integers hold, so that nothing is rounded here.
    x = rng.integers(-127, 128, (rows, 1024)) * np.exp2(rng.integers(-9, 9, (rows, 1)))
    x = x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    want = x.astype(np.float64) @ weights.values()[0].T

    def product(tactic):
        out = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
        overrides = {"tactic": tactic, "compute": "w4a8", "out": out}
        return run_grouped(variant, x, weights, [rows], overrides=overrides)

    tactics = ["stream", "tiles", *(["integer"] if variant in INTEGER["w4a8"] else [])]
    products = {tactic: product(tactic) for tactic in tactics}
    for got in products.values():
        assert relative_error(got, want) < TOLERANCE["float32"]
    if variant in INTEGER["w4a8"]:
        few = variant != "cpu_amx" or rows <= 8
        own = "integer" if few else "tiles"
        assert product("").tobytes() == products[own].tobytes()


@pytest.mark.parametrize("variant", RUNNABLE)
@pytest.mark.parametrize("compute", COMPUTES)
def test_a_tactic_that_the_variant_lacks_is_refused(variant, compute):
    if variant in INTEGER[compute]:
        names, tactic = "integer, stream, tiles", "wgmma64"
    else:
        names, tactic = "stream, tiles", "integer"
    message = (
        rf"\(cpu\): tactic must be '' or one of {names} for compute='{compute}', got '{tactic}'"
    )
    attributes = {"tactic": tactic, "compute": compute}
    layer = Layer(dtype="bfloat16")
    with pytest.raises(Exception, match="moe_mlp " + message):
        layer.run(variant, attributes=attributes)
    weights = Weights(np.random.default_rng(0), 3, 40, 96, "nvfp4")
    x = f32(9, 96).astype(ml_dtypes.bfloat16)
    with pytest.raises(Exception, match="grouped_matmul " + message):
        run_grouped(variant, x, weights, [3, 3, 3], overrides=attributes)


@pytest.mark.skipif("cpu_avx2" not in RUNNABLE, reason="needs AVX2")
def test_integers_are_refused_where_float32_is_asked_for():
    message = r"tactic 'integer' keeps 16 bits of x and needs bf16 x and results, got x "
    with pytest.raises(Exception, match=message + r"f32\[5,96\] and results f32\[5,96\]; use ''"):
        Layer().run("cpu_avx2", attributes={"tactic": "integer"})
    weights = Weights(np.random.default_rng(0), 3, 40, 96, "nvfp4")
    overrides = {"tactic": "integer", "out": jax.ShapeDtypeStruct((9, 40), jnp.float32)}
    x = f32(9, 96).astype(ml_dtypes.bfloat16)
    with pytest.raises(Exception, match=message + r"bf16\[9,96\] and results f32\[9,40\]"):
        run_grouped("cpu_avx2", x, weights, [3, 3, 3], overrides=overrides)


def test_manifest_and_features():
    assert MANIFEST["abi"] == 1
    assert MANIFEST["library"] == "cpu"
    assert {v["layout"] for v in MANIFEST["variants"].values()} == {"panel32"}
    assert MANIFEST["formats"] == ["nvfp4", "mxfp4"]
    assert MANIFEST["activations"] == list(GATED)
    assert MANIFEST["ops"] == ["moe_mlp", "grouped_matmul"]
    assert MANIFEST["variants"]["cpu_portable"]["features"] == []
    assert "cpu_portable" in RUNNABLE


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("variant", MANIFEST["variants"])
def test_workspace_stays_bounded(variant, compute):
    def size(tokens):
        return _cpu.workspace_bytes(
            "moe_mlp",
            tokens=tokens,
            hidden_size=2048,
            intermediate_size=768,
            num_experts=128,
            top_k=8,
            gated=True,
            x_dtype="bfloat16",
            variant=variant,
            compute=compute,
        )

    assert size(1) < size(64) < size(1024)
    assert size(100_000) < 40 << 20


# ---- refusals ------------------------------------------------------------------------------------


def f32(*shape):
    return np.ones(shape, np.float32)


def i32(*shape):
    return np.ones(shape, np.int32)


# Of Layer(): T = 5, H = 96, I = 80, E = 6, k = 2, nvfp4, swiglu.
BAD_OPERANDS = [
    ("x", f32(5, 64), r"x must be f32\|bf16\[\*,96\], got f32\[5,64\]"),
    ("x", f32(5, 96).astype(np.float16), r"x must be f32\|bf16\[\*,96\], got f16\[5,96\]"),
    ("x", f32(96), r"x must be f32\|bf16\[\*,96\], got f32\[96\]"),
    ("gate_up", np.zeros((6, 64), np.uint8), r"gate_up must be u8\[\*,11520\], got u8\[6,64\]"),
    ("gate_up", np.zeros((6, 11520), np.int8), r"gate_up must be u8\[\*,11520\], got i8"),
    ("gate_up", np.zeros((0, 11520), np.uint8), r"gate_up must hold at least one expert"),
    ("gate_up_global", f32(5), r"gate_up_global must be f32\[6\], got f32\[5\]"),
    ("down", np.zeros((5, 6912), np.uint8), r"down must be u8\[6,6912\], got u8\[5,6912\]"),
    ("down_global", f32(6, 1), r"down_global must be f32\[6\], got f32\[6,1\]"),
    ("gate_up_bias", f32(6, 80), r"gate_up_bias must be f32\[6,160\], got f32\[6,80\]"),
    ("down_bias", i32(6, 96), r"down_bias must be f32\[6,96\], got i32\[6,96\]"),
    ("activation_params", f32(2, 6), r"activation_params must be f32\[3,6\], got f32\[2,6\]"),
    ("expert_ids", f32(5, 2), r"expert_ids must be i32\[5,\*\], got f32\[5,2\]"),
    ("expert_ids", i32(4, 2), r"expert_ids must be i32\[5,\*\], got i32\[4,2\]"),
    ("weights", f32(5, 3), r"weights must be f32\[5,2\], got f32\[5,3\]"),
    ("expert_offset", i32(1), r"expert_offset must be i32\[\], got i32\[1\]"),
]
BAD_ATTRIBUTES = [
    ("variant", "cpu_sse9", r"variant must be one of cpu_portable, .*, got 'cpu_sse9'"),
    ("compute", "w4a4", r"compute must be one of w4a16, w4a8, got 'w4a4'"),
    ("tactic", "decode", r"tactic must be '' or one of .*, got 'decode'"),
    ("format", "fp5", r"format must be one of nvfp4, mxfp4, got 'fp5'"),
    ("activation", "mish", r"activation must be one of swiglu, .*identity, got 'mish'"),
    ("hidden_size", np.int64(100), r"hidden_size must be a positive multiple of 16 .*, got 100"),
    ("intermediate_size", np.int64(-16), r"intermediate_size must be a positive .*, got -16"),
    ("weight_on_input", True, r"weight_on_input needs top_k == 1, got expert_ids i32\[5,2\]"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_OPERANDS)
def test_bad_operand(name, value, message):
    with pytest.raises(Exception, match=r"moe_mlp \(cpu\): " + message):
        Layer().run("cpu_portable", operands={name: value})


@pytest.mark.parametrize(("name", "value", "message"), BAD_ATTRIBUTES)
def test_bad_attribute(name, value, message):
    with pytest.raises(Exception, match=r"moe_mlp \(cpu\): " + message):
        Layer().run("cpu_portable", attributes={name: value})


def test_bad_results():
    with pytest.raises(Exception, match=r"out must be f32\[5,96\], got bf16\[5,96\]"):
        Layer().run("cpu_portable", out=jax.ShapeDtypeStruct((5, 96), jnp.bfloat16))
    needed = Layer().workspace("cpu_portable")
    message = rf"workspace must have at least {needed} bytes, got u8\[{needed - 1}\]"
    with pytest.raises(Exception, match=message):
        Layer().run("cpu_portable", workspace=needed - 1)


def test_variant_that_this_machine_lacks():
    lacking = [name for name in MANIFEST["variants"] if name not in RUNNABLE]
    if not lacking:
        pytest.skip("this machine runs every variant of the library")
    with pytest.raises(Exception, match=lacking[0] + " needs CPU features that this machine lacks"):
        Layer(dtype="bfloat16").run(lacking[0], workspace=1 << 20)


@pytest.mark.skipif("cpu_avx512_bf16" not in RUNNABLE, reason="needs AVX-512 BF16")
def test_bf16_variant_refuses_f32():
    with pytest.raises(Exception, match=r"x must be bf16 for variant 'cpu_avx512_bf16'"):
        Layer().run("cpu_avx512_bf16")


BAD_GROUPED = [
    ({"x": f32(9, 64)}, r"x must be f32\|bf16\[\*,96\], got f32\[9,64\]"),
    ({"w": np.zeros((3, 7), np.uint8)}, r"w must be u8\[\*,4608\], got u8\[3,7\]"),
    ({"w_global": f32(2)}, r"w_global must be f32\[3\], got f32\[2\]"),
    ({"bias": f32(3, 41)}, r"bias must be f32\[3,40\], got f32\[3,41\]"),
    ({"group_sizes": f32(3)}, r"group_sizes must be i32\[\*\], got f32\[3\]"),
    ({"group_offset": i32(2)}, r"group_offset must be i32\[\], got i32\[2\]"),
    ({"n": np.int64(0)}, r"n must be positive, got 0"),
    ({"k": np.int64(33)}, r"k must be a positive multiple of 16 .*, got 33"),
    ({"compute": "w4a4"}, r"compute must be one of w4a16, w4a8, got 'w4a4'"),
    ({"format": "int4"}, r"format must be one of nvfp4, mxfp4, got 'int4'"),
    ({"variant": "gpu"}, r"variant must be one of .*, got 'gpu'"),
    ({"out": jax.ShapeDtypeStruct((8, 40), jnp.float32)}, r"out must be f32\|bf16\[9,40\], got"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_GROUPED)
def test_bad_grouped_matmul(overrides, message):
    rng = np.random.default_rng(0)
    weights = Weights(rng, 3, 40, 96, "nvfp4")
    # 40 columns are two panels of two superblocks of 1152 bytes.
    assert weights.pack(False).shape == (3, 4608)
    with pytest.raises(Exception, match=r"grouped_matmul \(cpu\): " + message):
        run_grouped("cpu_portable", f32(9, 96), weights, [3, 3, 3], overrides=overrides)


def test_workspace_bytes_refuses():
    sizes = {
        "tokens": 1,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_experts": 2,
        "top_k": 1,
        "gated": True,
        "x_dtype": "float32",
        "variant": "cpu_portable",
        "compute": "w4a8",
    }
    for change, message in [
        ({"variant": "cpu_sse9"}, "variant must be one of"),
        ({"compute": "w8a8"}, "compute must be one of w4a16, w4a8, got 'w8a8'"),
        ({"x_dtype": "float64"}, "x_dtype must be 'float32' or 'bfloat16', got 'float64'"),
        ({"tokens": -1}, "tokens must be >= 0, got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            _cpu.workspace_bytes("moe_mlp", **{**sizes, **change})
    with pytest.raises(ValueError, match="op must be 'moe_mlp' with these arguments, got 'conv'"):
        _cpu.workspace_bytes("conv", **sizes)


def test_huge_pages_keep_what_is_there():
    want = np.random.default_rng(0).integers(0, 256, 5 << 20, dtype=np.uint8)
    array = jnp.asarray(want).block_until_ready()
    done = _cpu.use_huge_pages(array.unsafe_buffer_pointer(), array.nbytes)
    assert done in (True, False)  # the system's choice
    np.testing.assert_array_equal(np.asarray(array), want)
    assert not _cpu.use_huge_pages(array.unsafe_buffer_pointer(), 4096)  # no whole page
