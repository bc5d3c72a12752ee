"""The judge is judged: formats against ml_dtypes, gradients against differences, purity by AST."""

import ast
import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import problems
import pytest
from problems import EDGES, GROUPED_EDGES, Spec


def test_oracle_imports_numpy_and_the_standard_library_alone():
    tree = ast.parse(Path(oracle.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names == {"numpy", "math", "collections.abc", "dataclasses"}


@pytest.mark.parametrize(
    ("decode", "dtype", "bits"),
    [
        (oracle.decode_e2m1, ml_dtypes.float4_e2m1fn, 4),
        (oracle.decode_e4m3, ml_dtypes.float8_e4m3fn, 8),
        (oracle.decode_e8m0, ml_dtypes.float8_e8m0fnu, 8),
        (oracle.decode_bf16, ml_dtypes.bfloat16, 16),
    ],
)
def test_every_code_decodes_as_ml_dtypes_does(decode, dtype, bits):
    codes = np.arange(2**bits, dtype=np.uint16 if bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):  # signalling NaN codes
        got, want = decode(codes), codes.view(dtype).astype(np.float64)
    np.testing.assert_array_equal(got, want)
    number = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got[number]), np.signbit(want[number]))


@pytest.mark.parametrize(
    ("dtype", "digits", "largest"),
    [
        (ml_dtypes.float8_e4m3fn, (3, -6), 448),
        (ml_dtypes.bfloat16, (7, -126), 3e38),
        (np.float16, (10, -14), 65504),
    ],
)
def test_rounding_is_that_of_ml_dtypes(dtype, digits, largest):
    """Every float16, ties and subnormals of e4m3 among them, and float32 of every size."""
    rng = np.random.default_rng(0)
    with np.errstate(invalid="ignore"):
        x = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    wide = rng.standard_normal(2**14) * np.exp2(rng.integers(-30, 30, 2**14))
    x = np.concatenate([x, np.float32(wide)])
    x = x[np.abs(x) <= largest]
    got = oracle.rounded(x.astype(np.float64), *digits)
    np.testing.assert_array_equal(got, x.astype(dtype).astype(np.float64))
    np.testing.assert_array_equal(np.signbit(got), np.signbit(x))


def test_rows_are_rounded_to_e4m3_with_the_least_power_of_two():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 96)) * np.exp2(rng.integers(-90, 90, (400, 1)))
    x[:8, 0] = [448, 449, 448 * 2.0**20, 224, 225, 1, -448, 1e-30]
    x[:8, 1:] = 0
    x = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    got = oracle.fp8_rows(x)
    for row, want in zip(x, got, strict=True):
        s = next(s for s in np.exp2(np.arange(-126.0, 127)) if np.abs(row).max() <= 448 * s)
        e4m3 = np.float32(row / s).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
        np.testing.assert_array_equal(want, e4m3 * s)
    normal = np.abs(x) >= np.abs(x).max(-1, keepdims=True) * 2.0**-13
    assert (np.abs(got - x)[normal] <= 2.0**-4 * np.abs(x)[normal]).all()
    assert not oracle.fp8_rows(np.zeros((2, 3))).any()
    # Neither s nor 1 / s is subnormal, though the largest value would ask for it.
    assert oracle.fp8_rows(np.float64([[2.0**-126]])) == 2.0**-126
    assert oracle.fp8_rows(np.float64([[2.0**-136]])) == 0


def test_e2m1_is_rounded_to_even():
    """All midpoints of the grid, and a little to each side of them."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for code in range(7):
        middle = (table[code] + table[code + 1]) / 2
        want = [code, code + code % 2, code + 1]
        got = oracle.nearest_e2m1(np.array([middle - 1e-9, middle, middle + 1e-9]))
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(oracle.nearest_e2m1(table), np.arange(8))


def test_rebasing_leaves_what_is_near_the_largest_scale():
    scale = np.uint8([[[200, 189, 188, 0]], [[5, 11, 0, 3]], [[0, 0, 0, 0]]])
    data = np.full((3, 1, 64), 0x21, np.uint8)  # 0.5, 1, 0.5, 1, ...
    w = oracle.Bits("mxfp4", data, scale)
    codes, d, row = oracle.rebased(w)
    np.testing.assert_array_equal(row, [[194], [5], [0]])
    np.testing.assert_array_equal(d, [[[6, -5, -5, -5]], [[0, 6, -5, -2]], [[0, 0, 0, 0]]])
    np.testing.assert_array_equal(codes[0, 0, ::32], [1, 1, 0, 0])
    np.testing.assert_array_equal(codes[0, 0, 1::32], [2, 2, 1, 0])
    np.testing.assert_array_equal(oracle.decode_rebased(w)[1:], w.decode()[1:])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_w4a8_is_the_double_loop_of_its_definition(dtype):
    spec = Spec(
        tokens=5, num_experts=4, num_total=6, expert_offset=1, bias=True, dtype=dtype,
        weight_format="mxfp4", scales="wide",
    )  # fmt: skip
    p = problems.random_problem(spec)
    first, second = oracle.decode_rebased(p.gate_up), oracle.decode_rebased(p.down)
    want, cast = np.zeros((5, 2, 96)), problems.DTYPES[dtype]
    for t, j in np.ndindex(5, 2):
        e = int(p.expert_ids[t, j]) - 1
        if not 0 <= e < 4:
            continue
        h = first[e] @ oracle.fp8_rows(p.x[t].astype(np.float64)) + p.gate_up_bias[e]
        gate, up = np.split(h, 2)
        h = np.float32(gate / (1 + np.exp(-gate)) * up).astype(cast).astype(np.float64)
        y = second[e] @ oracle.fp8_rows(h) + p.down_bias[e]
        want[t, j] = float(p.weights[t, j]) * np.float32(y).astype(cast).astype(np.float64)
    np.testing.assert_allclose(p.pairs("w4a8"), want, rtol=1e-12, atol=1e-12)
    error = np.linalg.norm(p.pairs("w4a8") - p.pairs()) / np.linalg.norm(p.pairs())
    assert 1e-3 < error < 0.06


def test_rows_become_nvfp4_by_the_rule():
    """Against ml_dtypes, which rounds by itself; the order of float32 operations is the rule's."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 64)) * np.exp2(rng.integers(-40, 40, (300, 1)))
    x[::3] *= np.exp2(rng.integers(-14, 1, (100, 64)))  # blocks far below the row's largest
    x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    for static in (None, np.float32(0.00123)):
        values, factor = oracle.nvfp4_rows(x, static)
        for row in range(300):
            g = np.abs(x[row]).max() / np.float32(2688) if static is None else static
            assert factor[row, 0] == g
            for b in range(4):
                block = x[row, 16 * b : 16 * b + 16]
                wanted = min(np.abs(block).max() / (np.float32(6) * g), np.float32(448))
                scale = np.float32(wanted.astype(ml_dtypes.float8_e4m3fn))
                step = scale * g
                quotient = np.clip(block / step, -6, 6) if step else np.zeros(16, np.float32)
                want = quotient.astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale
                np.testing.assert_array_equal(values[row, 16 * b : 16 * b + 16], want)


def test_nvfp4_ties_zeros_saturation_and_odd_values():
    def row(*first, rest=0.0):
        return np.array([[*first] + [rest] * (16 - len(first))])

    # g = 6 / 2688 = 2^-6 / 7, and fl(448 fl(2^-6 / 7)) is 1: quotients are the values themselves.
    values, factor = oracle.nvfp4_rows(row(6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -5, -0.25), None)
    assert factor[0, 0] == np.float32(6) / np.float32(2688)
    want = [6, 4, 4, 2, 2, 1, 1, 0, -4, -0.0] + [0] * 6
    np.testing.assert_array_equal(values[0], 448 * np.array(want))
    # Beyond the largest by a static scale: the block scale saturates, then e2m1.
    values, factor = oracle.nvfp4_rows(row(100.0, -3.0), 1 / 448)
    assert values[0, 0] == 448 * 6
    assert values[0, 1] == 448 * -3
    # Rows of zeros, and blocks too small for any scale: e4m3 rounds below 2^-10 to 0.
    values, factor = oracle.nvfp4_rows(np.zeros((2, 32)), None)
    assert not values.any()
    assert (factor == 1).all()
    values, _ = oracle.nvfp4_rows(np.concatenate([row(2688.0), row(2.0**-9 * 3)], 1), None)
    assert not values[0, 16:].any()
    values, _ = oracle.nvfp4_rows(np.concatenate([row(2688.0), row(2.0**-9 * 6)], 1), None)
    assert values[0, 16] == 2.0**-9 * 6
    assert oracle.nvfp4_rows(np.zeros((0, 16)), None)[0].shape == (0, 16)


def test_rows_become_mxfp8_by_the_rule():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 64)) * np.exp2(rng.integers(-60, 60, (200, 64)))
    x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    x[7, :32] = 0
    for static in (None, np.float32(0.37)):
        values, factor = oracle.mxfp8_rows(x, static)
        assert (factor == (1 if static is None else np.float64(static))).all()
        for row, b in np.ndindex(200, 2):
            block = x[row, 32 * b : 32 * b + 32] / (np.float32(1) if static is None else static)
            amax = float(np.abs(block).max())
            unit = 2.0 ** (np.floor(np.log2(amax)) - 8) if amax else 1.0
            e4m3 = np.clip(block / unit, -448, 448).astype(ml_dtypes.float8_e4m3fn)
            want = e4m3.astype(np.float64) * unit
            np.testing.assert_array_equal(values[row, 32 * b : 32 * b + 32], want)
    # 1.9 * 2^8 is 486.4 in units of the block: it saturates. 464 would round up to 480, which is
    # not there: 448.
    values, _ = oracle.mxfp8_rows(np.array([[1.9] + [464 / 256] * 31]), None)
    np.testing.assert_array_equal(values[0], 448 / 256)


@pytest.mark.parametrize(
    ("arithmetic", "weight_format", "quantised", "least"),
    [("w4a4", "nvfp4", oracle.nvfp4_rows, 0.05), ("mxfp8", "mxfp4", oracle.mxfp8_rows, 0.01)],
)
@pytest.mark.parametrize("input_scales", [False, True])
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_block_scaled_is_the_double_loop_of_its_definition(
    arithmetic, weight_format, quantised, least, input_scales, weight_on_input
):
    spec = Spec(
        tokens=5, num_experts=4, num_total=6, expert_offset=1, bias=True, dtype="bfloat16",
        weight_format=weight_format, input_scales=input_scales, weight_on_input=weight_on_input,
        top_k=1 if weight_on_input else 2,
    )  # fmt: skip
    p = problems.random_problem(spec)
    unit = [oracle.Bits(w.format, w.data, w.scale).decode() for w in (p.gate_up, p.down)]
    factors = [oracle.global_scales(w) for w in (p.gate_up, p.down)]
    want = np.zeros((5, spec.top_k, 96))

    def product(row, which, e, bias):
        values, g = quantised(row[None], p.input_scales[which])
        sums = np.float32(unit[which][e] @ values[0]).astype(ml_dtypes.bfloat16)
        factor = np.float32(factors[which][e]) * np.float32(g[0, 0])
        return np.float64(np.float32(sums.astype(np.float64) * np.float64(factor) + bias[e]))

    for t, j in np.ndindex(5, spec.top_k):
        e, weight = int(p.expert_ids[t, j]) - 1, float(p.weights[t, j])
        if not 0 <= e < 4:
            continue
        x = p.x[t].astype(np.float64) * (weight if weight_on_input else 1)
        gate, up = np.split(product(x, 0, e, p.gate_up_bias), 2)
        y = product(gate / (1 + np.exp(-gate)) * up, 1, e, p.down_bias)
        want[t, j] = y if weight_on_input else weight * y
    np.testing.assert_allclose(p.pairs(arithmetic), want, rtol=1e-12, atol=1e-12)
    error = np.linalg.norm(p.pairs(arithmetic) - p.pairs()) / np.linalg.norm(p.pairs())
    assert least < error < 0.5  # static scales clip


def test_what_float32_cannot_hold_breaks_no_tie():
    """1 + 2^-8 is between two bfloat16: to even; so it stays with 2^-25 more, but not 2^-22."""
    tie = 1 + 2.0**-8
    product = oracle.ARITHMETIC["w4a4"].product
    sums = np.array([tie, tie + 2.0**-25, tie - 2.0**-25, tie + 2.0**-22, tie - 2.0**-22])
    np.testing.assert_array_equal(product(sums), [1, 1, 1, 1 + 2.0**-7, 1])


def test_grouped_block_scaled_is_its_definition():
    p = problems.random_grouped(dataclasses.replace(GROUPED_EDGES["offset"], input_scale=0.002))
    values, g = oracle.nvfp4_rows(p.x, 0.002)
    want, start = np.zeros((37, 64)), 0
    for group, size in enumerate(p.group_sizes):
        e = group - 3
        if 0 <= e < 6:
            rows = slice(start, start + size)
            sums = np.float32(values[rows] @ oracle.block_decoded(p.w)[e].T)
            sums = sums.astype(ml_dtypes.bfloat16).astype(np.float64)
            factor = (p.w.global_scale[e] * g[rows].astype(np.float32)).astype(np.float64)
            want[rows] = np.float32(sums * factor + p.bias[e])
        start += size
    np.testing.assert_allclose(p.expected("w4a4"), want, rtol=1e-12, atol=1e-12)


def test_e2m1_table_and_nibble_order():
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    np.testing.assert_array_equal(oracle.decode_e2m1(np.arange(16)), table + [-v for v in table])
    np.testing.assert_array_equal(oracle.unpack_nibbles(np.uint8([[0x21, 0xF3]])), [[1, 2, 3, 15]])


def test_decode_applies_the_block_and_the_global_scale_where_they_belong():
    data = np.full((2, 1, 16), 0x22, np.uint8)  # every element 1.0, K = 32
    scale = np.uint8([[[0x38, 0x40]], [[0x30, 0x01]]])  # e4m3: 1, 2; 0.5, 2^-9
    w = oracle.Bits("nvfp4", data, scale, np.float32([1.0, 4.0])).decode()
    np.testing.assert_array_equal(w[0, 0], [1.0] * 16 + [2.0] * 16)
    np.testing.assert_array_equal(w[1, 0], [2.0] * 16 + [2.0**-7] * 16)
    mx = oracle.Bits("mxfp4", np.full((1, 1, 32), 0x22, np.uint8), np.uint8([[[127, 130]]]))
    np.testing.assert_array_equal(mx.decode()[0, 0], [1.0] * 32 + [8.0] * 32)


def test_moe_mlp_is_the_double_loop_of_the_definition():
    p = problems.random_problem(
        Spec(tokens=5, num_experts=4, num_total=6, expert_offset=1, bias=True)
    )
    first, second = p.gate_up.decode(), p.down.decode()
    want = np.zeros((5, p.spec.hidden_size))
    for t in range(5):
        for j in range(2):
            e = int(p.expert_ids[t, j]) - 1
            if not 0 <= e < 4:
                continue
            h = first[e] @ p.x[t].astype(np.float64) + p.gate_up_bias[e]
            gate, up = h[: len(h) // 2], h[len(h) // 2 :]
            y = second[e] @ (gate / (1 + np.exp(-gate)) * up) + p.down_bias[e]
            want[t] += float(p.weights[t, j]) * y
    np.testing.assert_allclose(p.expected(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", problems.ACTIVATIONS)
@pytest.mark.parametrize("params", ["default", "uniform", "per_expert"])
@pytest.mark.parametrize("weight_on_input", [False, True])
def test_gradients_agree_with_central_differences(name, params, weight_on_input):
    spec = Spec(
        tokens=4, num_experts=3, num_total=4, top_k=1 if weight_on_input else 2, hidden_size=32,
        intermediate_size=32, activation_name=name, params=params, bias=True,
        weight_on_input=weight_on_input, seed=3,
    )  # fmt: skip
    p = problems.random_problem(spec)
    rng = np.random.default_rng(0)
    cotangent = rng.standard_normal((spec.tokens, spec.hidden_size))
    # Everything in float64, so that differences are not limited by float32 inputs.
    values = {
        "x": p.x.astype(np.float64),
        "weights": p.weights.astype(np.float64),
        "gate_up_bias": p.gate_up_bias.astype(np.float64),
        "down_bias": p.down_bias.astype(np.float64),
        "gate_up": p.gate_up.decode(),
        "down": p.down.decode(),
    }

    def call(function, v, *first):
        kwargs = p.oracle_kwargs() | {k: v[k] for k in ("gate_up_bias", "down_bias")}
        arguments = (v["x"], v["gate_up"], v["down"], p.expert_ids, v["weights"])
        return function(*first, *arguments, **kwargs)

    grads = call(oracle.moe_mlp_gradients, values, cotangent)
    for key, value in values.items():
        direction = rng.standard_normal(value.shape)
        step = 1e-6
        ends = [
            (cotangent * call(oracle.moe_mlp, values | {key: value + s * direction})).sum()
            for s in (step, -step)
        ]
        numeric, analytic = (ends[0] - ends[1]) / (2 * step), (grads[key] * direction).sum()
        # A clamp's kink between the two ends costs at most the step; rounding costs 1e-16 / step.
        assert numeric == pytest.approx(analytic, rel=2e-6, abs=2e-6), key


def test_grouped_matmul_is_the_loop_of_the_definition():
    spec = GROUPED_EDGES["offset"]
    p = problems.random_grouped(spec)
    w, want, start = p.w.decode(), np.zeros((spec.rows, spec.out_size)), 0
    for g, size in enumerate(p.group_sizes):
        for row in range(start, start + size):
            if 0 <= g - spec.group_offset < spec.num_experts:
                e = g - spec.group_offset
                want[row] = w[e] @ p.x[row].astype(np.float64) + p.bias[e]
        start += size
    np.testing.assert_allclose(p.expected(), want, rtol=1e-12, atol=1e-12)


def test_grouped_gradients_agree_with_central_differences():
    spec = dataclasses.replace(GROUPED_EDGES["offset"], grouping="short")
    p, rng = problems.random_grouped(spec), np.random.default_rng(1)
    cotangent = rng.standard_normal((spec.rows, spec.out_size))
    values = {"x": p.x.astype(np.float64), "w": p.w.decode(), "bias": p.bias.astype(np.float64)}

    def call(v):
        return oracle.grouped_matmul(v["x"], v["w"], p.group_sizes, bias=v["bias"], group_offset=3)

    grads = oracle.grouped_matmul_gradients(
        cotangent, values["x"], values["w"], p.group_sizes, group_offset=3
    )
    for key, value in values.items():
        direction = rng.standard_normal(value.shape)
        ends = [
            (cotangent * call(values | {key: value + s * direction})).sum() for s in (1e-4, -1e-4)
        ]
        assert (ends[0] - ends[1]) / 2e-4 == pytest.approx((grads[key] * direction).sum(), rel=1e-8)


@pytest.mark.parametrize("kind", problems.ROUTINGS)
def test_every_routing_kind_is_what_it_says(kind):
    ids = problems.make_routing(np.random.default_rng(0), kind, 64, 16, 4)
    assert ids.dtype == np.int32
    assert ids.shape == (64, 4)
    inside = (ids >= 0) & (ids < 16)
    distinct = np.array([len(set(row)) for row in ids.tolist()])
    match kind:
        case "none":
            assert not inside.any()
        case "out_of_range":
            assert inside.any()
            assert not inside.all()
        case "single":
            assert len(np.unique(ids)) == 1
        case "sparse":
            assert len(np.unique(ids)) == 2
        case "duplicates":
            assert distinct.min() < 4
        case "hot":
            assert len(np.unique(ids[:, 0])) == 1
            assert distinct.min() == 4
        case "skewed":
            assert (ids == 0).any(1).mean() > 0.7
            assert distinct.min() == 4
        case "uniform" | "round_robin":
            assert distinct.min() == 4
            assert len(np.unique(ids)) == 16


@pytest.mark.parametrize("name", problems.ACTIVATIONS)
@pytest.mark.parametrize("weight_format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("params", ["default", "uniform", "per_expert"])
def test_exact_problems_are_exact_and_not_trivial(name, weight_format, bias, params):
    for seed in range(4):
        spec = Spec(
            activation_name=name, weight_format=weight_format, bias=bias, params=params, seed=seed,
            top_k=1 + seed, intermediate_size=160,
        )  # fmt: skip
        p = problems.exact_problem(spec)  # asserts exactness
        y = p.expected()
        assert (y != 0).mean() > 0.5
        assert len(np.unique(y)) > 16


@pytest.mark.parametrize("spec", EDGES.values(), ids=EDGES.keys())
def test_edge_problems_have_finite_and_moderate_answers(spec):
    y = problems.random_problem(spec).expected()
    assert np.isfinite(y).all()
    assert np.abs(y).max(initial=0) < 1e4
    empty = spec.tokens == 0 or spec.routing == "none" or spec.num_total == 4
    assert empty or np.abs(y).max() > 1e-3
