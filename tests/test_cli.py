"""The command line: what it prints, what it writes, and how it fails."""

import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_text import write_tokenizer

import jaxmoe
from jaxmoe import benchmark, checkpoint, kernels, tuning
from jaxmoe.cli import _doctor, _explain, _generate, _model, _quantize, _quantize_write, _tune
from jaxmoe.kernels import cpu

MACHINE = benchmark.Machine("test machine", "cpu", bandwidth=1e10, peak=1e11, cache_bytes=0)


@pytest.fixture
def everything_built(monkeypatch):
    """An installation with every library, on a CPU without AMX."""
    features = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"}
    info = {
        "built": frozenset(row.variant for row in jaxmoe.capability.TABLE if row.never is None),
        "features": frozenset(features),
        "disqualified": {},
    }
    monkeypatch.setattr(kernels, "installation", lambda: info)


@pytest.fixture
def nothing_built(monkeypatch):
    info = {"built": frozenset(), "features": frozenset(), "disqualified": {}}
    monkeypatch.setattr(kernels, "installation", lambda: info)


def plain(text):
    """Text of a table without its frame and line breaks."""
    return re.sub(r"[\s│┃]+", " ", text)


# --- all commands -------------------------------------------------------------------------------


def test_version(run):
    assert run("--version") == (0, f"jaxmoe {jaxmoe.__version__}\n", "")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_one_sentence_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from jaxmoe.cli import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"jaxmoe: the command line needs the package {missing}: pip install 'jaxmoe[cli]'\n"
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["explain", "--target", "sm_12x"], "target 'sm_12x' is unknown"),
        (["explain", "--layer", "qwen"], "layer 'qwen' is unknown"),
        (["explain", "--compute", "w2a2"], "compute must be one of"),
        (["explain", "--declared", "w8a16"], "declared_compute must be one of"),
        (["explain", "--activation", "swish"], "activation 'swish' is unknown"),
        (["explain", "--implementation", "cuda"], "implementation 'cuda' is unknown"),
        (["explain", "--format", "int4"], "int4"),
        (["explain", "--hidden-size", "0"], "--hidden-size"),
        (["capabilities", "--target", "gpu9"], "target 'gpu9' is unknown"),
        (["generate", "--temperature", "-1"], "--temperature"),
        (["generate", "--top-p", "0"], "top_p must be in (0, 1]"),
        (["generate", "--implementation", "cuda"], "'cuda' is unknown"),
        (["quantize", "/nowhere", "/elsewhere", "--format", "nvfp4"], "/nowhere"),
        (["bench", "--tokens", "1;2"], "whole numbers"),
        (["bench", "--tokens", "0"], "whole numbers"),
        (["bench", "--layer", "tinny"], "Did you mean 'tiny'"),
        (["bench", "--format", "fp8"], "nvfp4 or mxfp4"),
        (["bench", "--implementation", "cuda"], "'cuda' is unknown"),
        (["bench", "--compute", "w9a9"], "compute must be one of"),
        (["bench", "--mode", "graph"], "dispatch or program, got 'graph'"),
        (["tune", "--tokens", "0"], "whole numbers"),
        (["tune", "--layer", "tinny"], "Did you mean 'tiny'"),
        (["tune", "--format", "fp8"], "nvfp4 or mxfp4"),
        (["tune", "--implementation", "cuda"], "'cuda' is unknown"),
        (["tune", "--compute", "w9a9"], "compute must be one of"),
        (["explain", "--tokens", "0"], "--tokens"),
        (["compile"], "compile"),
    ],
)
def test_bad_arguments_exit_with_2_and_name_the_argument(run, arguments, complaint):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert complaint in plain(err)


# --- explain and capabilities -------------------------------------------------------------------

# Written by hand from DESIGN sections 4.3 and 5: what a full build selects for weights whose
# checkpoint declares W4A4 (NVFP4) or W4A8 (MXFP4).
SELECTED = {
    ("sm_90", "nvfp4"): ("sm90_w4a16", "w4a16"),
    ("sm_90", "mxfp4"): ("sm90_w4a8", "w4a8"),
    ("sm_100", "nvfp4"): ("sm100_w4a4", "w4a4"),
    ("sm_100", "mxfp4"): ("sm100_w4a8", "w4a8"),
    ("sm_103", "nvfp4"): ("sm100_w4a4", "w4a4"),
    ("sm_103", "mxfp4"): ("sm100_w4a8", "w4a8"),
    ("sm_107", "nvfp4"): ("xla", "w4a16"),
    ("sm_107", "mxfp4"): ("xla", "w4a16"),
    ("sm_110", "nvfp4"): ("xla", "w4a16"),
    ("sm_110", "mxfp4"): ("xla", "w4a16"),
    ("sm_120", "nvfp4"): ("sm120_w4a4", "w4a4"),
    ("sm_120", "mxfp4"): ("sm120_w4a8", "w4a8"),
    ("sm_121", "nvfp4"): ("sm120_w4a4", "w4a4"),
    ("sm_121", "mxfp4"): ("sm120_w4a8", "w4a8"),
    ("sm_89", "nvfp4"): ("sm80_w4a16", "w4a16"),
    ("sm_89", "mxfp4"): ("sm80_w4a16", "w4a16"),
    ("cpu", "nvfp4"): ("cpu_avx512", "w4a16"),
    ("cpu", "mxfp4"): ("cpu_avx512", "w4a16"),
    ("tpu", "nvfp4"): ("xla", "w4a16"),
    ("tpu", "mxfp4"): ("xla", "w4a16"),
}


@pytest.mark.usefixtures("everything_built")
@pytest.mark.parametrize(("weight_format", "declared"), [("nvfp4", "w4a4"), ("mxfp4", "w4a8")])
def test_explain_all_targets_of_a_full_build(run, weight_format, declared):
    code, out, _ = run(
        "explain", "--target", "all", "--format", weight_format, "--declared", declared, "--json"
    )
    assert code == 0
    found = {
        (r["target"]["device_kind"], weight_format): (r["selected"], r["compute"])
        for r in json.loads(out)
    }
    assert found == {key: value for key, value in SELECTED.items() if key[1] == weight_format}


@pytest.mark.usefixtures("nothing_built")
def test_explain_all_targets_of_a_bare_build_says_why_none_is_native(run):
    code, out, _ = run("explain", "--target", "all")
    assert code == 0
    summary = out[out.index("Summary") :]
    lines = {line.split()[1]: plain(line) for line in summary.splitlines() if "xla" in line}
    assert list(lines) == list(_explain.ALL_TARGETS)
    for name in ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "sm_89"):
        assert "sm80_w4a16: NOT_BUILT" in lines[name], lines[name]
    for name in ("sm_107", "sm_110"):
        assert "SM_UNKNOWN" in lines[name], lines[name]
    assert "PLATFORM_UNSUPPORTED" in lines["tpu"]
    assert "cpu_portable" in lines["cpu"]


@pytest.mark.usefixtures("everything_built")
def test_explain_prints_selection_and_every_rejection(run):
    code, out, _ = run("explain", "--target", "rtx 5090", "--compute", "w4a4")
    text = plain(out)
    assert code == 0
    assert "sm_120 (rtx 5090): sm120_w4a4 as w4a4, by AUTO" in text
    for variant in (row.variant for row in jaxmoe.capability.TABLE):
        assert variant in text
    assert "trtllm_gen" in text
    assert "requires SM 100 or 103" in text


@pytest.mark.usefixtures("everything_built")
def test_explain_a_problem_that_nothing_runs_names_the_way_out(run):
    code, out, _ = run("explain", "--target", "h100", "--compute", "w4a4")
    assert code == 0
    assert "sm_90 (h100): nothing" in out
    assert "W4A4 does not exist on SM 90" in plain(out)
    assert "way out: with compute='auto', sm90_w4a16 runs it as w4a16" in out


@pytest.mark.usefixtures("everything_built")
def test_explain_options_reach_the_problem(run):
    _, out, _ = run(
        *("explain", "--target", "cpu", "--target", "sm_120", "--json", "--bias"),
        *("--layer", "gpt-oss-20b", "--num-experts", "4", "--activation", "geglu"),
        *("--dtype", "float32", "--implementation", "cpu"),
    )
    first, second = json.loads(out)
    assert first["selected"] == "cpu_avx512"
    assert first["selected_by"] == "request"
    assert second["selected"] is None
    problem = first["problem"]
    assert (problem["hidden_size"], problem["num_experts"], problem["top_k"]) == (2880, 4, 4)
    assert (problem["activation"], problem["bias"]) == ("geglu", True)
    assert problem["activation_dtype"] == "float32"


@pytest.mark.usefixtures("nothing_built")
def test_capabilities_lists_every_variant_with_its_status(run):
    code, out, _ = run("capabilities", "--target", "sm_120", "--json")
    report = json.loads(out)
    status = {v["variant"]: (v["status"], v["reason"]) for v in report["variants"]}
    assert code == 0
    assert list(status) == [row.variant for row in jaxmoe.capability.TABLE]
    assert status["sm120_w4a4"] == ("unable", "NOT_BUILT")
    assert status["sm90_w4a16"] == ("unable", "SM_UNSUPPORTED")
    assert status["sm120_generic"] == ("never", "INSTRUCTION_MISSING")
    assert status["trtllm_gen"][0] == "never"
    assert status["xla"] == ("able", None)
    chosen = {(c["format"], c["compute"]): c["selected"] for c in report["selected"]}
    assert chosen["nvfp4", "auto"] == "xla"
    assert chosen["nvfp4", "w4a4"] is None
    code, out, _ = run("capabilities", "--target", "sm_120")
    assert code == 0
    assert "this build holds no sm120 library" in plain(out)


@pytest.mark.usefixtures("everything_built")
def test_capabilities_of_a_full_build(run):
    _, out, _ = run("capabilities", "--target", "b300", "--json")
    chosen = {(c["format"], c["compute"]): c["selected"] for c in json.loads(out)["selected"]}
    assert chosen["nvfp4", "w4a4"] == "sm100_w4a4"
    assert chosen["mxfp4", "w4a8"] == "sm100_w4a8"
    assert chosen["nvfp4", "auto"] == "sm80_w4a16"


# --- doctor -------------------------------------------------------------------------------------


def test_doctor_reports_the_installation(run):
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert code == (0 if report["healthy"] else 1)
    assert report["versions"]["jaxmoe"] == jaxmoe.__version__
    assert report["versions"]["typer"] != "not installed"
    checks = {check["name"]: check for check in report["checks"]}
    assert report["healthy"] == all(check["ok"] is not False for check in checks.values())
    assert checks["xla numbers"]["ok"]
    assert checks["native CPU library"]["ok"] == (cpu.library()[0] is not None)


@pytest.mark.usefixtures("nothing_built")
def test_doctor_asks_every_variant_for_arithmetic_that_it_has():
    """Else a variant would be left out as unable, on the very machine that it is for."""
    able = [row for row in jaxmoe.capability.TABLE if row.never is None]
    for row in able:
        rejected = _doctor.try_resolve(
            _doctor._problem(row), jaxmoe.Target.from_name("h100", built={"sm90_w4a8"}), row.variant
        ).rejected
        assert not {r.reason.name for r in rejected if r.variant == row.variant} & {
            "FORMAT_UNSUPPORTED", "COMPUTE_UNSUPPORTED", "DTYPE_UNSUPPORTED",
        }  # fmt: skip


def test_doctor_says_that_cuda_families_are_absent(run, monkeypatch):
    monkeypatch.setattr(_doctor, "run_checks", lambda: [_doctor.Check("all", True, "fine")])
    code, out, _ = run("doctor")
    assert code == 0
    assert "the families sm120, sm100, sm90, sm80 are not in this build" in plain(out)
    assert "All checks passed." in out


def test_doctor_fails_without_the_native_library(run, monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: (None, "it is not there"))
    monkeypatch.setattr(_doctor, "_numbers", lambda row: (None, "left out"))
    code, out, _ = run("doctor")
    assert code == 1
    assert "Failed: native CPU library." in out


def test_doctor_finds_wrong_numbers(run, monkeypatch):
    right = jaxmoe.moe_mlp
    monkeypatch.setattr(_doctor, "_case", _doctor._case.__wrapped__)  # nothing from before
    monkeypatch.setattr(jaxmoe, "moe_mlp", lambda *a, **k: 1.01 * right(*a, **k))
    monkeypatch.setattr(cpu, "library", lambda: (None, "left out"))
    monkeypatch.setattr(_doctor, "_native_rows", lambda platform: [])
    code, out, _ = run("doctor", "--json")
    (numbers,) = (c for c in json.loads(out)["checks"] if c["name"] == "xla numbers")
    assert code == 1
    assert numbers["ok"] is False
    assert re.search(r"float32 1\.0e-02 \(at most 1e-05\)", numbers["detail"])


def test_doctor_survives_a_kernel_that_raises(run, monkeypatch):
    def broken(row):
        raise RuntimeError("the kernel is broken")

    monkeypatch.setattr(_doctor, "_numbers", broken)
    code, out, _ = run("doctor")
    assert code == 1
    assert "RuntimeError: the kernel is broken" in plain(out)


# --- quantize -----------------------------------------------------------------------------------


def _random(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "layers.0.mlp.experts.gate_up_proj": _random(3, 64, 32),
        "layers.0.mlp.experts.down_proj": _random(2, 64, 32, seed=1, dtype=jnp.bfloat16),
        "layers.0.mlp.gate.weight": _random(3, 32, seed=2),
        "layers.0.mlp.experts.gate_up_proj_bias": _random(3, 64, seed=3),
        "layers.1.mlp.up_proj.weight": _random(64, 32, seed=4, dtype=np.float16),
        "step": np.array(7, np.int64),
        "odd": np.arange(3, dtype=np.uint8),
    }
    checkpoint.save(path, tensors, {"format": "pt"})
    return path, tensors


@pytest.mark.parametrize("weight_format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("method", ["amax", "mse"])
def test_quantize_a_file(run, tmp_path, source, weight_format, method):
    path, tensors = source
    dst = tmp_path / "out.safetensors"
    code, out, err = run("quantize", path, dst, "--format", weight_format, "--method", method)
    assert (code, out) == (0, "")
    assert f"3 tensors in {weight_format}, 4 copied" in err
    quantize = jax.jit(lambda x: jaxmoe.quantize(x, weight_format, method=method))
    loaded = checkpoint.load(dst)  # verifies the checksum
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if re.search(r"gate_up_proj$|down_proj$|up_proj.weight$", name):
            expected = quantize(jnp.asarray(tensor))
            assert loaded[name].format is expected.format
            for a, b in zip(
                loaded[name].tensors().values(), expected.tensors().values(), strict=True
            ):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
        elif tensor.dtype != np.int64:  # JAX reads that as int32
            np.testing.assert_array_equal(np.asarray(loaded[name]), tensor, strict=True)
    assert int(loaded["step"]) == 7
    assert checkpoint.read_metadata(dst)["format"] == "pt"


def test_quantized_files_open_in_safetensors(run, tmp_path, source):
    safetensors = pytest.importorskip("safetensors", reason="needs the hf extra")
    dst = tmp_path / "out.safetensors"
    run("quantize", source[0], dst, "--format", "nvfp4")
    with safetensors.safe_open(dst, "np") as file:
        data = file.get_tensor("layers.0.mlp.experts.gate_up_proj.data")
    assert (data.dtype, data.shape) == (np.uint8, (3, 64, 16))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", True),
        ("model.layers.0.mlp.experts.17.gate_proj.weight", True),
        ("model.layers.0.mlp.experts.17.up_proj.weight", True),
        ("model.layers.0.block_sparse_moe.experts.3.w2.weight", True),
        ("layers.0.moe.gate_up", True),
        ("layers.0.moe.down", True),
        ("model.layers.0.mlp.down_proj.weight", True),
        ("model.layers.0.mlp.gate.weight", False),  # a router
        ("model.layers.0.block_sparse_moe.gate.weight", False),  # a router
        ("model.layers.0.mlp.router.weight", False),
        ("layers.0.moe.router", False),
        ("layers.0.moe.gate_up_bias", False),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", False),
        ("model.layers.0.self_attn.q_proj.weight", False),
        ("model.embed_tokens.weight", False),
    ],
)
def test_the_default_choice_of_tensors(name, wanted):
    assert (re.search(_quantize.INCLUDE, name) is not None) == wanted


def test_quantize_with_include(run, tmp_path, source):
    dst = tmp_path / "out.safetensors"
    code, _, err = run("quantize", source[0], dst, "--format", "nvfp4", "--include", "down_proj$")
    assert code == 0
    assert "1 tensors in nvfp4, 6 copied" in err
    assert isinstance(checkpoint.load(dst)["layers.0.mlp.experts.gate_up_proj"], jnp.ndarray)


def test_quantize_twice_keeps_what_was_quantised(run, tmp_path, source):
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    run("quantize", source[0], first, "--format", "nvfp4", "--include", "down_proj$")
    code, _, _ = run("quantize", first, second, "--format", "mxfp4", "--include", "gate_up_proj$")
    assert code == 0
    loaded = checkpoint.load(second)
    assert loaded["layers.0.mlp.experts.down_proj"].format.name == "nvfp4"
    assert loaded["layers.0.mlp.experts.gate_up_proj"].format.name == "mxfp4"


def _files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_quantize_a_folder(run, tmp_path, source):
    src, dst = tmp_path / "src", tmp_path / "dst"
    (src / "more").mkdir(parents=True)
    path, tensors = source
    path.rename(src / "a.safetensors")
    checkpoint.save(src / "more" / "b.safetensors", {"moe.down": _random(2, 4, 32)})
    (src / "config.json").write_text('{"a": 1}')
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(tensors, "a.safetensors"),
    }
    (src / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run("quantize", src, dst, "--format", "mxfp4")[0] == 0
    assert _files(dst) == _files(src)
    assert (dst / "config.json").read_text() == '{"a": 1}'
    assert checkpoint.load(dst / "more" / "b.safetensors")["moe.down"].format.name == "mxfp4"
    index = json.loads((dst / "model.safetensors.index.json").read_text())
    stored, total = set(), 0
    for file in dst.rglob("*.safetensors"):
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        total += len(raw) - 8 - length
        if file.name == "a.safetensors":
            stored = set(json.loads(raw[8 : 8 + length])) - {"__metadata__"}
    assert index["weight_map"].keys() == stored
    assert index["metadata"]["total_size"] == total


def test_quantize_refuses_to_overwrite(run, tmp_path, source):
    dst = tmp_path / "out.safetensors"
    dst.write_text("precious")
    code, _, err = run("quantize", source[0], dst, "--format", "nvfp4")
    assert code == 2
    assert "exists; pass --force to replace it" in plain(err)
    assert dst.read_text() == "precious"
    assert run("quantize", source[0], dst, "--format", "nvfp4", "--force")[0] == 0
    checkpoint.load(dst)


def test_quantize_force_replaces_a_folder_of_weights_alone(run, tmp_path, source):
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    source[0].rename(src / "a.safetensors")
    dst.mkdir()
    (dst / "letters.txt").write_text("precious")
    code, _, err = run("quantize", src, dst, "--format", "nvfp4", "--force")
    assert code == 2
    assert "holds no safetensors file" in plain(err)
    (dst / "old.safetensors").write_text("weights")
    assert run("quantize", src, dst, "--format", "nvfp4", "--force")[0] == 0
    assert _files(dst) == ["a.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


@pytest.mark.parametrize("where", [".", "inner", ".."])
def test_quantize_refuses_folders_within_each_other(run, tmp_path, source, where):
    src = tmp_path / "a" / "src"
    src.mkdir(parents=True)
    source[0].rename(src / "a.safetensors")
    code, _, err = run("quantize", src, src / where, "--format", "nvfp4", "--force")
    assert code == 2
    assert "must not contain each other" in plain(err)
    assert _files(src) == ["a.safetensors"]


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_quantize_a_truncated_file(run, tmp_path, source, kept):
    path, _ = source
    path.write_bytes(path.read_bytes()[:kept])
    dst = tmp_path / "out.safetensors"
    code, _, err = run("quantize", path, dst, "--format", "nvfp4")
    assert code == 1
    assert err.startswith(f"jaxmoe: error: {path}: truncated safetensors file")
    assert len(err.splitlines()) == 1
    assert not dst.exists()


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (np.zeros((4, 40), np.float32), "its last axis must be a multiple of 16"),
        (np.full((4, 32), np.inf, np.float32), "has values that are not finite"),
        (np.full((4, 32), 1e300), "has values that are not finite"),
        (np.zeros((2, 2, 4, 32), np.float32), "none of 1 tensors"),
        (np.zeros((4, 32), np.int8), "none of 1 tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_quantize_tensors_that_it_cannot(run, tmp_path, tensor, complaint):
    path, dst = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    checkpoint.save(path, {"mlp.up": tensor})
    code, _, err = run("quantize", path, dst, "--format", "nvfp4")
    assert code == 1
    assert complaint in err
    assert _files(tmp_path) == ["in.safetensors"]


@pytest.fixture
def full_disk(monkeypatch):
    """The disk is full after two matrices; returns what makes room again."""
    quantize_matrix, calls = _quantize_write._quantize_matrix, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError("no space left on device")
        return quantize_matrix(*args)

    monkeypatch.setattr(_quantize_write, "_quantize_matrix", fails)
    return lambda: monkeypatch.setattr(_quantize_write, "_quantize_matrix", quantize_matrix)


@pytest.mark.usefixtures("full_disk")
def test_an_interrupted_quantize_of_a_file_leaves_nothing(run, tmp_path, source):
    before = _files(tmp_path)
    code, _, err = run("quantize", source[0], tmp_path / "dst", "--format", "nvfp4")
    assert (code, err) == (1, "jaxmoe: error: no space left on device\n")
    assert _files(tmp_path) == before


def test_an_interrupted_quantize_of_a_folder_goes_on(run, tmp_path, source, full_disk):
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    checkpoint.save(src / "0.safetensors", {"moe.down": _random(1, 4, 32)})
    source[0].rename(src / "1.safetensors")
    (src / "config.json").write_text("{}")
    code, _, err = run("quantize", src, dst, "--format", "nvfp4")
    assert (code, err) == (1, "jaxmoe: error: no space left on device\n")
    assert not dst.exists()
    partial = tmp_path / ".dst.partial"
    assert _files(partial) == ["0.safetensors", "job.json"]  # without config.json, no checkpoint
    full_disk()
    written = (partial / "0.safetensors").stat().st_ino
    code, _, err = run("quantize", src, dst, "--format", "nvfp4")
    assert code == 0
    assert "1 of 2 files were there from before" in plain(err)
    assert (dst / "0.safetensors").stat().st_ino == written
    assert _files(dst) == _files(src)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]


def test_an_interrupted_quantize_of_another_job_is_thrown_away(run, tmp_path, source, full_disk):
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir()
    checkpoint.save(src / "0.safetensors", {"moe.down": _random(1, 4, 32)})
    source[0].rename(src / "1.safetensors")
    run("quantize", src, dst, "--format", "nvfp4")
    full_disk()
    code, _, err = run("quantize", src, dst, "--format", "mxfp4")
    assert (code, "from before" in err) == (0, False)
    assert checkpoint.load(dst / "0.safetensors")["moe.down"].format.name == "mxfp4"


# --- generate -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    pytest.importorskip("flax", reason="needs the flax extra")
    from flax import nnx

    from jaxmoe import models, nn

    config = models.DecoderConfig(
        hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16,
        intermediate_size=32, num_experts=4, top_k=2, max_length=96,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model") / "m"
    model = models.Decoder(config, rngs=nnx.Rngs(0))
    for name in ("nvfp4", "mxfp4"):
        models.save(nn.quantize(model, name), folder)
    return folder


@pytest.mark.parametrize("weight_format", ["nvfp4", "mxfp4"])
def test_generate_writes_text_alone_to_stdout(run, model_folder, weight_format):
    arguments = (
        *("generate", "def f(", "--model", model_folder, "--format", weight_format),
        *("--max-new-tokens", 30, "--implementation", "xla", "--temperature", 1.0),
    )
    code, out, err = run(*arguments)
    assert code == 0
    assert out.startswith("def f(")
    assert len(out) > len("def f(\n")
    assert "kernel: xla (w4a16), as requested" in err
    assert "tokens/s" in err or "too short" in err
    assert run(*arguments)[1] == out
    assert run(*arguments, "--seed", 1)[1] != out


def test_generate_runs_the_best_kernel_and_says_why(run, model_folder):
    code, out, err = run("generate", "--model", model_folder, "--max-new-tokens", 9)
    assert code == 0
    assert out.startswith(_generate.PROMPT)
    assert re.search(r"kernel: \w+ \(w4a16\), the best that can run here", err)


@pytest.fixture(scope="module")
def pretrained_folder(tmp_path_factory):
    """A tiny Qwen3-MoE checkpoint as on Hugging Face, with a tokenizer."""
    pytest.importorskip("flax", reason="needs the flax extra")
    source = Path(__file__).parent / "data" / "models" / "qwen3_moe"
    folder = tmp_path_factory.mktemp("hf") / "m"
    template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    write_tokenizer(folder, vocab_size=48, template=template)
    for path in source.iterdir():
        shutil.copy(path, folder)
    return folder


def test_generate_from_a_hugging_face_folder(run, pretrained_folder):
    arguments = ("generate", pretrained_folder, "AB", "--max-new-tokens", 20, "--batch", 3)
    code, answer, err = run(*arguments)
    assert code == 0
    assert "new tokens; read in" in err
    assert "layers 0, 2: kernel: xla" in err
    code, raw, err = run(*arguments, "--raw", "--format", "nvfp4", "--implementation", "xla")
    assert code == 0
    assert raw.startswith("AB")
    assert "layers 0, 2: kernel: xla (w4a16), as requested" in err
    assert answer != raw


def test_generate_takes_one_prompt(run, pretrained_folder, tmp_path):
    code, _, err = run("generate", pretrained_folder, "A", "B")
    assert code == 2
    assert "must be one argument, got 2" in plain(err)
    shutil.copytree(pretrained_folder, tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").unlink()
    code, _, err = run("generate", tmp_path / "m", "A")
    assert code == 1
    assert "tokenizer.json: missing" in err


def test_generate_text_that_does_not_fit(run, model_folder):
    code, out, err = run("generate", "x" * 90, "--model", model_folder, "--max-new-tokens", 50)
    assert (code, out) == (2, "")
    assert "must fit into 96 tokens" in plain(err)


def test_generate_without_a_model(run, tmp_path):
    code, _, err = run("generate", "--model", tmp_path / "none")
    assert code == 1
    assert "there is no model" in err
    code, _, err = run("generate", "--model", tmp_path)
    assert code == 1
    assert "config.json: cannot be opened" in err


def test_generate_with_a_kernel_of_another_machine(run, model_folder):
    code, out, err = run("generate", "--model", model_folder, "--implementation", "sm90_w4a16")
    assert (code, out) == (1, "")
    assert "requires platform cuda" in err


def test_rates_separate_prefill_from_decode():
    clock = _generate.Clock(start=10.0)
    # Prefill of 2 s, then 8 tokens every second.
    clock.arrivals = [(13.0, 8), (14.0, 8), (15.0, 8)]
    assert clock.rates(100) == (50.0, 8.0)
    clock.arrivals = clock.arrivals[:1]
    assert clock.rates(100) == (None, None)


def test_layers_of_one_kernel_are_named_together():
    assert _model._ranges([0, 2, 3, 4, 7, 8]) == "0, 2-4, 7-8"


# --- bench --------------------------------------------------------------------------------------


def test_bench_prints_a_table_and_adds_rows(run, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_machine", lambda: MACHINE)
    path = tmp_path / "rows.json"
    arguments = (
        *("bench", "--layer", "tiny", "--tokens", "1,3", "--seconds", 0.02, "--json", path),
        *("--implementation", "xla", "--implementation", "ragged_dot"),
        *("--implementation", "sm90_w4a16", "--format", "nvfp4", "--format", "mxfp4"),
    )
    code, out, _ = run(*arguments)
    assert code == 0
    assert "test machine: reads 10.0 GB/s" in out
    assert "faster than ragged_dot" in plain(out)
    assert "sm90_w4a16 not measured at T = 1, 3: requires platform cuda" in out
    rows = json.loads(path.read_text())
    assert [(r["format"], r["T"], r["implementation"]) for r in rows] == [
        (f, t, i) for f in ("nvfp4", "mxfp4") for t in (1, 3) for i in ("xla", "ragged_dot")
    ]
    assert all(r["layer"] == "tiny" and r["error"] < 1e-2 for r in rows)
    assert {r["mode"] for r in rows} == {"dispatch"}


def test_bench_beyond_the_memory_limit(run, monkeypatch):
    monkeypatch.setattr(benchmark, "measure_machine", lambda: MACHINE)
    code, _, err = run("bench", "--layer", "mixtral-8x7b", "--memory", 0.5)
    assert code == 1
    assert "GiB are allowed" in err


def test_bench_does_not_measure_for_a_file_that_cannot_take_rows(run, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("not JSON")
    code, _, err = run("bench", "--layer", "tiny", "--json", path)
    assert code == 2
    assert "not JSON" in plain(err)


# --- tune ---------------------------------------------------------------------------------------


def test_tune_where_there_are_no_tactics(run, tmp_path):
    path = tmp_path / "table.json"
    asked = ("--layer", "tiny", "--tokens", "1,64", "--implementation", "xla", "--json", path)
    code, out, err = run("tune", *asked)
    assert code == 1
    assert out == ""
    assert re.match(r"jaxmoe: error: xla, which runs nvfp4 weights on cpu, has no tactics", err)
    assert "The variants of the native libraries have tactics" in err
    assert not path.exists()


def test_tune_measures_this_machines_cpu(run, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    asked = ("--layer", "tiny", "--tokens", "1,64", "--implementation", "cpu", "--seconds", 0.01)
    code, out, _ = run("tune", *asked, "--json", path)
    assert code == 0
    assert re.search(r"\b1 .*stream [\d.,]+, tiles [\d.,]+", plain(out))
    assert f"recorded in {path}" in plain(out)
    entries = json.loads(path.read_text())["entries"]
    assert [entry["tokens"] for entry in entries] == [1, 64]
    monkeypatch.setenv("JAXMOE_TUNING_CACHE", str(path))
    sizes = ("--layer", "tiny", "--tokens", 64, "--implementation", "cpu")
    code, out, _ = run("explain", *sizes)
    assert f"tactic {entries[1]['tactic'] or 'default'}: tuned by {path}" in plain(out)


def test_tune_does_not_measure_for_a_file_that_cannot_take_entries(run, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    path.write_text("[]")
    code, _, err = run("tune", "--layer", "tiny", "--json", path)
    assert code == 2
    assert "--json" in err
    assert "is not a tuning table" in plain(err)
    monkeypatch.setenv("JAXMOE_TUNING_CACHE", str(path))
    code, _, err = run("tune", "--layer", "tiny")
    assert code == 2
    assert "JAXMOE_TUNING_CACHE" in err


def test_tune_prints_the_winners_and_what_was_left_out(run, tmp_path, monkeypatch):
    tuned = []

    def tune(layer, weight_format, tokens, *, report, **kwargs):
        tuned.append((layer.name, weight_format, tokens, kwargs["path"]))
        problem = jaxmoe.Problem(
            weight_format=weight_format,
            hidden_size=layer.hidden_size,
            intermediate_size=layer.intermediate_size,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
        )
        key = tuning.Key.of(jaxmoe.explain(problem, "xla"))
        seconds = {"": 10e-6, "wide": 8e-6}
        found = [
            tuning.Tuned(key.at(1), "wide", seconds, {"narrow": "too many rows"}),
            tuning.Tuned(key.at(64), "", {"": 20e-6}, {"narrow": "too many rows"}),
        ]
        for result in found:
            report(result)
        return found

    monkeypatch.setattr(_tune, "tune", tune)
    path = tmp_path / "table.json"
    code, out, _ = run("tune", "--layer", "all", "--tokens", "1,64", "--json", path)
    assert code == 0
    assert tuned == [(name, "nvfp4", [1, 64], path) for name in benchmark.LAYERS]
    text = plain(out)
    assert "1 wide 8.0 10.0 20.0% wide 8.0" in text
    assert "64 library's own 20.0 20.0" in text
    assert "narrow left out at T = 1, 64: too many rows" in out
    assert f"recorded in {path}" in out


def test_explain_with_tokens_names_the_tactic(run, monkeypatch):
    choice = tuning.Choice("wide", "tuned by a table")
    monkeypatch.setattr(kernels, "_choice", lambda key: choice)
    code, out, _ = run("explain", "--tokens", 64)
    assert code == 0
    assert "tactic wide: tuned by a table" in out
    code, out, _ = run("explain", "--tokens", 64, "--json")
    (resolution,) = json.loads(out)
    assert (resolution["tactic"], resolution["problem"]["tokens"]) == ("wide", 64)
    code, out, _ = run("explain")
    assert "tactic" not in out.splitlines()[2]
