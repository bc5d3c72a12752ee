"""The CPU library's FFI handlers, called directly: no Python check of jaxmoe stands between these tests and C++.

The reference and the weight packer are this file's own, in NumPy float64 from the format definitions, so that an error
shared by the library's packer and kernels cannot hide.
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
# Measured floors of the relative L2 error, with some room: f32 sums everywhere; bf16 output rounding is 1.7e-3.
TOLERANCE = {"float32": 2e-6, "bfloat16": 3e-3}


@pytest.fixture(scope="module", autouse=True)
def _targets():
    jax.devices(
        "cpu"
    )  # a backend first: a failing registration is then an error and not the end of JAX
    for name, capsule in _cpu.registrations().items():
        jax.ffi.register_ffi_target(name, capsule, platform="cpu")


# ---- reference -----------------------------------------------------------------------------------


class Weights:
    """Random packed weights [E, N, K]: nibbles, scale bytes and global scales, with their float64 values."""

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
    """One expert: codes [N, K] and scale bytes [N, K / block] to bytes, lane by lane from the layout's definition."""
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
            x = rng.integers(-2, 3, (tokens, hidden)).astype(np.float32)
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
        self.expert_ids = (
            np.stack(
                [rng.permutation(experts)[:top_k] for _ in range(tokens)]
                or [np.zeros(top_k, np.int64)][:0]
            )
            .reshape(tokens, top_k)
            .astype(np.int32)
            + offset
            if tokens
            else np.zeros((0, top_k), np.int32)
        )
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
