"""The dispatch: manifest against table, layouts, self-tests, and what a call lowers to."""

import concurrent.futures
import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxmoe
from jaxmoe import capability, kernels
from jaxmoe.capability.table import SMEM_LIMIT
from jaxmoe.kernels import GPU_FAMILIES, cpu, fragment, fragment_fp8, layouts, native, panel, xla

KEY = jax.random.key(0)
sm80, sm90 = GPU_FAMILIES["sm80"], GPU_FAMILIES["sm90"]


def experts(fmt="nvfp4", e=4, h=96, i=32, gated=True):
    keys = jax.random.split(KEY)
    return jaxmoe.ExpertWeights(
        jaxmoe.quantize(jax.random.normal(keys[0], (e, 2 * i if gated else i, h)), fmt),
        jaxmoe.quantize(jax.random.normal(keys[1], (e, h, i)), fmt),
    )


def call(t=5, e=4, h=96, k=2, dtype=jnp.float32):
    x = jax.random.normal(jax.random.key(1), (t, h), dtype)
    ids = jax.random.randint(jax.random.key(2), (t, k), 0, e, jnp.int32)
    return x, ids, jnp.full((t, k), 0.5)


def mlp(weights, implementation=None, dtype=jnp.float32):
    x, ids, w = call(dtype=dtype)
    return jaxmoe.moe_mlp(x, weights, ids, w, implementation=implementation)


def test_manifest_and_table_agree_in_both_directions():
    manifest = cpu._native().manifest()
    rows = [row for row in capability.TABLE if row.family == "cpu"]
    assert {row.variant for row in rows} == set(manifest["variants"])
    assert capability.check_manifest(manifest, rows) == []
    assert {row.layout for row in rows} == {panel.NAME}
    assert re.fullmatch("[0-9a-f]{12}", manifest["build"])


@pytest.mark.parametrize("family", GPU_FAMILIES.values(), ids=GPU_FAMILIES)
def test_gpu_manifests_and_table_agree_in_both_directions(family):
    """Loading a library needs no GPU, so that a build is checked where it is made."""
    module, why = family.library()
    if module is None:
        pytest.skip(why)
    assert capability.check_manifest(module.manifest(), family.rows.values()) == []
    assert module.manifest()["library"] == family.name
    assert re.fullmatch("[0-9a-f]{12}", module.manifest()["build"])
    for variant, stated in module.manifest()["variants"].items():
        assert max(family.tactics(variant).values()) == stated["smem_bytes"]
        assert all(stated["smem_bytes"] <= SMEM_LIMIT[sm] for sm in stated["sms"])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(("n", "k"), [(32, 32), (64, 96), (96, 160), (224, 64)])
def test_panel_layout_round_trip(fmt, n, k, gated):
    w = jaxmoe.quantize(jax.random.normal(KEY, (3, n, k)), fmt)
    packed = panel.pack(w, gated)
    assert packed.data.shape == (3, panel.num_bytes(n, k, w.format, gated))
    assert packed.shape == w.shape
    back = panel.unpack(packed, jnp.array([2, 0]))
    for index, expert in enumerate((2, 0)):
        np.testing.assert_array_equal(back[index].packed(), w[expert].packed())
        np.testing.assert_array_equal(
            np.asarray(back[index].scale).view(np.uint8), np.asarray(w[expert].scale).view(np.uint8)
        )


def test_panel_layout_byte_for_byte():
    """Elements and scales of the second panel's second superblock stand where the layout says."""
    n, k, row, at = 64, 128, 40, 77
    elements = np.arange(n * k // 2, dtype=np.uint32).reshape(n, k // 2).astype(np.uint8)
    scale = np.arange(n * k // 16, dtype=np.uint32).reshape(n, k // 16).astype(np.uint8)
    packed = np.asarray(panel.pack_matrix(jnp.asarray(elements), jnp.asarray(scale), gated=False))
    superblock = packed.reshape(2, 2, 128 + 1024)[row // 32, at // 64]
    lane, within = row % 32, at % 64
    assert superblock[within // 16 * 32 + lane] == scale[row, at // 16]
    dword = superblock[128 + (within // 8 * 32 + lane) * 4 :][:4]
    assert dword[within % 8 // 2] == elements[row, at // 2]


def test_a_single_matrix_is_aligned_along_k_alone():
    w = jaxmoe.quantize(jax.random.normal(KEY, (3, 40, 96)), "nvfp4")
    assert jaxmoe.prepare(w, "cpu_portable").shape == (3, 40, 96)


def test_prepared_weights_of_another_layout_are_refused():
    prepared = jaxmoe.prepare(experts(), "cpu_portable")
    with pytest.raises(ValueError, match=r"prepared in layout 'panel32', but xla.*'canonical'"):
        mlp(prepared, "xla")
    with pytest.raises(ValueError, match=r"must be canonical, got layout 'panel32'"):
        jaxmoe.prepare(prepared, "cpu_portable")
    x, ids, w = call()
    with pytest.raises(ValueError, match=r"prepared with gated=True, but the activation is not"):
        jaxmoe.moe_mlp(x, prepared, ids, w, activation=jaxmoe.ReLU())


def test_a_variant_that_fails_its_self_test_is_disqualified_with_its_reason(monkeypatch):
    first = jaxmoe.explain(problem()).variant
    asked = []

    def self_test(variant):
        asked.append(variant)
        return "a relative error of 0.5" if variant == first else ""

    monkeypatch.setattr(kernels, "_disqualified", {})
    monkeypatch.setattr(cpu, "self_test", self_test)
    resolution = jaxmoe.explain(problem())
    assert resolution.variant != first
    assert asked[0] == first
    reasons = {v: (reason, detail) for v, reason, detail in resolution.rejected}
    reason, detail = reasons[first]
    assert reason is capability.Reason.SELF_TEST_FAILED
    assert "a relative error of 0.5" in detail
    with pytest.raises(jaxmoe.UnsupportedError, match=r"relative error of 0\.5"):
        jaxmoe.explain(problem(), first)


def problem(**changes):
    return jaxmoe.Problem(
        **{
            "weight_format": "nvfp4",
            "activation_dtype": "float32",
            "hidden_size": 96,
            "intermediate_size": 32,
            "num_experts": 4,
            "top_k": 2,
            **changes,
        }
    )


def test_every_built_variant_that_this_machine_can_run_passes_its_self_test():
    state = kernels.installation()
    runnable = [
        row.variant
        for row in capability.TABLE
        if row.family == "cpu" and row.features <= state["features"]
    ]
    assert "cpu_portable" in runnable
    assert {variant: cpu.self_test(variant) for variant in runnable} == dict.fromkeys(runnable, "")


def test_a_missing_library_is_a_sentence(monkeypatch):
    def gone(name):
        raise ImportError("libgone.so: cannot open shared object file")

    cpu.library.cache_clear()
    kernels._libraries.cache_clear()
    monkeypatch.setattr(native.importlib, "import_module", gone)
    try:
        assert "libgone.so" in cpu.library()[1]
        resolution = jaxmoe.explain(problem())
        assert resolution.variant == "xla"
        reasons = {v: reason for v, reason, _ in resolution.rejected}
        assert reasons["cpu_portable"] is capability.Reason.NOT_BUILT
    finally:
        cpu.library.cache_clear()
        kernels._libraries.cache_clear()


def custom_calls(f, *args):
    return re.findall(r"custom_call @(jaxmoe\w+)", jax.jit(f).lower(*args).as_text())


def test_a_native_call_lowers_to_one_versioned_custom_call():
    prepared = jaxmoe.prepare(experts(), "cpu_portable")
    x, ids, w = call()

    def layer(x, weights):
        return jaxmoe.moe_mlp(x, weights, ids, w, implementation="cpu")

    assert custom_calls(layer, x, prepared) == ["jaxmoe_moe_mlp_cpu_v1"]
    batch = jnp.stack([x, x, x])
    assert custom_calls(jax.vmap(layer, (0, None)), batch, prepared) == ["jaxmoe_moe_mlp_cpu_v1"]
    matrix = jaxmoe.prepare(experts().down, "cpu_portable")
    sizes = jnp.array([1, 2, 0, 2], jnp.int32)
    assert custom_calls(
        lambda x: jaxmoe.grouped_matmul(x[:, :32], matrix, sizes, implementation="cpu"), x
    ) == ["jaxmoe_grouped_matmul_cpu_v1"]


@pytest.mark.parametrize("target", ["sm_89", "sm_90", "sm_100", "sm_120", "sm_121", "tpu"])
def test_lowering_for_a_machine_that_is_not_here_uses_no_kernel_of_this_one(target):
    x, ids, w = call()
    with jaxmoe.override(target=target):
        text = jax.jit(
            lambda x, weights: jaxmoe.moe_mlp(x, weights, ids, w)
        ).trace(x, experts()).lower(
            lowering_platforms=("tpu" if target == "tpu" else "cuda",)
        ).as_text()  # fmt: skip
    assert "jaxmoe_moe_mlp" not in text


def test_calls_from_many_threads_at_once_give_the_bits_of_one():
    prepared = jaxmoe.prepare(experts(), "cpu_portable")
    x, ids, w = call(t=33)
    layer = jax.jit(lambda x: jaxmoe.moe_mlp(x, prepared, ids, w, implementation="cpu"))
    inputs = [x * (i + 1) for i in range(8)]
    expected = [np.asarray(layer(x)) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(layer, inputs), expected, strict=True):
                np.testing.assert_array_equal(got, want)


# --- the Hopper family, where neither its library nor its GPU is needed ---------------------------


def stand_in_library(monkeypatch, family, *variants):
    """A stand-in for a GPU library, of which lowering needs only sizes and names."""
    sizes = []

    def workspace_bytes(op, **kwargs):
        sizes.append((op, kwargs))
        return 512

    module = types.SimpleNamespace(
        manifest=lambda: {
            "build": "0123456789ab",
            "variants": {variant: {"tactics": {"small": 1}} for variant in variants},
        },
        registrations=dict,
        workspace_bytes=workspace_bytes,
    )
    monkeypatch.setattr(family, "library", lambda: (module, ""))
    caches = (kernels._libraries, family._native)
    for cache in caches:
        cache.cache_clear()
    yield sizes
    for cache in caches:
        cache.cache_clear()
    jax.clear_caches()


@pytest.fixture
def hopper_library(monkeypatch):
    yield from stand_in_library(monkeypatch, sm90, "sm90_w4a16", "sm90_w4a8")


@pytest.fixture
def sm80_library(monkeypatch):
    yield from stand_in_library(monkeypatch, sm80, "sm80_w4a16")


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        *((sm, {}) for sm in ("sm_80", "sm_86", "sm_89")),
        ("h100", {"implementation": "sm80_w4a16"}),
        *((sm, {"compute": "w4a16"}) for sm in ("sm_100", "sm_103", "sm_120", "sm_121")),
    ],
)
def test_mma_sync_calls_lower_for_every_gpu_from_sm_80_on(sm80_library, target, asked):
    x, ids, w = call(dtype=jnp.bfloat16)
    sizes = jnp.array([1, 2, 0, 2], jnp.int32)
    with jaxmoe.override(target=target):
        prepared = jaxmoe.prepare(experts("mxfp4"), "sm80_w4a16", compute="w4a16")
        for function, name in (
            (lambda x, e: jaxmoe.moe_mlp(x, e, ids, w, **asked), "moe_mlp"),
            (
                lambda x, e: jaxmoe.grouped_matmul(x[:, :32], e.down, sizes, **asked),
                "grouped_matmul",
            ),
        ):
            lowered = jax.jit(function).trace(x, prepared).lower(lowering_platforms=("cuda",))
            text = lowered.as_text()
            assert re.findall(r"custom_call @(jaxmoe\w+)", text) == [f"jaxmoe_{name}_sm80_v1"]
            assert 'variant = "sm80_w4a16"' in text
    assert {sizes["variant"] for _, sizes in sm80_library} == {"sm80_w4a16"}


def lowered_for_hopper(f, *args):
    with jaxmoe.override(target="h100"):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_hopper_calls_lower_to_one_versioned_custom_call(hopper_library, fmt):
    x, ids, w = call(dtype=jnp.bfloat16)
    with jaxmoe.override(target="h100"):
        prepared = jaxmoe.prepare(experts(fmt))
    assert prepared.layout == fragment.NAME
    text = lowered_for_hopper(lambda x, e: jaxmoe.moe_mlp(x, e, ids, w), x, prepared)
    assert re.findall(r"custom_call @(jaxmoe\w+)", text) == ["jaxmoe_moe_mlp_sm90_v1"]
    for attribute in ('tactic = ""', 'variant = "sm90_w4a16"', f'format = "{fmt}"'):
        assert attribute in text
    ((op, sizes),) = hopper_library
    assert op == "moe_mlp"
    assert sizes["hidden_size"] == 96
    assert sizes["x_dtype"] == "bfloat16"
    sizes = jnp.array([1, 2, 0, 2], jnp.int32)
    text = lowered_for_hopper(
        lambda x: jaxmoe.grouped_matmul(x[:, :32], prepared.down, sizes), x.astype(jnp.float16)
    )
    assert re.findall(r"custom_call @(jaxmoe\w+)", text) == ["jaxmoe_grouped_matmul_sm90_v1"]


def test_w4a8_lowers_to_the_same_calls_where_it_is_asked_for(hopper_library):
    x, ids, w = call(dtype=jnp.bfloat16)
    canonical = experts("mxfp4")
    with jaxmoe.override(target="h100"):
        prepared = jaxmoe.prepare(canonical, compute="w4a8")
        assert jaxmoe.prepare(canonical).layout == fragment.NAME
    assert prepared.layout == fragment_fp8.NAME
    for weights in (prepared, canonical):
        text = lowered_for_hopper(
            lambda x, e: jaxmoe.moe_mlp(x, e, ids, w, compute="w4a8"), x, weights
        )
        assert re.findall(r"custom_call @(jaxmoe\w+)", text) == ["jaxmoe_moe_mlp_sm90_v1"]
        for attribute in ('tactic = ""', 'variant = "sm90_w4a8"', 'format = "mxfp4"'):
            assert attribute in text
    assert {sizes["variant"] for _, sizes in hopper_library} == {"sm90_w4a8"}
    sizes = jnp.array([1, 2, 0, 2], jnp.int32)
    for weights in (prepared.down, canonical.down):
        text = lowered_for_hopper(
            lambda x, m: jaxmoe.grouped_matmul(x, m, sizes, compute="w4a8"),
            x[:, :32].astype(jnp.float16),
            weights,
        )
        assert re.findall(r"custom_call @(jaxmoe\w+)", text) == ["jaxmoe_grouped_matmul_sm90_v1"]
        assert 'variant = "sm90_w4a8"' in text


@pytest.mark.usefixtures("hopper_library")
def test_weights_prepared_for_other_arithmetic_are_refused_with_the_way_out():
    x, ids, w = call(dtype=jnp.bfloat16)
    sizes = jnp.array([1, 2, 0, 2], jnp.int32)
    prepared = {}
    with jaxmoe.override(target="h100"):
        for compute in ("w4a16", "w4a8"):
            prepared[compute] = jaxmoe.prepare(experts("mxfp4"), compute=compute)
        for have, want in itertools.permutations(prepared):
            message = (
                rf"prepared in layout '{prepared[have].layout}', but sm90_{want}, which was "
                rf"selected for this call, reads '{prepared[want].layout}'; pass the canonical "
                rf"weights, or prepare\(weights, 'sm90_{want}', compute='{want}'\), or "
                rf"compute='{have}' to use them as they are"
            )
            with pytest.raises(ValueError, match=message):
                jaxmoe.moe_mlp(x, prepared[have], ids, w, compute=want)
            with pytest.raises(ValueError, match=message):
                jaxmoe.grouped_matmul(x[:, :32], prepared[have].down, sizes, compute=want)
        with pytest.raises(jaxmoe.UnsupportedError, match=r"pass compute='w4a8' to accept"):
            jaxmoe.prepare(experts("mxfp4"), "sm90_w4a8")
        with pytest.raises(jaxmoe.UnsupportedError, match=r"6 significant bits of which e4m3"):
            jaxmoe.prepare(experts("nvfp4"), "sm90_w4a8", compute="w4a8")


def test_no_way_out_is_offered_that_would_be_refused():
    """xla reads canonical weights alone; another arithmetic does not change that."""
    prepared = jaxmoe.prepare(experts("nvfp4"), "cpu_portable")
    with pytest.raises(ValueError, match="prepared in layout 'panel32'") as caught:
        mlp(prepared, "xla")
    assert "to use them as they are" not in str(caught.value)


@pytest.mark.usefixtures("hopper_library")
def test_gradients_of_w4a8_are_those_of_the_weights_that_it_multiplies(monkeypatch):
    """Straight through the rounding of activations; the kernel's place is taken by xla."""
    monkeypatch.setattr(sm90, "moe_mlp", lambda config, variant, *rest: xla.moe_mlp(config, *rest))
    monkeypatch.setattr(sm90, "grouped_matmul", lambda variant, *rest: xla.grouped_matmul(*rest))
    x, ids, w = call(dtype=jnp.bfloat16)
    canonical, sizes = experts("mxfp4"), jnp.array([1, 2, 0, 2], jnp.int32)

    def gradients(weights, **kwargs):
        def mlp_loss(x, w):
            return jaxmoe.moe_mlp(x, weights, ids, w, **kwargs).astype(jnp.float32).sum()

        def grouped_loss(x):
            y = jaxmoe.grouped_matmul(x, weights.gate_up, sizes, **kwargs)
            return y.astype(jnp.float32).sum()

        return *jax.grad(mlp_loss, (0, 1))(x, w), jax.grad(grouped_loss)(x)

    want = gradients(canonical, implementation="xla")
    with jaxmoe.override(target="h100"):
        prepared = jaxmoe.prepare(canonical, compute="w4a8")
        for ours, theirs in zip(gradients(prepared, compute="w4a8"), want, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.usefixtures("hopper_library")
def test_what_the_hopper_kernels_cannot_do_lowers_to_xla():
    x, ids, w = call()
    text = lowered_for_hopper(lambda x, e: jaxmoe.moe_mlp(x, e, ids, w), x, experts())
    assert "jaxmoe_moe_mlp" not in text
    sizes = jnp.array([1, 2, 0, 2], jnp.int32)
    text = lowered_for_hopper(
        lambda x, m: jaxmoe.grouped_matmul(x, m, sizes, preferred_element_type=jnp.float32),
        x[:, :32].astype(jnp.bfloat16),
        experts().down,
    )
    assert "jaxmoe_grouped_matmul" not in text


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_xla_reads_every_layout(fmt):
    """The gradients of a native variant are xla's, on the weights that it was given."""
    canonical = experts(fmt)
    x, ids, w = call()
    config = xla.MlpConfig(jaxmoe.SwiGLU, weight_on_input=False)
    rest = (ids, w, jaxmoe.SwiGLU().params(4), jnp.int32(0))
    run = jax.jit(functools.partial(xla.moe_mlp, config))
    want = run(x, canonical, *rest)
    for name, layout in layouts.LAYOUTS.items():
        readers = [row for row in capability.TABLE if row.layout == name and not row.never]
        if not any(fmt in row.weight_formats for row in readers):
            continue
        prepared = jaxmoe.ExpertWeights(
            layout.pack(canonical.gate_up, True), layout.pack(canonical.down, False)
        )
        np.testing.assert_array_equal(run(x, prepared, *rest), want)


@pytest.mark.parametrize("family", [sm80, sm90], ids=lambda family: family.name)
@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_self_test_judges_numbers_inside_any_trace(monkeypatch, factor, family):
    """On the CPU, with xla in place of the kernel: right numbers pass and wrong ones do not."""

    def stand_in(config, variant, x, *rest):
        return (factor * xla.moe_mlp(config, x, *rest)).astype(x.dtype)

    monkeypatch.setattr(family, "moe_mlp", stand_in)
    monkeypatch.setattr(family, "device", lambda: jax.local_devices(backend="cpu")[0])
    found = []

    def traced(x):
        found.append(family.self_test.__wrapped__(family, f"{family.name}_w4a16"))
        return x

    mesh = jax.make_mesh((1,), ("i",))
    spec = jax.sharding.PartitionSpec()
    with jax.set_mesh(mesh):
        inside = jax.shard_map(traced, in_specs=spec, out_specs=spec)
        jax.jit(jax.vmap(jax.grad(lambda x: inside(x[None])[0])))(jnp.ones(3))
    assert found
    for reason in found:
        if factor == 1.0:
            assert reason == ""
        else:
            assert re.match(r"a relative error of 1\.\de-01 with mxfp4 weights", reason)


def with_oracle(config, variant, x, experts, ids, weights, params, offset):
    """What a right W4A8 kernel gives, on the CPU."""

    def bits(matrix):
        w = layouts.unpack(matrix, jnp.arange(matrix.shape[0]))
        return oracle.Bits("mxfp4", np.asarray(w.packed()), np.asarray(w.scale).view(np.uint8))

    y = oracle.moe_mlp(
        np.asarray(x), bits(experts.gate_up), bits(experts.down), np.asarray(ids),
        np.asarray(weights), arithmetic="w4a8",
    )  # fmt: skip
    return jnp.asarray(y, x.dtype)


@pytest.mark.parametrize("rounds", [True, False])
def test_hopper_self_test_of_w4a8_knows_what_is_rounded(monkeypatch, rounds):
    """The oracle's numbers pass; those of unrounded activations do not."""

    def unrounded(config, variant, *rest):
        return xla.moe_mlp(config, *rest)

    monkeypatch.setattr(sm90, "moe_mlp", with_oracle if rounds else unrounded)
    monkeypatch.setattr(sm90, "device", lambda: jax.local_devices(backend="cpu")[0])
    found = sm90.self_test.__wrapped__(sm90, "sm90_w4a8")
    if rounds:
        assert found == ""
    else:
        assert re.match(r"a relative error of \d\.\de-02 with mxfp4 weights", found)


@pytest.mark.parametrize("family", GPU_FAMILIES.values(), ids=GPU_FAMILIES)
def test_self_tests_without_their_gpu_have_nothing_to_say(family):
    if family.device() is None:
        assert {family.self_test(variant) for variant in family.rows} == {""}
