"""Problems for the shared suite: random ones, exact-grid ones, and the named edges.

A problem is made of NumPy arrays and raw weight bits, so the oracle and the package read the same
bits and share no code; `jax_weight`, `jax_activation` and the methods calling them are the bridge.

Exact-grid problems are built so that every product and every partial sum is a multiple of one power
of two, below 2^24 of them, and so that every activation saturates: any order of float32 sums
gives the same value. `assert_exact` proves it for each problem, trusting no construction.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import oracle
from oracle import BLOCK_SIZES, GATED, Bits

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
ROUTINGS = (
    "uniform",
    "skewed",
    "hot",
    "single",
    "duplicates",
    "sparse",
    "round_robin",
    "out_of_range",
    "none",
)
ACTIVATIONS = tuple(oracle.ACTIVATIONS)
PARAMETRIC = {"swiglu": 3, "swiglu_step": 1, "situ": 2}  # name -> number of parameters

# The documented defaults clamp far from typical values, so most problems use parameters that bite.
UNIFORM_PARAMS = {"swiglu": (1.702, 1.0, 1.5), "swiglu_step": (0.75,), "situ": (1.5, 2.0)}
PER_EXPERT_RANGES = {
    "swiglu": ((0.5, 2.0), (-0.5, 1.5), (0.5, 3.0)),
    "swiglu_step": ((0.3, 2.0),),
    "situ": ((0.5, 4.0), (0.5, 8.0)),
}


@dataclass(frozen=True)
class Spec:
    """What a problem looks like; with `seed` it determines every bit.

    num_experts counts the local experts; num_total (default: the same) is what ids are drawn from.
    params: "default", "uniform" or "per_expert". scales: "normal", "wide" (the whole range of the
    block-scale format), "zero_blocks", "huge" (2^30 into `down` 2^-60), "tiny" (the reverse).
    input_scales: static ones for both products, near what normally distributed values call for.
    """

    tokens: int = 17
    num_experts: int = 8
    top_k: int = 2
    hidden_size: int = 96
    intermediate_size: int = 64
    weight_format: str = "nvfp4"
    dtype: str = "float32"
    activation_name: str = "swiglu"
    params: str = "default"
    bias: bool = False
    routing: str = "uniform"
    expert_offset: int = 0
    num_total: int | None = None
    weight_on_input: bool = False
    scales: str = "normal"
    packed: bool = True
    input_scales: bool = False
    seed: int = 0

    @property
    def gated(self) -> bool:
        return self.activation_name in GATED

    @property
    def total(self) -> int:
        return self.num_experts if self.num_total is None else self.num_total

    @property
    def id(self) -> str:
        """A short name for pytest: what differs from the default."""
        default = Spec()
        parts = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        ]
        return ",".join(parts) or "default"


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of moe_mlp as NumPy arrays; `gate_up` and `down` are raw bits."""

    spec: Spec
    x: np.ndarray
    gate_up: Bits
    down: Bits
    expert_ids: np.ndarray
    weights: np.ndarray
    params: tuple[Any, ...]
    gate_up_bias: np.ndarray | None = None
    down_bias: np.ndarray | None = None
    input_scales: tuple[np.float32 | None, np.float32 | None] = (None, None)

    def oracle_kwargs(self) -> dict[str, Any]:
        return {
            "activation": self.spec.activation_name,
            "params": self.params,
            "gate_up_bias": self.gate_up_bias,
            "down_bias": self.down_bias,
            "expert_offset": self.spec.expert_offset,
            "weight_on_input": self.spec.weight_on_input,
        }

    def oracle_args(self) -> tuple[Any, ...]:
        return self.x, self.gate_up, self.down, self.expert_ids, self.weights

    def pairs(self, arithmetic: str = "exact") -> np.ndarray:
        """float64[T, k, H]: what each slot adds to the output."""
        return oracle.moe_mlp_pairs(
            *self.oracle_args(), **self.oracle_kwargs(), arithmetic=arithmetic,
            input_scales=self.input_scales,
        )  # fmt: skip

    def expected(self) -> np.ndarray:
        return oracle.moe_mlp(*self.oracle_args(), **self.oracle_kwargs())

    def gradients(self, cotangent: np.ndarray):
        return oracle.moe_mlp_gradients(cotangent, *self.oracle_args(), **self.oracle_kwargs())

    def activation(self) -> Any:
        """The package's activation; parameters go in by field order, which is documented."""
        return jax_activation(self.spec.activation_name, self.params)

    def experts(self) -> Any:
        """jaxmoe.ExpertWeights with the same bits."""
        import jax.numpy as jnp

        import jaxmoe

        def optional(value):
            return None if value is None else jnp.asarray(value)

        return jaxmoe.ExpertWeights(
            gate_up=jax_weight(self.gate_up, packed=self.spec.packed),
            down=jax_weight(self.down, packed=self.spec.packed),
            gate_up_bias=optional(self.gate_up_bias),
            down_bias=optional(self.down_bias),
            gate_up_input_scale=optional(self.input_scales[0]),
            down_input_scale=optional(self.input_scales[1]),
        )

    def call_kwargs(self) -> dict[str, Any]:
        return {
            "activation": self.activation(),
            "expert_offset": self.spec.expert_offset,
            "weight_on_input": self.spec.weight_on_input,
        }

    def call_args(self) -> tuple[Any, ...]:
        import jax.numpy as jnp

        return (
            jnp.asarray(self.x),
            self.experts(),
            jnp.asarray(self.expert_ids),
            jnp.asarray(self.weights),
        )


def default_params(name: str) -> tuple[float, ...]:
    """An activation's default parameters, as the oracle has them."""
    return oracle.ACTIVATIONS[name].__defaults__ or ()


def jax_activation(name: str, params: tuple[Any, ...] = ()) -> Any:
    """The package's activation from positional parameters; arrays go in as tuples of floats."""
    import jaxmoe.activations

    hashable = (p if np.ndim(p) == 0 else tuple(float(v) for v in p) for p in params)
    return jaxmoe.activations.ACTIVATIONS[name](*hashable)


def jax_weight(w: Bits, packed: bool = True) -> Any:
    """jaxmoe.QuantizedTensor (or an Array for bf16) with the bits of `w`.

    packed: two e2m1 per uint8; otherwise float4_e2m1fn elements.
    """
    import jax.numpy as jnp

    import jaxmoe

    scale_dtype = ml_dtypes.float8_e4m3fn if w.format == "nvfp4" else ml_dtypes.float8_e8m0fnu
    if w.format in ("nvfp4", "mxfp4"):
        data = w.data
        if not packed:
            data = oracle.unpack_nibbles(data).view(ml_dtypes.float4_e2m1fn)
    elif w.format == "bf16":
        return jnp.asarray(w.data.view(ml_dtypes.bfloat16))
    else:
        data = w.data.view(ml_dtypes.float8_e4m3fn)
    return jaxmoe.QuantizedTensor(
        data=jnp.asarray(data),
        scale=None if w.scale is None else jnp.asarray(w.scale.view(scale_dtype)),
        global_scale=None if w.global_scale is None else jnp.asarray(w.global_scale),
        format=jaxmoe.formats.get_format(w.format),
    )


# --- pieces -------------------------------------------------------------------------------------


def make_routing(rng: np.random.Generator, kind: str, tokens: int, total: int, top_k: int):
    """int32[T, k] ids of one of ROUTINGS; distinct per token where the kind allows it."""
    shape = (tokens, top_k)
    if kind == "single":
        ids = np.full(shape, rng.integers(total))
    elif kind == "round_robin":
        ids = np.arange(tokens * top_k).reshape(shape) % total
    elif kind in ("duplicates", "out_of_range"):
        ids = rng.integers(0, total, shape)
    elif kind == "none":
        ids = rng.choice(np.array([-1, total, -(2**31), 2**31 - 1, total + 7]), shape)
    elif kind == "sparse":
        ids = rng.choice(rng.permutation(total)[:2], shape)
    else:
        score = rng.random((tokens, total))
        if kind == "skewed":
            score = score ** (1.0 + np.arange(total))  # expert 0 nearly always wins
        elif kind == "hot":
            score[:, rng.integers(total)] = 2.0
        order = np.argsort(-score, axis=1)
        ids = order[:, np.arange(top_k) % total]  # k > E repeats experts
    if kind == "out_of_range":
        outside = rng.choice(np.array([-1, total, -(2**31), 2**31 - 1]), shape)
        ids = np.where(rng.random(shape) < 0.4, outside, ids)
    return ids.astype(np.int32)


def _pack(codes: np.ndarray) -> np.ndarray:
    return (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)


def _e4m3_bits(values: np.ndarray) -> np.ndarray:
    """Bits of values that e4m3 holds exactly (asserted)."""
    bits = np.asarray(values, np.float64).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(oracle.decode_e4m3(bits), values)
    return bits


def random_weight(
    rng: np.random.Generator,
    weight_format: str,
    shape: tuple[int, int, int],
    scales: str = "normal",
    exponent: int = 0,
) -> Bits:
    """Random bits of a weight [E, N, K] with root mean square near 2^exponent / sqrt(K)."""
    num_experts, rows, columns = shape
    target = 2.0**exponent / math.sqrt(columns)
    spread = rng.uniform(0.5, 2.0, num_experts)
    if weight_format == "bf16":
        values = rng.standard_normal(shape) * target
        return Bits("bf16", values.astype(ml_dtypes.bfloat16).view(np.uint16))
    if weight_format in ("mxfp8", "fp8"):
        data = (rng.standard_normal(shape) * 32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        if weight_format == "fp8":
            return Bits("fp8", data, None, (spread * target / 32).astype(np.float32))
        codes, rms = data, 32.0
    else:
        codes, rms = rng.integers(0, 16, shape).astype(np.uint8), math.sqrt(68.5 / 8)

    block = BLOCK_SIZES[weight_format]
    blocks = (num_experts, rows, columns // block)
    global_scale = None
    if weight_format == "nvfp4":
        wide = scales == "wide"
        scale = rng.integers(0x01 if wide else 0x30, 0x7F if wide else 0x41, blocks)
        typical = math.sqrt(np.mean(oracle.decode_e4m3(scale) ** 2)) if scale.size else 1.0
        global_scale = (spread * target / (rms * typical)).astype(np.float32)
    else:
        low = -40 if scales == "wide" else -1
        scale = 127 + round(math.log2(target / rms)) + rng.integers(low, 2, blocks)
    scale = scale.astype(np.uint8)
    if scales == "zero_blocks":
        zero = rng.random(blocks) < 0.3
        scale = np.where(zero, 0, scale).astype(np.uint8)
        # A zero block holds zeros of either sign; an e8m0 scale of code 0 is 2^-127.
        sign = codes & 8 if weight_format != "mxfp8" else codes & 0x80
        codes = np.where(np.repeat(zero, block, axis=-1), sign, codes).astype(np.uint8)
    data = codes if weight_format == "mxfp8" else _pack(codes)
    return Bits(weight_format, data, scale, global_scale)


def _random_params(rng: np.random.Generator, spec: Spec) -> tuple[Any, ...]:
    if spec.activation_name not in PARAMETRIC or spec.params == "default":
        return ()
    if spec.params == "uniform":
        return UNIFORM_PARAMS[spec.activation_name]
    ranges = PER_EXPERT_RANGES[spec.activation_name]
    return tuple(rng.uniform(*r, spec.num_experts).astype(np.float32) for r in ranges)


def _input_scales(spec: Spec) -> tuple[np.float32 | None, np.float32 | None]:
    """A largest value of 2 to 6 over 448 * 6, so that some values saturate."""
    if not spec.input_scales:
        return None, None
    first, second = np.random.default_rng([spec.seed, 5]).uniform(2, 6, 2) / (448 * 6)
    return np.float32(first), np.float32(second)


def random_problem(spec: Spec) -> Problem:
    """A problem with normally distributed activations and uniformly distributed weight codes."""
    rng = np.random.default_rng([spec.seed, 1])
    width = spec.intermediate_size * (2 if spec.gated else 1)
    first, second = {"huge": (30, -60), "tiny": (-30, 60)}.get(spec.scales, (0, 0))
    if not spec.gated and spec.activation_name != "relu2":
        second //= 2
    experts, hidden = spec.num_experts, spec.hidden_size
    weights = rng.uniform(0.05, 1.0, (spec.tokens, spec.top_k))
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-30)
    if spec.routing == "duplicates":
        weights *= rng.choice(np.array([1.0, -2.5, 0.0]), weights.shape)
    ids = make_routing(rng, spec.routing, spec.tokens, spec.total, spec.top_k)
    shape = (experts, width, hidden)
    return Problem(
        spec=spec,
        x=rng.standard_normal((spec.tokens, hidden)).astype(DTYPES[spec.dtype]),
        gate_up=random_weight(rng, spec.weight_format, shape, spec.scales, first),
        down=random_weight(
            rng, spec.weight_format, (experts, hidden, spec.intermediate_size), spec.scales, second
        ),
        expert_ids=ids,
        weights=weights.astype(np.float32),
        params=_random_params(rng, spec),
        gate_up_bias=rng.standard_normal((experts, width)).astype(np.float32)
        if spec.bias
        else None,
        down_bias=rng.standard_normal((experts, hidden)).astype(np.float32) if spec.bias else None,
        input_scales=_input_scales(spec),
    )


# --- exact grid ---------------------------------------------------------------------------------

# Hidden values are multiples of UNIT. There sigmoid, tanh and erf are 0 or ±1, exactly in float32
# and to far below a float32 ulp in float64, so every activation is exact.
UNIT = 1024.0
_WHOLE_CODES = np.array([0, 2, 4, 5, 6, 7, 8, 10, 12, 13, 14, 15], np.uint8)  # 0 ±1 ±2 ±3 ±4 ±6


def _exact_weight(rng, weight_format, codes, block_values, unit) -> Bits:
    """codes[E, N, K] with small exact block scales times a power of two `unit`."""
    if weight_format == "nvfp4":
        global_scale = np.full(codes.shape[0], unit, np.float32)
        return Bits("nvfp4", _pack(codes), _e4m3_bits(block_values), global_scale)
    exponents = np.log2(block_values * unit)
    assert np.array_equal(exponents, np.round(exponents))
    return Bits(weight_format, _pack(codes), (127 + exponents).astype(np.uint8))


def _exact_params(rng, spec: Spec) -> tuple[Any, ...]:
    if spec.activation_name not in PARAMETRIC:
        return ()
    choices = {
        "swiglu": ((1.0, 2.0, 4.0), (0.0, UNIT), (3 * UNIT, 4 * UNIT, 8 * UNIT, np.inf)),
        "swiglu_step": ((3 * UNIT, 4 * UNIT, 8 * UNIT),),
        "situ": ((2.0, 3.0, 4.0), (16.0, 24.0, 25.0)),
    }[spec.activation_name]
    defaults = {"swiglu": (1.0, 0.0, np.inf), "swiglu_step": (4 * UNIT,), "situ": (4.0, 25.0)}
    if spec.params == "default":
        return defaults[spec.activation_name]
    if spec.params == "uniform":
        return tuple(choice[1] for choice in choices)
    return tuple(
        rng.choice(np.array(choice), spec.num_experts).astype(np.float32) for choice in choices
    )


def exact_problem(spec: Spec) -> Problem:
    """A problem whose float32 result does not depend on the order of the sums.

    The activation's output also fits bfloat16, so the same holds where GEMM 2 is fed in bf16; a
    draw in which a product of gate and up needs more bits is discarded for the next.
    """
    for attempt in range(100):
        problem = _exact_candidate(spec, np.random.default_rng([spec.seed, 2, attempt]))
        if assert_exact(problem):
            return problem
    raise AssertionError(f"no exact problem in 100 draws of {spec}")


def _exact_candidate(spec: Spec, rng: np.random.Generator) -> Problem:
    """One draw.

    With biases, or by a coin, a token has two non-zero inputs and all blocks share one scale
    ("pair"); otherwise one non-zero input, all sixteen codes, and a scale of its own for every
    block.
    """
    experts, hidden, inner = spec.num_experts, spec.hidden_size, spec.intermediate_size
    block = BLOCK_SIZES[spec.weight_format]
    params = _exact_params(rng, spec)
    pair = spec.bias or bool(rng.integers(2))
    halves = 2 if spec.gated else 1
    width = inner * halves

    x = np.zeros((spec.tokens, hidden))
    for row in x:
        where = rng.permutation(hidden)[: 2 if pair else 1]
        row[where] = rng.choice(np.array([-1.0, 1.0]), where.size)
        row *= 1.0 if spec.bias else rng.choice(np.array([1.0, 2.0]))
    if pair:
        codes = rng.choice(_WHOLE_CODES, (experts, width, hidden))
        scales = np.ones((experts, width, hidden // block))
    else:
        codes = rng.integers(0, 16, (experts, width, hidden)).astype(np.uint8)
        scales = rng.choice(np.array([1.0, 2.0]), (experts, width, hidden // block))
        if spec.gated and spec.weight_format == "nvfp4" and not params:
            odd = np.array([1.0, 1.25, 1.5, 1.75])  # the fraction of the e4m3 scale counts too
            scales[:, inner:] = rng.choice(odd, scales[:, inner:].shape)
    # Half codes (0.5, 1.5) halve the smallest hidden value: twice the unit keeps it saturated.
    gate_up = _exact_weight(rng, spec.weight_format, codes, scales, UNIT if pair else 2 * UNIT)

    product = spec.gated or spec.activation_name == "relu2"
    size = 1.0 if spec.activation_name == "situ" else UNIT**2 if product else UNIT
    down_codes = rng.integers(0, 16, (experts, hidden, inner)).astype(np.uint8)
    down_scales = rng.choice(np.array([1.0, 2.0]), (experts, hidden, inner // block))
    down = _exact_weight(rng, spec.weight_format, down_codes, down_scales, 1.0 / size)

    signs = [-1.0, 1.0]
    if spec.weight_on_input:
        choices = signs if spec.bias else [-2.0, *signs, 2.0]
    else:
        choices = [-0.5, 0.25, 0.5, 1.0]
    return Problem(
        spec=spec,
        x=x.astype(DTYPES[spec.dtype]),
        gate_up=gate_up,
        down=down,
        expert_ids=make_routing(rng, spec.routing, spec.tokens, spec.total, spec.top_k),
        weights=rng.choice(np.array(choices), (spec.tokens, spec.top_k)).astype(np.float32),
        params=params,
        gate_up_bias=(UNIT * rng.integers(-3, 4, (experts, width))).astype(np.float32)
        if spec.bias
        else None,
        down_bias=(0.5 * rng.integers(-8, 9, (experts, hidden))).astype(np.float32)
        if spec.bias
        else None,
    )


def _unit_exponent(values: np.ndarray) -> int:
    """The largest e such that every value is a multiple of 2^e."""
    values = np.asarray(values, np.float64)
    mantissa, exponent = np.frexp(values[values != 0])
    if not mantissa.size:
        return 0
    whole = (mantissa * 2.0**53).astype(np.int64)
    return int((exponent - 53 + np.log2((whole & -whole).astype(np.float64))).min())


def _assert_exact_matmul(lhs: np.ndarray, rhs: np.ndarray, bias=None) -> None:
    """lhs[M, K] rhs[N, K]^T + bias is exact in float32 in any order."""
    unit = _unit_exponent(lhs) + _unit_exponent(rhs)
    bound = np.abs(lhs) @ np.abs(rhs).T
    if bias is not None:
        unit, bound = min(unit, _unit_exponent(bias)), bound + np.abs(bias)
    assert not bound.size or bound.max() <= 2.0 ** (unit + 24), (bound.max(), unit)


def assert_exact(problem: Problem) -> bool:
    """Proves that no float32 operation of moe_mlp rounds on this problem, whatever its order.

    Returns:
      Whether the activation's output fits bfloat16 too.
    """
    fits_bf16 = True
    gate_up, down = problem.gate_up.decode(), problem.down.decode()
    x, weights = problem.x.astype(np.float64), problem.weights.astype(np.float64)
    kwargs = problem.oracle_kwargs()
    local = problem.expert_ids.astype(np.int64) - problem.spec.expert_offset
    for expert in range(gate_up.shape[0]):
        tokens, slots = np.nonzero(local == expert)
        weight = weights[tokens, slots][:, None]
        rows = x[tokens] * weight if problem.spec.weight_on_input else x[tokens]
        bias = None if problem.gate_up_bias is None else problem.gate_up_bias[expert]
        _assert_exact_matmul(rows, gate_up[expert], bias)
        result = rows @ gate_up[expert].T + (0.0 if bias is None else bias)
        params = oracle._expert_params(kwargs["params"], expert)
        value, _, _ = oracle.activate(problem.spec.activation_name, result, params)
        # Saturation leaves at most exp(-UNIT) of a rounding: nothing may be left after float32.
        rounded = value.astype(np.float32).astype(np.float64)
        np.testing.assert_allclose(value, rounded, rtol=0, atol=1e-6)
        in_bf16 = rounded.astype(ml_dtypes.bfloat16).astype(np.float64)
        fits_bf16 = fits_bf16 and np.array_equal(rounded, in_bf16)
        bias = None if problem.down_bias is None else problem.down_bias[expert]
        _assert_exact_matmul(rounded, down[expert], bias)
    pairs = problem.pairs().astype(np.float32).astype(np.float64)
    bound = np.abs(pairs).sum(1)
    assert not bound.size or bound.max() <= 2.0 ** (_unit_exponent(pairs) + 24)
    return fits_bf16


# --- named edges --------------------------------------------------------------------------------

EDGES: dict[str, Spec] = {
    "default": Spec(),
    "more_experts_than_slots": Spec(num_experts=64, top_k=4, tokens=33),
    "no_tokens": Spec(tokens=0),
    "one_token": Spec(tokens=1, num_experts=16, top_k=8),
    "odd_tokens": Spec(tokens=131),
    "one_expert": Spec(num_experts=1, top_k=1, tokens=7),
    "one_expert_two_slots": Spec(num_experts=1, top_k=2, tokens=7),
    "empty_experts": Spec(num_experts=32, routing="sparse"),
    "hot_expert": Spec(num_experts=16, top_k=3, tokens=67, routing="hot"),
    "all_to_one": Spec(routing="single", tokens=70),
    "skewed": Spec(routing="skewed", num_experts=24, top_k=6, tokens=50),
    "duplicates": Spec(routing="duplicates", num_experts=3, top_k=5),
    "more_slots_than_experts": Spec(num_experts=2, top_k=8),
    "out_of_range": Spec(routing="out_of_range", top_k=4),
    "nothing_in_range": Spec(routing="none", bias=True),
    "shard": Spec(num_experts=4, num_total=12, expert_offset=4, top_k=3, bias=True),
    "shard_nothing_local": Spec(num_experts=2, num_total=4, expert_offset=64),
    "negative_offset": Spec(num_experts=8, num_total=4, expert_offset=-3, routing="duplicates"),
    "smallest": Spec(hidden_size=32, intermediate_size=32, tokens=3),
    "odd_multiples_of_32": Spec(hidden_size=160, intermediate_size=224),
    "long_k": Spec(hidden_size=1056, intermediate_size=32, tokens=5),
    "wide_inner": Spec(hidden_size=32, intermediate_size=1056, tokens=5),
    "bias": Spec(bias=True),
    "bias_non_gated": Spec(bias=True, activation_name="relu2"),
    "gpt_oss": Spec(bias=True, params="uniform", weight_format="mxfp4", top_k=4, num_experts=32),
    "per_expert_parameters": Spec(bias=True, params="per_expert"),
    "per_expert_shard": Spec(params="per_expert", num_total=16, expert_offset=8, top_k=3),
    "weight_on_input": Spec(weight_on_input=True, top_k=1),
    "weight_on_input_bias": Spec(weight_on_input=True, top_k=1, bias=True),
    "weight_on_input_out_of_range": Spec(weight_on_input=True, top_k=1, routing="out_of_range"),
    "wide_scales": Spec(scales="wide"),
    "zero_blocks": Spec(scales="zero_blocks"),
    "huge_scales": Spec(scales="huge"),
    "tiny_scales": Spec(scales="tiny"),
    "float4_elements": Spec(packed=False),
    **{f"activation_{name}": Spec(activation_name=name, bias=True) for name in ACTIVATIONS},
    **{
        f"activation_{name}_uniform": Spec(activation_name=name, params="uniform")
        for name in PARAMETRIC
    },
    **{
        f"activation_{name}_per_expert": Spec(activation_name=name, params="per_expert")
        for name in PARAMETRIC
    },
}


# --- grouped matmul -----------------------------------------------------------------------------

GROUPINGS = ("ragged", "even", "hot", "empty", "short", "all_zero")


@dataclass(frozen=True)
class GroupedSpec:
    """One grouped_matmul; num_groups counts group_sizes, num_experts the groups that w holds."""

    rows: int = 37
    num_experts: int = 6
    out_size: int = 64
    in_size: int = 96
    weight_format: str = "nvfp4"
    dtype: str = "float32"
    bias: bool = False
    grouping: str = "ragged"
    group_offset: int | None = None
    num_groups: int | None = None
    scales: str = "normal"
    input_scale: float | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class GroupedProblem:
    spec: GroupedSpec
    x: np.ndarray
    w: Bits
    group_sizes: np.ndarray
    bias: np.ndarray | None

    def expected(self, arithmetic: str = "exact") -> np.ndarray:
        return oracle.grouped_matmul(
            self.x,
            self.w,
            self.group_sizes,
            bias=self.bias,
            group_offset=self.spec.group_offset or 0,
            arithmetic=arithmetic,
            input_scale=self.spec.input_scale,
        )

    def call_args(self) -> tuple[Any, ...]:
        import jax.numpy as jnp

        return jnp.asarray(self.x), jax_weight(self.w), jnp.asarray(self.group_sizes)

    def call_kwargs(self) -> dict[str, Any]:
        import jax.numpy as jnp

        return {
            "bias": None if self.bias is None else jnp.asarray(self.bias),
            "group_offset": self.spec.group_offset,
            "input_scale": None
            if self.spec.input_scale is None
            else jnp.float32(self.spec.input_scale),
        }


def make_group_sizes(rng: np.random.Generator, grouping: str, rows: int, groups: int):
    """int32[G] with a sum of at most `rows`."""
    if grouping == "all_zero":
        return np.zeros(groups, np.int32)
    if grouping == "hot":
        share = np.zeros(groups)
        share[rng.integers(groups)] = 1.0
    elif grouping == "even":
        share = np.ones(groups) / groups
    else:
        share = rng.dirichlet(np.full(groups, 0.5))
        if grouping == "empty":
            share[rng.permutation(groups)[: groups // 2]] = 0.0
    filled = rows * 2 // 3 if grouping == "short" else rows
    edges = np.floor(np.cumsum(share) * filled + 1e-9).astype(np.int64)
    return np.diff(edges, prepend=0).astype(np.int32)


def _grouped(spec: GroupedSpec, rng, x, w, bias) -> GroupedProblem:
    groups = spec.num_experts if spec.num_groups is None else spec.num_groups
    sizes = make_group_sizes(rng, spec.grouping, spec.rows, groups)
    return GroupedProblem(spec, x.astype(DTYPES[spec.dtype]), w, sizes, bias)


def random_grouped(spec: GroupedSpec) -> GroupedProblem:
    rng = np.random.default_rng([spec.seed, 3])
    shape = (spec.num_experts, spec.out_size, spec.in_size)
    bias = rng.standard_normal(shape[:2]).astype(np.float32) if spec.bias else None
    x = rng.standard_normal((spec.rows, spec.in_size))
    return _grouped(spec, rng, x, random_weight(rng, spec.weight_format, shape, spec.scales), bias)


def exact_grouped(spec: GroupedSpec) -> GroupedProblem:
    """Small whole x, every code, block scales with fraction bits: exact in float32 in any order."""
    rng = np.random.default_rng([spec.seed, 4])
    shape = (spec.num_experts, spec.out_size, spec.in_size)
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    values = [1.0, 2.0, 4.0] if spec.weight_format == "mxfp4" else [0.5, 1.0, 1.5, 1.625, 3.5]
    blocks = (*shape[:2], spec.in_size // BLOCK_SIZES[spec.weight_format])
    scales = rng.choice(np.array(values), blocks)
    w = _exact_weight(rng, spec.weight_format, codes, scales, 0.25)
    bias = (0.5 * rng.integers(-8, 9, shape[:2])).astype(np.float32) if spec.bias else None
    x = rng.integers(-8, 9, (spec.rows, spec.in_size)).astype(np.float64)
    for expert in range(spec.num_experts):
        _assert_exact_matmul(x, w.decode()[expert], None if bias is None else bias[expert])
    return _grouped(spec, rng, x, w, bias)


GROUPED_EDGES: dict[str, GroupedSpec] = {
    "default": GroupedSpec(),
    "bias": GroupedSpec(bias=True),
    "no_rows": GroupedSpec(rows=0, grouping="all_zero"),
    "one_row": GroupedSpec(rows=1),
    "even": GroupedSpec(grouping="even", rows=48),
    "hot": GroupedSpec(grouping="hot", rows=131),
    "empty_groups": GroupedSpec(grouping="empty", num_experts=33),
    "rows_past_the_sum": GroupedSpec(grouping="short", bias=True),
    "all_groups_empty": GroupedSpec(grouping="all_zero", bias=True),
    "one_group": GroupedSpec(num_experts=1, grouping="even"),
    "offset": GroupedSpec(num_groups=12, group_offset=3, bias=True),
    "offset_zero": GroupedSpec(num_groups=12, group_offset=0),
    "offset_last": GroupedSpec(num_groups=12, group_offset=6, grouping="short", bias=True),
    "odd_multiples_of_32": GroupedSpec(in_size=160, out_size=224),
    "wide_scales": GroupedSpec(scales="wide"),
    "zero_blocks": GroupedSpec(scales="zero_blocks"),
}
