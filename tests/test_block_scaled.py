"""NVFP4 and MXFP8 activations: layout, lowering, and xla's numbers against the oracle's.

The Blackwell kernels themselves are in tests/gpu.
"""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from problems import EDGES, GROUPED_EDGES, GroupedSpec, Spec
from suite import BLOCK_SCALED, assert_matches, assert_same_bits, relative_l2, run, run_grouped

import jaxmoe
from jaxmoe import kernels
from jaxmoe.kernels import GPU_FAMILIES, block_scaled, layouts

VARIANTS = ("xla_w4a4", "xla_w4a8")
every_variant = pytest.mark.parametrize("variant", VARIANTS)
# From the oracle that rounds as the variant does: x's dtype. One element that falls to the other
# side of its rounding is off by up to 2^-2, and in a row of few elements that is much.
TOLERANCE, ROW_TOLERANCE = 5e-3, 8e-2
replace = dataclasses.replace


def problem_of(variant, spec=None, **changes):
    """A problem in the variant's format, bfloat16 unless said otherwise."""
    weight_format = BLOCK_SCALED[variant][1]
    changes = {"weight_format": weight_format, "dtype": "bfloat16", **changes}
    return problems.random_problem(replace(spec or Spec(), **changes))


def assert_right(got, problem, variant):
    assert_matches(got, problem.pairs(BLOCK_SCALED[variant][0]), TOLERANCE, ROW_TOLERANCE)


# --- xla against the oracle -----------------------------------------------------------------------


# A compilation takes seconds: each edge takes its turn among variants and kinds of scales.
@pytest.mark.parametrize(("index", "edge"), list(enumerate(EDGES)))
def test_edges(index, edge):
    variant = VARIANTS[index % 2]
    problem = problem_of(variant, EDGES[edge], seed=1, input_scales=index % 3 == 0)
    assert_right(run(problem, variant), problem, variant)


@every_variant
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_x_of_other_dtypes(variant, dtype):
    problem = problem_of(variant, dtype=dtype, bias=True)
    assert_right(run(problem, variant), problem, variant)


@every_variant
def test_input_scales_one_or_both(variant):
    problem = problem_of(variant, input_scales=True, tokens=40, intermediate_size=160)
    first, second = problem.input_scales
    answers = []
    for scales in ((first, second), (first, None), (None, second), (None, None)):
        one = replace(problem, input_scales=scales)
        answers.append(run(one, variant))
        assert_right(answers[-1], one, variant)
    for other in answers[1:]:
        assert relative_l2(answers[0], other.astype(np.float64)) > 2 * TOLERANCE


@every_variant
@pytest.mark.parametrize("input_scales", [False, True])
def test_weight_on_input_is_quantised_with_its_weight(variant, input_scales):
    for routing in ("uniform", "out_of_range"):
        problem = problem_of(
            variant, weight_on_input=True, top_k=1, bias=True, routing=routing,
            input_scales=input_scales, num_experts=5,
        )  # fmt: skip
        weights = np.random.default_rng(0).uniform(0.1, 3, problem.weights.shape)
        problem = replace(problem, weights=weights.astype(np.float32))
        assert_right(run(problem, variant), problem, variant)


@every_variant
def test_rows_of_very_different_sizes(variant):
    problem = problem_of(variant, tokens=60, activation_name="identity")
    sizes = np.exp2(np.resize([0, -40, 40, -90, 60], 60))[:, None] * (np.arange(60) != 7)[:, None]
    x = (problem.x.astype(np.float64) * sizes).astype(problem.x.dtype)
    problem = replace(problem, x=x)
    got, pairs = run(problem, variant), problem.pairs(BLOCK_SCALED[variant][0])
    assert not got[7].astype(np.float32).any()
    for row in range(60):
        assert_matches(got[row : row + 1], pairs[row : row + 1], ROW_TOLERANCE)


@every_variant
def test_a_nan_or_an_infinity_stays_in_its_row_and_is_never_made_finite(variant):
    problem = problem_of(variant)
    clean = run(problem, variant)
    for value in (np.nan, np.inf):
        x = problem.x.copy()
        x[3, 5] = value
        got = run(replace(problem, x=x), variant)
        assert not np.isfinite(got[3].astype(np.float32)).any()
        others = np.delete(np.arange(len(x)), 3)
        assert_same_bits(got[others], clean[others])


@pytest.mark.parametrize(("index", "edge"), list(enumerate(GROUPED_EDGES)))
def test_grouped_edges(index, edge):
    variant = VARIANTS[index % 2]
    arithmetic, weight_format = BLOCK_SCALED[variant]
    scale = 0.0015 if index % 3 == 0 else None
    spec = replace(
        GROUPED_EDGES[edge], weight_format=weight_format, dtype="bfloat16", input_scale=scale
    )
    problem = problems.random_grouped(spec)
    got = run_grouped(problem, variant)
    assert_matches(got, problem.expected(arithmetic)[:, None], TOLERANCE, ROW_TOLERANCE)
    local = problem.expected().any(1)
    assert not got[~local].astype(np.float32).any()


@every_variant
def test_gradients_are_those_of_w4a16(variant):
    problem = problem_of(variant, bias=True, input_scales=True)
    x, experts, ids, weights = problem.call_args()
    compute = BLOCK_SCALED[variant][0].replace("mxfp8", "w4a8")

    def gradient(**how):
        def loss(x, weights, bias):
            e = replace(experts, gate_up_bias=bias)
            return jaxmoe.moe_mlp(x, e, ids, weights, **how).astype(jnp.float32).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(x, weights, experts.gate_up_bias)

    got = gradient(implementation=variant, compute=compute)
    for ours, theirs in zip(got, gradient(implementation="xla"), strict=True):
        np.testing.assert_array_equal(ours, theirs)

    def by_scale(scale):
        e = replace(experts, gate_up_input_scale=scale)
        y = jaxmoe.moe_mlp(x, e, ids, weights, implementation=variant, compute=compute)
        return y.astype(jnp.float32).sum()

    assert jax.grad(by_scale)(experts.gate_up_input_scale) == 0  # frozen


@every_variant
def test_a_batch_gives_what_its_entries_give(variant):
    problem = problem_of(variant, input_scales=True)
    x, experts, ids, weights = problem.call_args()
    call = functools.partial(
        jaxmoe.moe_mlp, implementation=variant, compute="w4a4" if "w4a4" in variant else "w4a8"
    )
    xs, scales = jnp.stack([x, 2 * x]), jnp.stack([experts.down_input_scale] * 2)
    want = [np.asarray(call(x, experts, ids, weights)) for x in xs]
    shared = jax.vmap(lambda x: call(x, experts, ids, weights))(xs)
    own = jax.vmap(lambda x, s: call(x, replace(experts, down_input_scale=s), ids, weights))
    for batch in (shared, own(xs, scales)):
        for got, expected in zip(np.asarray(batch), want, strict=True):
            assert relative_l2(got, expected.astype(np.float64)) <= TOLERANCE


# --- what the weights declare ---------------------------------------------------------------------


def test_auto_takes_w4a4_only_where_the_weights_declare_it():
    problem = problem_of("xla_w4a4", input_scales=True)
    x, experts, ids, weights = problem.call_args()
    machine = jaxmoe.Target.from_name("rtx 5090", built=["sm120_w4a4"])
    for declared, want in (
        (None, "xla"),
        ("w4a16", "xla"),
        ("w4a8", "xla"),
        ("w4a4", "sm120_w4a4"),
    ):
        e = replace(experts, declared_compute=declared)
        ask = jaxmoe.ops.moe_mlp_problem(x.dtype, e, 2, jaxmoe.SwiGLU(), "auto")
        with jaxmoe.override(target=machine):
            found = jaxmoe.explain(ask)
        assert found.selected == want
        assert ask.input_scales
    with jaxmoe.override(target=machine):
        declaring = jaxmoe.prepare(replace(experts, declared_compute="w4a4"))
        assert declaring.layout == block_scaled.NAME
        assert declaring.declared_compute == "w4a4"
        assert declaring.gate_up_input_scale is experts.gate_up_input_scale
        assert jaxmoe.prepare(experts).layout == "canonical"
    with pytest.raises(ValueError, match="declared_compute must be one of w4a4, w4a8, w4a16"):
        jaxmoe.moe_mlp(x, replace(experts, declared_compute="fp4"), ids, weights)


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (jnp.float32(0), "finite and at least 2\\^-100, got 0.0"),
        (jnp.float32(-1), "got -1.0"),
        (jnp.float32(np.nan), "got nan"),
        (jnp.float32(np.inf), "got inf"),
        (jnp.ones(8), r"a floating-point scalar, one for all experts, got float32\[8\]"),
        (jnp.int32(1), r"got int32\[\]"),
    ],
)
def test_a_bad_input_scale_is_refused_by_name(scale, words):
    x, experts, ids, weights = problem_of("xla_w4a4").call_args()
    for name in ("gate_up_input_scale", "down_input_scale"):
        with pytest.raises(ValueError, match=f"experts.{name} must be.*{words}"):
            jaxmoe.moe_mlp(x, replace(experts, **{name: scale}), ids, weights)
    sizes = jnp.zeros(8, jnp.int32)
    with pytest.raises(ValueError, match=f"input_scale must be.*{words}"):
        jaxmoe.grouped_matmul(x, experts.gate_up, sizes, input_scale=scale)


# --- the layout -----------------------------------------------------------------------------------


def offset(n, b, blocks):
    """Where the scale of row n and block b stands, by the formula of the kernels' contract."""
    tiles = -(-blocks // 4)
    return (n // 128) * tiles * 512 + (b // 4) * 512 + (n % 32) * 16 + ((n % 128) // 32) * 4 + b % 4


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    ("n", "k"), [(32, 32), (96, 96), (128, 64), (160, 160), (384, 288), (40, 1056)]
)
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_layout_byte_for_byte(fmt, n, k, gated):
    w = jaxmoe.quantize(jax.random.normal(jax.random.key(n + k), (3, n, k)), fmt)
    packed = block_scaled.pack(w, gated)
    blocks = k // w.format.block_size
    elements = -(-(n * k // 2) // 128) * 128
    size = elements + -(-n // 128) * 128 * -(-blocks // 4) * 4
    want = np.zeros((3, size), np.uint8)
    want[:, : n * k // 2] = np.asarray(w.packed()).reshape(3, -1)
    scale = np.asarray(w.scale).view(np.uint8)
    for row, b in np.ndindex(n, blocks):
        want[:, elements + offset(row, b, blocks)] = scale[:, row, b]
    np.testing.assert_array_equal(packed.data, want)
    assert block_scaled.num_bytes(n, k, w.format) == size
    assert (packed.layout, packed.shape, packed.gated) == ("block_scaled_128x4", w.shape, gated)
    back = layouts.unpack(packed, jnp.array([2, 0]))
    for index, expert in enumerate((2, 0)):
        np.testing.assert_array_equal(back[index].packed(), w[expert].packed())
        np.testing.assert_array_equal(np.asarray(back[index].scale).view(np.uint8), scale[expert])
        if fmt == "nvfp4":
            assert back.global_scale[index] == w.global_scale[expert]


def test_packing_takes_little_more_than_the_result():
    w = jax.eval_shape(lambda: jaxmoe.quantize(jnp.zeros((32, 768, 1024)), "nvfp4"))
    analysis = block_scaled.pack.lower(w, True).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 3 * block_scaled.num_bytes(768, 1024, w.format)


# --- lowering for GPUs that are not here ----------------------------------------------------------


@pytest.fixture
def blackwell_libraries(monkeypatch):
    """Stand-ins for the libraries of all block-scaled families: lowering needs sizes and names."""
    asked = []
    for name in ("sm120", "sm100", "sm120_emulated", "sm100_emulated"):
        family = GPU_FAMILIES[name]

        def workspace_bytes(op, **kwargs):
            asked.append((op, kwargs))
            return 512

        module = types.SimpleNamespace(
            manifest=lambda family=family: {
                "build": "0123456789ab",
                "variants": {variant: {"tactics": {"small": 1}} for variant in family.rows},
            },
            registrations=dict,
            workspace_bytes=workspace_bytes,
        )
        monkeypatch.setattr(family, "library", lambda module=module: (module, ""))
        family._native.cache_clear()
    kernels._libraries.cache_clear()
    yield asked
    for name in ("sm120", "sm100", "sm120_emulated", "sm100_emulated"):
        GPU_FAMILIES[name]._native.cache_clear()
    kernels._libraries.cache_clear()
    jax.clear_caches()


def lowered(target, f, *args):
    with jaxmoe.override(target=target):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


LOWERINGS = [
    (target, family, compute)
    for target, family in (
        ("sm_120", "sm120"), ("sm_121", "sm120"), ("sm_100", "sm100"), ("sm_103", "sm100"),
    )
    for compute in ("w4a4", "w4a8")
]  # fmt: skip


@pytest.mark.parametrize(("target", "family", "compute"), LOWERINGS)
@pytest.mark.parametrize("input_scales", [False, True])
def test_calls_lower_to_one_versioned_custom_call(
    blackwell_libraries, target, family, compute, input_scales
):
    problem = problem_of(f"xla_{compute}", hidden_size=128, input_scales=input_scales)
    x, experts, ids, weights = problem.call_args()
    experts = replace(experts, declared_compute=compute)
    with jaxmoe.override(target=target):
        prepared = jaxmoe.prepare(experts)
    assert prepared.layout == block_scaled.NAME

    def layer(x, e):
        return jaxmoe.moe_mlp(x, e, ids, weights)

    for e in (prepared, experts):
        text = lowered(target, layer, x, e)
        assert re.findall(r"custom_call @(jaxmoe\w+)", text) == [f"jaxmoe_moe_mlp_{family}_v1"]
        weight_format = BLOCK_SCALED[f"xla_{compute}"][1]
        assert f'variant = "{family}_{compute}"' in text
        assert f'format = "{weight_format}"' in text
    assert {sizes["variant"] for _, sizes in blackwell_libraries} == {f"{family}_{compute}"}
    # After x, four of the weights, two biases and the activation's parameters: the input scales.
    (call,) = (line for line in text.splitlines() if "custom_call @jaxmoe" in line)
    operands = re.search(r": \((.*?)\) -> ", call).group(1).split(", ")
    scale = f"tensor<{int(input_scales)}xf32>"
    assert operands[:1] + operands[5:11] == [
        "tensor<17x128xbf16>", "tensor<0xf32>", "tensor<0xf32>", "tensor<3x8xf32>", scale, scale,
        "tensor<17x2xi32>",
    ]  # fmt: skip


@pytest.mark.parametrize(("target", "family", "compute"), LOWERINGS)
def test_grouped_calls_lower_to_one_versioned_custom_call(
    blackwell_libraries, target, family, compute
):
    weight_format = BLOCK_SCALED[f"xla_{compute}"][1]
    spec = GroupedSpec(weight_format=weight_format, dtype="bfloat16", bias=True, in_size=128)
    x, w, sizes = problems.random_grouped(spec).call_args()
    for scale, shape in ((None, 0), (jnp.float32(0.01), 1)):
        text = lowered(
            target,
            lambda x, w, s=scale: jaxmoe.grouped_matmul(
                x, w, sizes, bias=jnp.zeros((6, 64)), input_scale=s, compute=compute
            ),
            x,
            w,
        )
        assert re.findall(r"custom_call @(jaxmoe\w+)", text) == [
            f"jaxmoe_grouped_matmul_{family}_v1"
        ]
        (call,) = (line for line in text.splitlines() if "custom_call @jaxmoe" in line)
        operands = re.search(r": \((.*?)\) -> ", call).group(1).split(", ")
        assert operands[3:6] == ["tensor<6x64xf32>", f"tensor<{shape}xf32>", "tensor<6xi32>"]


@pytest.mark.usefixtures("blackwell_libraries")
@pytest.mark.parametrize(("family", "compute"), [("sm120", "w4a4"), ("sm100", "w4a8")])
def test_emulated_calls_lower_to_targets_of_their_own(family, compute):
    x, experts, ids, weights = problem_of(f"xla_{compute}", hidden_size=128).call_args()
    how = {"implementation": f"{family}_{compute}_emulated", "compute": compute}
    text = lowered("h100", lambda x, e: jaxmoe.moe_mlp(x, e, ids, weights, **how), x, experts)
    target = f"jaxmoe_moe_mlp_{family}_emulated_v1"
    assert re.findall(r"custom_call @(jaxmoe\w+)", text) == [target]
    with pytest.raises(jaxmoe.UnsupportedError, match="requires SM 90; this target is sm_120"):
        lowered("sm_120", lambda x, e: jaxmoe.moe_mlp(x, e, ids, weights, **how), x, experts)


@pytest.mark.usefixtures("blackwell_libraries")
@pytest.mark.parametrize("target", ["sm_107", "sm_110", "h100", "rtx 4090"])
def test_other_gpus_lower_to_no_blackwell_kernel(target):
    x, experts, ids, weights = problem_of("xla_w4a4").call_args()
    experts = replace(experts, declared_compute="w4a4")
    text = lowered(target, lambda x, e: jaxmoe.moe_mlp(x, e, ids, weights), x, experts)
    assert "jaxmoe_moe_mlp_sm1" not in text
    for variant in ("sm120_w4a4", "sm100_w4a4", "trtllm_gen", "cute_dsl"):
        with pytest.raises(jaxmoe.UnsupportedError, match="SM_UN"):
            lowered(
                target,
                lambda x, e, v=variant: jaxmoe.moe_mlp(x, e, ids, weights, implementation=v),
                x,
                experts,
            )


def test_libraries_with_variants_that_round_activations_get_input_scales():
    assert not GPU_FAMILIES["sm80"]._input_scales
    for name in ("sm90", "sm120", "sm100_emulated"):
        assert GPU_FAMILIES[name]._input_scales
