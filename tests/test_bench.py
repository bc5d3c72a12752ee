"""The benchmark's data, its schedule, its reference and its records."""

import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxmoe
from jaxmoe import benchmark
from jaxmoe.benchmark import LAYERS, TINY, TOKENS, Machine, Measurement, Skipped, runner
from jaxmoe.benchmark import machine as machine_module
from jaxmoe.benchmark.baseline import ragged_dot_mlp
from jaxmoe.benchmark.data import random_experts, random_tokens, relative_error
from jaxmoe.benchmark.runner import _weights
from jaxmoe.benchmark.timing import interleave, measure
from jaxmoe.kernels import layouts
from jaxmoe.quantization import check

MACHINE = Machine("test", "cpu", bandwidth=1e10, peak=1e11, cache_bytes=0)
FORMATS = ("nvfp4", "mxfp4")

# (H, I, E, k), copied by hand from DESIGN section 7 and the models' config.json.
DESIGN = {
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "gpt-oss-120b": (2880, 2880, 128, 4),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "deepseek-v3-ep8": (7168, 2048, 32, 8),
}


def test_layers_are_those_of_the_design():
    sizes = {
        name: (x.hidden_size, x.intermediate_size, x.num_experts, x.top_k)
        for name, x in LAYERS.items()
    }
    assert sizes == DESIGN


def test_tokens_reach_from_decode_to_prefill():
    for counts in TOKENS.values():
        assert list(counts) == sorted(set(counts))
        assert counts[0] == 1
    assert TOKENS["gpu"][-1] == 16384


def test_bytes_and_flops_of_a_layer():
    layer = LAYERS["qwen3-30b-a3b"]
    elements = 3 * 2048 * 768
    assert layer.expert_bytes("nvfp4") == elements * 4.5 / 8
    assert layer.expert_bytes("mxfp4") == elements * 4.25 / 8
    assert layer.weight_bytes("mxfp4") == 128 * elements * 4.25 / 8
    assert layer.flops(64) == 6 * 64 * 8 * 2048 * 768


def test_unknown_layer_names_the_known_ones():
    with pytest.raises(ValueError, match=r"mixtral-8x7b.*Did you mean 'qwen3-30b-a3b'"):
        benchmark.get_layer("qwen3-30b")


# --- data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("layout", ["canonical", "panel32", "sm90_fragment"])
def test_random_experts_are_valid_and_keep_the_scale_of_activations(weight_format, layout):
    experts = random_experts(TINY, weight_format, layout, seed=3)
    assert experts.layout == layout
    everyone = jnp.arange(TINY.num_experts, dtype=jnp.int32)
    for w, shape in ((experts.gate_up, (8, 256, 256)), (experts.down, (8, 256, 128))):
        assert tuple(w.shape) == shape
        canonical = w if layout == "canonical" else layouts.unpack(w, everyone)
        check(canonical)
        rms = float(jnp.sqrt(jnp.mean(jaxmoe.dequantize(canonical) ** 2)))
        # There is a global scale to set the size by, or mxfp4's block scales are near 1.
        unscaled = weight_format == "mxfp4" and layout != "sm90_fragment"
        target = math.sqrt(68.5 / 8) if unscaled else 1 / math.sqrt(shape[2])
        assert 0.5 < rms / target < 2


def test_random_experts_have_the_size_that_the_layer_states():
    for weight_format, layout in itertools.product(FORMATS, ("panel32", "sm90_fragment")):
        experts = random_experts(TINY, weight_format, layout, seed=0)
        packed = experts.gate_up.data.nbytes + experts.down.data.nbytes
        assert packed == TINY.weight_bytes(weight_format)


def test_prepared_random_experts_differ_by_seed():
    a, b = (random_experts(TINY, "nvfp4", "panel32", seed=s) for s in (0, 1))
    assert float(jnp.mean(a.down.data == b.down.data)) < 0.1


def test_random_tokens_choose_distinct_experts_evenly():
    _, ids, weights = random_tokens(TINY, 4000, "float32", seed=0)
    assert all(len(set(row)) == TINY.top_k for row in np.asarray(ids).tolist())
    np.testing.assert_allclose(np.bincount(np.asarray(ids).ravel()), 1000, rtol=0.15)
    np.testing.assert_allclose(np.asarray(weights).sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_reference_agrees_with_the_oracle(weight_format):
    experts = random_experts(TINY, weight_format, "canonical", seed=5)
    x, ids, weights = tokens = random_tokens(TINY, 6, "float32", seed=6)

    def bits(w):
        scale = np.asarray(w.scale).view(np.uint8)
        top = None if w.global_scale is None else np.asarray(w.global_scale)
        return oracle.Bits(weight_format, np.asarray(w.packed()), scale, top)

    expected = oracle.moe_mlp(
        np.asarray(x), bits(experts.gate_up), bits(experts.down), np.asarray(ids),
        np.asarray(weights),
    )  # fmt: skip
    assert relative_error(expected, experts, tokens, sample=6) < 1e-12
    wrong = expected * np.linspace(1, 1.01, 6)[:, None]
    assert 1e-3 < relative_error(wrong, experts, tokens, sample=6) < 1e-2


def test_the_error_of_a_sample_sees_the_first_and_the_last_token():
    experts = random_experts(TINY, "nvfp4", "canonical", seed=0)
    tokens = random_tokens(TINY, 9, "float32", seed=0)
    y = ragged_dot_mlp(tokens[0], experts, *tokens[1:])
    assert relative_error(y, experts, tokens) < 1e-5
    for row in (0, 8):
        assert relative_error(y.at[row].add(1.0), experts, tokens) > 1e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 8e-3)])
def test_the_baseline_computes_the_layer(dtype, tolerance):
    experts = random_experts(TINY, "nvfp4", "canonical", seed=1)
    tokens = random_tokens(TINY, 33, dtype, seed=2)
    y = jax.jit(ragged_dot_mlp)(tokens[0], experts, *tokens[1:])
    assert y.dtype == dtype
    assert relative_error(y, experts, tokens, sample=33) < tolerance


# --- schedule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[1], [5, 5], [100, 3, 1], [7, 2, 0], []])
def test_interleave_runs_each_as_often_as_asked_and_spreads_it(counts):
    order = list(interleave(counts))
    assert [order.count(i) for i in range(len(counts))] == counts
    for i, count in enumerate(counts):
        if 1 < count < max(counts):  # no two in the first half alone
            places = [p for p, which in enumerate(order) if which == i]
            assert places[-1] > len(order) / 2


def test_measure_gives_every_call_its_number_and_reports_the_median():
    seen = []
    (timing,) = measure([seen.append], budget=10.0, at_most=7)
    assert seen == list(range(9))  # warm-up, trial, 7 timed
    assert timing.median == sorted(timing.seconds)[3]


def test_measure_spends_little_on_what_is_slow(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("jaxmoe.benchmark.timing.time.perf_counter", lambda: next(clock))
    slow, fast = [], []
    timings = measure([slow.append, fast.append], budget=0.5)  # every call takes one tick
    assert len(slow) == len(fast) == 3
    assert [len(t.seconds) for t in timings] == [2, 2]
    (timing,) = measure([slow.append], budget=2.0)
    assert len(timing.seconds) == 5


def _plans(*layouts):
    from jaxmoe.benchmark.runner import _Plan

    return [_Plan(f"p{i}", layout, "w4a16") for i, layout in enumerate(layouts)]


@pytest.mark.parametrize(
    ("cache", "limit", "sets"),
    [(0, 2**30, 1), (500_000, 2**30, 10), (500_000, 2_000_000, 3), (2**30, 2**30, 64)],
)
def test_weight_sets_outgrow_the_cache_within_the_limits(cache, limit, sets):
    # One token of TINY touches 2 experts of 55296 bytes; a set has 8, that is 442368 bytes.
    machine = Machine("m", "cpu", 1.0, 1.0, cache)
    made = _weights(TINY, "nvfp4", 1, _plans("panel32", "canonical"), machine, limit, 0)
    assert {layout: len(of) for layout, of in made.items()} == {"panel32": sets, "canonical": 1}


def test_weights_beyond_the_limit_are_refused_with_both_sizes():
    with pytest.raises(benchmark.MemoryLimitError, match=r"needs 0\.0 GiB .* and 0\.0 GiB are"):
        _weights(TINY, "nvfp4", 1, _plans("panel32"), MACHINE, 400_000, 0)


def test_floor_is_the_larger_of_reading_and_multiplying():
    assert MACHINE.floor(1e10, 1e10) == 1.0
    assert MACHINE.floor(1e9, 1e12) == 10.0


def test_the_machine_is_measured():
    machine = benchmark.measure_machine(megabytes=8, matrix_size=64)
    assert machine.device
    assert machine.platform == jax.default_backend()
    assert machine.bandwidth > 1e8
    assert machine.peak > 1e6
    assert machine.cache_bytes >= 2**15


def test_the_device_is_measured_by_launches_that_run_together():
    """What a GPU is measured with, at the size of a test."""
    assert machine_module._device_bandwidth(2**17) > 1e6
    for dtype in (jnp.bfloat16, jnp.float8_e4m3fn):
        assert machine_module._matmul_rate(64, dtype, launches=3) > 1e5


def test_the_peak_of_float8_is_that_of_w4a8_only():
    machine = Machine("gpu", "gpu", 1e10, 1e12, 0, peak_fp8=2e12)
    assert machine.floor(0, 4e12, "w4a8") == 2.0
    assert machine.floor(0, 4e12, "w4a16") == machine.floor(0, 4e12) == 4.0
    assert MACHINE.peak_of("w4a8") == MACHINE.peak


# --- results ------------------------------------------------------------------------------------


def test_what_no_variant_can_run_is_said_in_one_sentence():
    (skipped,) = benchmark.measure_layer(
        TINY, "nvfp4", [2], machine=MACHINE, budget=0.02, compute="w4a4", implementations=["auto"]
    )
    assert isinstance(skipped, Skipped)
    assert re.fullmatch(
        r"no variant can; with compute='auto', \w+ runs it as w4a16; .*jaxmoe explain.*",
        skipped.reason,
    )


def test_results_and_what_cannot_run():
    results = list(
        benchmark.measure_layer(
            TINY, "mxfp4", [2, 9], machine=MACHINE, budget=0.02,
            implementations=["sm90_w4a16", "xla", "ragged_dot", "xla"],
        )
    )  # fmt: skip
    names = [(r.tokens, r.implementation, type(r)) for r in results]
    assert names == [
        (t, name, kind)
        for t in (2, 9)
        for name, kind in (
            ("sm90_w4a16", Skipped),
            ("xla", Measurement),
            ("ragged_dot", Measurement),
        )
    ]
    assert "requires platform cuda" in results[0].reason
    for r in results:
        if isinstance(r, Measurement):
            assert r.error < 8e-3
            assert r.tflops == TINY.flops(r.tokens) / r.seconds / 1e12
            assert 0 < r.weight_bytes <= TINY.weight_bytes("mxfp4")
            assert r.floor == MACHINE.floor(r.weight_bytes, TINY.flops(r.tokens))
            assert (r.overhead is None) == (r.implementation == "ragged_dot")


def test_a_program_gives_the_time_of_one_of_its_calls():
    dispatched, program, baseline = benchmark.measure_layer(
        TINY, "nvfp4", [9], machine=MACHINE, budget=0.02, modes=["dispatch", "program"],
        implementations=["xla", "ragged_dot"],
    )  # fmt: skip
    modes = [(r.implementation, r.mode) for r in (dispatched, program, baseline)]
    assert modes == [("xla", "dispatch"), ("xla", "program"), ("ragged_dot", "dispatch")]
    assert program.overhead is None
    assert program.error == dispatched.error < 8e-3
    assert program.seconds < 3 * dispatched.seconds


def test_a_program_has_each_set_of_weights_equally_often():
    sets = [random_experts(TINY, "nvfp4", "canonical", seed=s) for s in range(3)]
    inputs = [random_tokens(TINY, 2, "float32", seed=s) for s in range(2)]
    seen = []

    def function(x, experts, ids, weights):
        seen.append(experts)
        return x

    run = runner._program(function, sets, inputs, floor=1e-4)
    run.call(0)
    assert len(seen) == 18  # at least 16 calls
    assert run.layers == 18 * 6  # so many launches are 10 ms of work
    seen.clear()
    run = runner._program(function, sets, inputs, floor=5e-2)
    run.call(0)
    assert (len(seen), run.layers) == (3, 3)


def test_unknown_mode_is_an_error():
    for modes, got in ((["graph"], "graph"), ([], r"\(\)")):
        with pytest.raises(ValueError, match=f"dispatch, program, got {got}"):
            list(benchmark.measure_layer(TINY, "nvfp4", [1], machine=MACHINE, modes=modes))


def test_a_baseline_that_does_not_fit_says_what_it_needs():
    limit = int(TINY.weight_bytes("nvfp4") * 1.5)
    (result,) = benchmark.measure_layer(
        TINY, "nvfp4", [64], machine=MACHINE, implementations=["ragged_dot"], memory_limit=limit
    )
    assert isinstance(result, Skipped)
    assert "its temporaries would take" in result.reason


def test_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="unknown"):
        list(benchmark.measure_layer(TINY, "nvfp4", [1], machine=MACHINE, implementations=["gpu"]))


def test_rows_have_the_documented_keys_and_are_added_to_a_file(tmp_path):
    result = Measurement(
        implementation="xla", layer=TINY, weight_format="nvfp4", compute="w4a16",
        dtype="float32", tokens=4, mode="dispatch", seconds=2e-3, overhead=None,
        weight_bytes=1e6, floor=1e-4, error=1.23456e-6, runs=9, weight_sets=1,
    )  # fmt: skip
    row = benchmark.row(result, MACHINE)
    assert {
        "date", "commit", "device", "jax", "implementation", "layer", "format", "compute", "T",
        "us", "gbps", "tflops", "error", "mode", "backend", "floor_us", "floor_fraction",
    } <= row.keys()  # fmt: skip
    assert (row["us"], row["gbps"], row["error"]) == (2000.0, 0.5, 1.235e-6)
    assert (row["floor_us"], row["floor_fraction"]) == (100.0, 0.05)
    assert row["tflops"] == pytest.approx(6 * 4 * 2 * 256 * 128 / 2e-3 / 1e12, rel=1e-3)
    path = tmp_path / "rows.json"
    benchmark.append_rows(path, [row])
    benchmark.append_rows(path, [row | {"T": 8}])
    assert [r["T"] for r in json.loads(path.read_text())] == [4, 8]
    path.write_text("{}")
    with pytest.raises(ValueError, match="list of rows"):
        benchmark.append_rows(path, [row])
    assert path.read_text() == "{}"
