"""The scripts under benchmarks/: what they make of rows and of a profiler's events."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import jaxmoe
from jaxmoe import benchmark, kernels, models
from jaxmoe.checkpoint import open_folder

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
DEVICE = "NVIDIA H100 80GB HBM3"


def row(**changed):
    tokens = changed.get("T", 64)
    layer = benchmark.get_layer(changed.get("layer", "qwen3-30b-a3b"))
    us = changed.get("us", 100.0)
    return {
        "device": DEVICE, "implementation": "sm90_w4a16", "layer": layer.name, "format": "mxfp4",
        "compute": "w4a16", "dtype": "bfloat16", "T": tokens, "mode": "program", "us": us,
        "gbps": layer.weight_bytes("mxfp4") / us / 1e3, "tflops": layer.flops(tokens) / us / 1e6,
        "bandwidth_gbps": 3100.0, "peak_tflops": 750.0,
    } | changed  # fmt: skip


# --- peers and the report -------------------------------------------------------------------------


def test_peers_are_found_by_the_device_and_compared_by_layer_format_and_arithmetic(script):
    peers = script("peers")
    rows = peers.peers_of(DEVICE)
    assert {r["layer"] for r in rows} == set(benchmark.LAYERS) - {"gpt-oss-20b"}
    assert peers.peers_of("NVIDIA H1000") == peers.peers_of("AMD EPYC, 2 cores") == []
    assert peers.best(rows, row()) == 144
    assert peers.best(rows, row(format="nvfp4", T=1)) == 31
    assert peers.best(rows, row(layer="mixtral-8x7b", compute="w4a8", T=16384)) == 10433
    assert peers.best(rows, row(T=2)) is None


def test_no_peer_is_below_the_floor(script):
    """A figure that was copied wrongly would be likely to be."""
    for peer in script("peers").peers_of(DEVICE):
        layer = benchmark.get_layer(peer["layer"])
        assert list(map(int, peer["us"])) == sorted(map(int, peer["us"]))
        for t, us in peer["us"].items():
            experts = benchmark.expected_experts(layer, int(t))
            assert us * 1e-6 > layer.flops(int(t)) / 1.5e15
            assert us * 1e-6 > experts * layer.expert_bytes("mxfp4") / 3.3e12


def test_the_report_has_the_ratio_to_the_best_peer(script, monkeypatch):
    report = script("report")
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report.report([row(us=500.0), row(us=72.0), row(T=2), row(mode="dispatch")]))
    text = capture.get()
    assert "times faster than the best peer" in text
    assert "72.0 (2.00×)" in text
    assert "500" not in text
    assert "100 (1.44×)" in text
    with console.capture() as capture:
        console.print(report.report([row(device="AMD EPYC, 2 cores")]))
    assert "×" not in capture.get()


def test_recorded_rows_have_what_the_scripts_read(script):
    for path in (SCRIPTS / "results").glob("*.json"):
        assert script("roofline").read_device(path)
        script("report").report(benchmark.read_rows(path))


# --- roofline -------------------------------------------------------------------------------------


def test_the_roofline_is_drawn(script, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [
        row(layer=layer, compute=compute, T=t, us=100.0 + t, mode=mode)
        for layer in ("qwen3-30b-a3b", "mixtral-8x7b")
        for compute in ("w4a16", "w4a8")
        for t in (1, 64, 4096)
        for mode in ("dispatch", "program")
    ]
    path = tmp_path / "rows.json"
    benchmark.append_rows(path, rows)
    script("roofline").main([str(path)])
    png = tmp_path / "rows.png"
    assert capsys.readouterr().out.strip() == str(png)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_programs_are_drawn_rather_than_dispatched_calls(script):
    rows = [row(T=64), row(T=1), row(T=64, us=50.0), row(T=1, mode="dispatch"), row(T=1, us=9.0)]
    ((key, drawn),) = script("roofline").series(rows).items()
    assert key == ("qwen3-30b-a3b", "mxfp4", "w4a16", "sm90_w4a16")
    assert [(r["T"], r["us"], r["mode"]) for r in drawn] == [
        (1, 9.0, "program"),
        (64, 50.0, "program"),
    ]


def test_one_implementation_is_drawn_alone(script, tmp_path):
    path = tmp_path / "rows.json"
    benchmark.append_rows(path, [row(), row(implementation="sm80_w4a16", T=1)])
    read = script("roofline").read_device
    assert [r["T"] for r in read(path, ["sm80_w4a16"])] == [1]
    assert len(read(path)) == 2
    with pytest.raises(ValueError, match="no rows of xla"):
        read(path, ["xla"])


LOG = """
qwen3-30b-a3b   nvfp4     T=16    mma8      error 2.88e-03      97.8 us    2144 GB/s    12.4 TFLOP/s
qwen3-30b-a3b   nvfp4     T=16    decode    error 2.90e-03     116.9 us    1794 GB/s    10.3 TFLOP/s
mixtral-8x7b    mxfp4-fp8 T=1024  wgmma256  error 4.82e-02     840.3 us     891 GB/s   858.7 TFLOP/s
odd             nvfp4     T=1     decode    error 2.90e-03
"""


def test_rows_of_the_native_program(script, tmp_path, capsys):
    log, path = tmp_path / "log.txt", tmp_path / "rows.json"
    log.write_text(LOG)
    arguments = [
        str(log), "--family", "sm90", "--device", DEVICE, "--commit", "abc", "--bandwidth", "3000",
        "--peak", "800", "--peak-fp8", "1400", "--json", str(path),
    ]  # fmt: skip
    script("native_rows").main(arguments)
    few, many = benchmark.read_rows(path)
    assert (few["implementation"], few["T"], few["us"], few["mode"]) == (
        "sm90_w4a16", 16, 97.8, "graph",
    )  # fmt: skip
    assert few["floor_us"] == pytest.approx(97.8 * 2144 / 3000, rel=1e-3)
    assert (many["implementation"], many["compute"], many["peak_tflops"]) == (
        "sm90_w4a8", "w4a8", 1400,
    )  # fmt: skip
    assert many["floor_fraction"] == pytest.approx(858.7 / 1400, rel=1e-3)
    assert [r["us"] for (r,) in script("roofline").series([few, many]).values()] == [97.8, 840.3]
    log.write_text("nothing")
    with pytest.raises(SystemExit, match=r"log.txt: no line has a layer"):
        script("native_rows").main(arguments)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "one device, got none"),
        (json.dumps([row(), row(device="other")]), f"one device, got {DEVICE}, other"),
        (json.dumps([row(), {"device": DEVICE}]), "row 2 must have device, layer"),
        ("{}", "list of rows"),
        ("no", "not JSON"),
    ],
)
def test_rows_that_cannot_be_drawn_are_refused(script, tmp_path, text, complaint):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=complaint):
        script("roofline").main([str(path)])
    assert not path.with_suffix(".png").exists()


# --- stages ---------------------------------------------------------------------------------------


def test_stages_are_the_kernels_of_a_call_without_waiting_for_the_one_before(script):
    stages = script("stages")
    mangled = "_ZN6jaxmoe4sm9012_GLOBAL__N_111gemm_kernelILi3EEEvv"
    plain = "void jaxmoe::cuda::(anonymous namespace)::place_kernel(SortArgs)"
    events = []
    for start, longer in ((0, 0), (1e6, 400), (2e6, 100)):
        events += [
            stages.Event(start + 9000, 2000, "loop_fusion<1>"),  # after a gap of 2 us
            stages.Event(start, 3000 + longer, plain),
            stages.Event(start + 1000, 6000, mangled),  # starts while the first runs
        ]
    assert stages.stages(events, 3) == [
        {"kernel": "place_kernel", "us": 3.1},
        {"kernel": "gemm_kernel", "us": 3.9},
        {"kernel": "loop_fusion", "us": 2.0},
    ]


@pytest.mark.parametrize("names", [[], ["a", "b", "b", "a"], ["a", "a", "b"]])
def test_stages_of_unlike_calls_are_refused(script, names):
    stages = script("stages")
    with pytest.raises(ValueError, match="same kernels for each of 2 calls"):
        stages.stages([stages.Event(i, 1, name) for i, name in enumerate(names)], 2)


def test_stages_need_a_gpu(script, tmp_path):
    with pytest.raises(ValueError, match="saw no GPU"):
        script("stages").traced(str(tmp_path))


# --- prepare --------------------------------------------------------------------------------------


def test_prepare_is_measured_where_there_is_something_to_prepare(script):
    prepare = script("prepare")
    problem = benchmark.layer_problem(benchmark.TINY, "mxfp4", "bfloat16", "auto")
    if kernels.select(problem).variant == "xla":
        with pytest.raises(ValueError, match="nothing to prepare"):
            prepare.measure(benchmark.TINY, "mxfp4")
        return
    row = prepare.measure(benchmark.TINY, "mxfp4")
    assert (row["layer"], row["format"], row["layout"]) == ("tiny", "mxfp4", "panel32")
    assert 0 < row["second_s"] < row["first_s"]
    assert row["expert_bytes"] == benchmark.TINY.expert_bytes("mxfp4")
    assert row["temporary_experts"] > 0
    assert row["peak_experts"] is None  # a CPU does not say


def test_prepare_of_canonical_weights_is_refused(script, monkeypatch):
    prepare = script("prepare")
    select = kernels.select
    monkeypatch.setattr(prepare.kernels, "select", lambda problem: select(problem, "xla"))
    with pytest.raises(ValueError, match=r"xla is selected here.*nothing to prepare"):
        prepare.measure(benchmark.TINY, "nvfp4")


# --- synthetic checkpoints, and generating from them ----------------------------------------------


@pytest.mark.parametrize(
    ("model", "parameters", "nbytes"),
    [
        ("qwen3-30b-a3b-nvfp4", 30_532_122_624, 18_087_458_304),
        ("gpt-oss-20b", 20_914_757_184, 13_761_264_768),
    ],
)
def test_synthetic_checkpoints_have_the_published_number_of_parameters(
    script, model, parameters, nbytes
):
    """As the model cards and the indices of the published folders count them."""
    _, _, tensors = script("synthetic_checkpoint").MODELS[model]()
    count = 0
    for tensor in tensors:
        if tensor.kind not in ("e4m3", "e8m0") and tensor.dtype != "F32":  # those are scales
            count += math.prod(tensor.shape) * (2 if tensor.kind == "elements" else 1)
    assert count == parameters
    assert sum(tensor.nbytes for tensor in tensors) == nbytes


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    """Small folders by model, as the script writes them."""
    root = tmp_path_factory.mktemp("synthetic")
    for model in ("qwen3-30b-a3b-nvfp4", "gpt-oss-20b"):
        command = [sys.executable, str(SCRIPTS / "synthetic_checkpoint.py"), model]
        command += [str(root / model), "--layers", "3", "--small"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.startswith(str(root / model))
    return root


@pytest.mark.parametrize("model", ["qwen3-30b-a3b-nvfp4", "gpt-oss-20b"])
def test_synthetic_weights_keep_activations_at_their_size(synthetic, model):
    """Every matrix has deviation 1/sqrt(fan-in); of MXFP4 as near as powers of two come to it."""
    with open_folder(synthetic / model) as folder:
        config = folder.config
        experts = folder.experts("model.layers.1.mlp.experts", num_experts=8, dtype=np.float32)
        weights = [experts.gate_up, experts.down]
        weights.append(folder.linear("model.layers.2.self_attn.o_proj"))
        weights.append(folder.linear("lm_head"))
        assert folder.scheme.compute == ("w4a4" if "qwen3" in model else None)
    for weight in weights:
        off = 1.03
        if isinstance(weight, jaxmoe.QuantizedTensor):
            off *= math.sqrt(2) if weight.format.name == "mxfp4" else 1
            weight = jaxmoe.dequantize(weight)
        values = np.asarray(weight).astype(np.float64)
        assert 1 / off < values.std() * math.sqrt(values.shape[-1]) < off
        assert abs(values.mean()) < 0.05 * values.std()
    assert config["num_hidden_layers"] == 3


def test_synthetic_checkpoints_go_into_empty_folders_alone(script, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be empty; name another"):
        script("synthetic_checkpoint").write("gpt-oss-20b", tmp_path, layers=1, small=True)


def test_a_byte_tokenizer(synthetic):
    pytest.importorskip("tokenizers", reason="needs the text extra")
    text = models.Tokenizer(synthetic / "gpt-oss-20b")
    tokens = text.encode("né\n\0 x")
    assert tokens == list("né\n\0 x".encode())
    assert text.decode(tokens) == "né\n\0 x"
    assert text.decode([65, 300]) == "A"  # beyond the bytes there is no text
    assert text.stop == {256}


def test_generating_is_measured(script, synthetic, tmp_path, capsys):
    generate = script("generate")
    folder = str(synthetic / "gpt-oss-20b")
    arguments = ["--batch", "2", "--prompt", "5", "--new", "48", "--results", str(tmp_path)]
    generate.main([folder, *arguments])
    (path,) = tmp_path.glob("*.json")
    load, speed = benchmark.read_rows(path)
    for row in (load, speed):
        assert row["model"] == "gpt_oss, 3 layers"
        assert sum(row["kernels"].values()) == 3
    assert load["file_bytes"] > 700_000
    assert load["load_s"] > 0
    assert load["load_device_bytes"] is None  # a CPU does not say
    assert (speed["batch"], speed["prompt"], speed["new"]) == (2, 5, 48)
    for key in ("compile_s", "prefill_tokens_per_s", "decode_tokens_per_s", "floor_ms"):
        assert speed[key] > 0, key
    with pytest.raises(SystemExit, match="multiple of 16"):
        generate.main([folder, "--new", "20"])


def test_a_step_reads_each_weight_and_the_touched_experts_once(script, synthetic):
    """Against a sum over the tensors of the folder."""
    generate = script("generate")
    model = models.load_pretrained(synthetic / "qwen3-30b-a3b-nvfp4", prepare=False)
    with open_folder(synthetic / "qwen3-30b-a3b-nvfp4") as folder:
        plain = experts = 0
        for name in folder.names:
            size = math.prod(folder.entry(name).shape)
            if ".experts." in name:
                experts += 0 if name.endswith("input_scale") else folder.entry(name).nbytes
            elif name.endswith((".weight_scale", "_scale_2", "input_scale", "embed_tokens.weight")):
                pass
            else:
                plain += 4 * size * (2 if folder.entry(name).dtype == "U8" else 1)
    # Gate and up have a global scale each, which are one in the layer; so are all input scales of a
    # product.
    experts -= 3 * 8 * 4
    plain += 3 * 2 * 4
    cache = 3 * 2 * 2 * 32 * 4  # layers, key and value, heads, features, bytes
    for batch, touched in ((1, 2 / 8), (3, 1 - (6 / 8) ** 3)):
        expected = plain + touched * experts + batch * 10 * cache
        assert generate.step_bytes(model, batch, 10) == pytest.approx(expected, rel=1e-12)


def test_kernels_of_a_step_are_summed(script):
    generate = script("generate")
    event = generate.Event
    events = [event(0, 2000, "a_fusion_12"), event(9, 4000, "a_fusion_3_1"), event(5, 1000, "b")]
    assert generate.by_kernel(events, 2) == [("a_fusion", 1.0, 3.0), ("b", 0.5, 0.5)]
