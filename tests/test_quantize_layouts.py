"""`jaxmoe quantize --layout` and `jaxmoe inspect`: other tools' layouts, whole or absent."""

import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import (
    CONFIG,
    FP8,
    GPT_OSS,
    MODELOPT,
    PREFIX,
    SHAPES,
    E,
    H,
    I,
    fp8,
    gpt_oss,
    modelopt,
    plain,
    write,
    write_shards,
)

import jaxmoe
from jaxmoe import checkpoint
from jaxmoe.checkpoint import open_folder
from jaxmoe.checkpoint._layouts import exclude_patterns

GATE, UP, DOWN = SHAPES


@pytest.fixture
def run(run):
    """As the shared one, with stderr in one line however it was wrapped."""

    def call(*args):
        code, out, err = run(*args)
        return code, out, " ".join(err.split())

    return call


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def bits(array):
    return np.asarray(array).reshape(-1).view(np.uint8)


def same(a, b):
    for name, leaf in a.tensors().items():
        np.testing.assert_array_equal(bits(leaf), bits(b.tensors()[name]))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("method", ["amax", "mse"])
@pytest.mark.parametrize(
    ("layout", "format"),
    [("modelopt", "nvfp4"), ("compressed-tensors", "nvfp4"), ("compressed-tensors", "mxfp4")],
)
def test_what_is_written_reads_as_what_jaxmoe_quantises(run, tmp_path, layout, format, method):
    tensors = plain()
    src = write(tmp_path / "src", tensors)
    (src / "tokenizer.json").write_text("{}")
    dst = tmp_path / "dst"
    code, out, err = run(
        *("quantize", src, dst, "--format", format, "--layout", layout, "--method", method)
    )
    assert (code, out) == (0, "")
    assert "12 tensors in" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]
    more = ["hf_quant_config.json"] if layout == "modelopt" else []
    assert files(dst) == sorted([*files(src), *more])
    with open_folder(dst) as folder:
        assert folder.scheme.method == layout
        assert folder.scheme.compute == "w4a16"
        loaded = folder.load_experts(PREFIX, num_experts=E)
        assert loaded.report is None  # gate and up share their scale
        for name, tensor in tensors.items():
            if PREFIX not in name:
                np.testing.assert_array_equal(bits(folder.tensor(name)), bits(tensor))
    for e in range(E):
        gate, up, down = (jnp.asarray(tensors[f"{PREFIX}.{e}.{n}.weight"]) for n in SHAPES)
        for found, matrix in (
            (loaded.weights.gate_up[e], jnp.concatenate([gate, up])),
            (loaded.weights.down[e], down),
        ):
            expected = jaxmoe.quantize(matrix, format, method=method)
            if layout == "compressed-tensors" and format == "nvfp4":
                # A scale that its reciprocal gives back exactly, next to the rule's.
                ratio = float(found.global_scale / expected.global_scale)
                assert abs(ratio - 1) <= 2.0**-22
                inverse = np.float32(1) / np.asarray(found.global_scale)
                assert np.float32(1) / inverse == found.global_scale
                expected = jaxmoe.quantize(
                    matrix, format, method=method, global_scale=found.global_scale
                )
            same(found, expected)


def test_input_scales(run, tmp_path):
    src = write(tmp_path / "src", plain())
    scales = tmp_path / "scales.json"
    exact = {f"{PREFIX}.1.{GATE}": 0.75, "*.down_proj": 0.5, "*.experts.*": 0.25}
    scales.write_text(json.dumps(exact))
    for layout in ("modelopt", "compressed-tensors"):
        dst = tmp_path / layout
        code, _, _ = run(
            *("quantize", src, dst, "--format", "nvfp4", "--layout", layout),
            *("--input-scales", scales),
        )
        assert code == 0
        with open_folder(dst) as folder:
            assert folder.scheme.compute == "w4a4"
            assert folder.input_scale(f"{PREFIX}.1.{GATE}") == 0.75
            assert folder.input_scale(f"{PREFIX}.2.{DOWN}") == 0.5
            loaded = folder.load_experts(PREFIX, num_experts=E)
        assert (loaded.weights.gate_up_input_scale, loaded.weights.down_input_scale) == (0.75, 0.5)
    for bad, complaint in (
        ({"a": 1}, "has none for"),
        ({"*": 0}, "finite and > 0"),
        ([], "object"),
    ):
        scales.write_text(json.dumps(bad))
        code, _, err = run(
            *("quantize", src, tmp_path / "bad", "--format", "nvfp4", "--layout", "modelopt"),
            *("--input-scales", scales),
        )
        assert (code, complaint in err) == (1, True), err
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--layout", "modelopt", "--format", "mxfp4"], "modelopt is for nvfp4, got mxfp4"),
        (["--layout", "gpt-oss", "--format", "nvfp4"], "gpt-oss is for mxfp4, got nvfp4"),
        (["--layout", "gguf", "--format", "nvfp4"], "gguf"),
        (
            ["--layout", "compressed-tensors", "--format", "mxfp4", "--input-scales", "{config}"],
            "stores no activation scales",
        ),
    ],
)
def test_arguments_that_do_not_fit(run, tmp_path, arguments, complaint):
    src = write(tmp_path / "src", plain())
    arguments = [a.format(config=src / "config.json") for a in arguments]
    code, _, err = run("quantize", src, tmp_path / "dst", *arguments)
    assert (code, complaint in err) == (2, True), err


def test_a_file_alone_has_no_layout_of_a_folder(run, tmp_path):
    src = write(tmp_path / "src", plain()) / "model.safetensors"
    arguments = ("--format", "nvfp4", "--layout", "modelopt")
    code, _, err = run("quantize", src, tmp_path / "dst.safetensors", *arguments)
    assert (code, "is for folders" in err) == (2, True)


def fused(model_type):
    r = np.random.default_rng(0)
    tensors = {
        f"{PREFIX}.gate_up_proj": r.standard_normal((E, H, 2 * I), np.float32),
        f"{PREFIX}.down_proj": r.standard_normal((E, I, H), np.float32),
        f"{PREFIX}.gate_up_proj_bias": r.standard_normal((E, 2 * I), np.float32),
        f"{PREFIX}.down_proj_bias": r.standard_normal((E, H), np.float32),
        "model.embed_tokens.weight": r.standard_normal((8, H), np.float32),
    }
    return tensors, {"model_type": model_type}


def test_gpt_oss(run, tmp_path):
    tensors, config = fused("gpt_oss")
    src, dst = write(tmp_path / "src", tensors, config=config), tmp_path / "dst"
    assert run("quantize", src, dst, "--format", "mxfp4", "--layout", "gpt-oss")[0] == 0
    assert config_of(dst)["quantization_config"]["quant_method"] == "mxfp4"
    with open_folder(src) as before, open_folder(dst) as after:
        assert after.entry(f"{PREFIX}.gate_up_proj_blocks").shape == (E, 2 * I, H // 32, 16)
        exact = before.experts(PREFIX, num_experts=E, dtype=np.float32)
        experts = after.experts(PREFIX, num_experts=E)
    same(experts.gate_up, jaxmoe.quantize(exact.gate_up, "mxfp4"))
    same(experts.down, jaxmoe.quantize(exact.down, "mxfp4"))
    np.testing.assert_array_equal(experts.gate_up_bias, exact.gate_up_bias)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_from_block_scaled_fp8(run, tmp_path, layout):
    """Experts go from FP8 to FP4 without a rounding to BF16 between; the rest becomes BF16."""
    tensors = fp8()
    q = "model.layers.0.self_attn.q_proj"
    tensors[f"{q}.weight"] = tensors[f"{PREFIX}.0.{UP}.weight"]
    tensors[f"{q}.weight_scale_inv"] = tensors[f"{PREFIX}.0.{UP}.weight_scale_inv"]
    src, dst = write(tmp_path / "src", tensors, FP8), tmp_path / "dst"
    code, _, err = run("quantize", src, dst, "--format", "nvfp4", "--layout", layout)
    assert (code, "12 tensors in nvfp4" in err) == (0, True), err
    with open_folder(src) as before, open_folder(dst) as after:
        assert after.scheme.method == layout
        assert not [name for name in after.names if name.endswith("_scale_inv")]
        np.testing.assert_array_equal(bits(after.tensor(f"{q}.weight")), bits(before.linear(q)))
        assert after.scheme.excludes(q)
        np.testing.assert_array_equal(
            bits(after.tensor("lm_head.weight")), bits(before.tensor("lm_head.weight"))
        )
        exact = before.experts(PREFIX, num_experts=E, dtype=np.float32)
        experts = after.experts(PREFIX, num_experts=E)
    for loaded, dense in ((experts.gate_up, exact.gate_up), (experts.down, exact.down)):
        same(loaded, jaxmoe.quantize(dense, "nvfp4", global_scale=loaded.global_scale))
        ratio = loaded.global_scale / jaxmoe.quantize(dense, "nvfp4").global_scale
        np.testing.assert_allclose(ratio, 1, rtol=2.0**-22)


def test_layouts_and_models_that_do_not_fit(run, tmp_path):
    tensors, config = fused("gpt_oss")
    src = write(tmp_path / "fused", tensors, config=config)
    other = write(tmp_path / "plain", plain())
    done = write(tmp_path / "done", modelopt(), MODELOPT)
    for source, arguments, complaint in (
        (src, "--format nvfp4 --layout modelopt", "cannot be stored in layout modelopt"),
        (src, "--format mxfp4", "stored transposed"),
        (other, "--format mxfp4 --layout gpt-oss", "is for models of type gpt_oss"),
        (done, "--format nvfp4 --layout modelopt", "is quantised already"),
        (other, "--format nvfp4 --layout modelopt --include nothing", "none of 16 tensors"),
    ):
        code, _, err = run("quantize", source, tmp_path / "dst", *arguments.split())
        assert (code, complaint in err) == (1, True), err
    assert not (tmp_path / "dst").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_gate_and_up_in_different_shards_share_a_scale(run, tmp_path, layout):
    src, dst, whole = (tmp_path / name for name in ("src", "dst", "whole"))
    write_shards(src, plain())
    one = write(tmp_path / "one", plain())
    for a, b in ((src, dst), (one, whole)):
        assert run("quantize", a, b, "--format", "nvfp4", "--layout", layout)[0] == 0
    with open_folder(dst) as a, open_folder(whole) as b:
        assert len(a.files) == 3
        assert a.names == b.names
        for name in a.names:
            np.testing.assert_array_equal(bits(a.tensor(name)), bits(b.tensor(name)))
    index = json.loads((dst / "model.safetensors.index.json").read_text())
    size = sum(p.stat().st_size for p in dst.glob("*.safetensors"))
    assert 0 < size - index["metadata"]["total_size"] < 30_000  # the headers


def test_files_outside_the_index_are_left_out_and_named(run, tmp_path):
    src = write_shards(tmp_path / "src", plain())
    checkpoint.save(src / "consolidated.safetensors", {"tok": np.zeros(3)})
    arguments = ("--format", "nvfp4", "--layout", "modelopt")
    code, _, err = run("quantize", src, tmp_path / "dst", *arguments)
    assert code == 0
    assert "left out, since no index names them: consolidated.safetensors" in err
    assert "consolidated.safetensors" not in files(tmp_path / "dst")


def test_what_is_excluded(run, tmp_path):
    src = write(tmp_path / "src", plain())
    for layout in ("modelopt", "compressed-tensors"):
        run("quantize", src, tmp_path / layout, "--format", "nvfp4", "--layout", layout)
    kept = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.self_attn.q_proj"]
    ignored = config_of(tmp_path / "compressed-tensors")["quantization_config"]["ignore"]
    assert ignored == kept
    separate = json.loads((tmp_path / "modelopt" / "hf_quant_config.json").read_text())
    patterns = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.self_attn*"]
    assert separate["quantization"]["exclude_modules"] == patterns
    with open_folder(tmp_path / "modelopt") as folder:
        assert all(folder.scheme.excludes(module) for module in kept)
        assert not folder.scheme.excludes(f"{PREFIX}.0.{UP}")


def test_exclude_patterns_never_match_what_is_quantised():
    quantised = ["model.layers.1.mlp.up", "model.layers.10.mlp.up", "model.layers.10.attn.q"]
    plain_ones = [
        "model.layers.1.attn.q",
        "model.layers.1.mlp.gate",
        "model.layers.2.attn.q",
        "head",
    ]
    patterns = exclude_patterns(plain_ones, quantised)
    assert patterns == [
        "head", "model.layers.1.attn*", "model.layers.1.mlp.gate", "model.layers.2*",
    ]  # fmt: skip
    assert exclude_patterns(["a.b.c"], ["a.bd.c"]) == ["a.b.*"]


def test_writing_is_checked(run, tmp_path, monkeypatch):
    src = write(tmp_path / "src", plain())
    pread = os.pread

    def rotten(descriptor, size, offset):
        block = bytearray(pread(descriptor, size, offset))
        block[-1] ^= 1
        return bytes(block)

    monkeypatch.setattr(os, "pread", rotten)
    arguments = ("--format", "nvfp4", "--layout", "modelopt")
    code, _, err = run("quantize", src, tmp_path / "dst", *arguments)
    assert (code, "is not on disk as it was written" in err) == (1, True)
    assert files(tmp_path) == files(tmp_path / "src") or not (tmp_path / "dst").exists()
    assert not list(tmp_path.glob(".*"))


def test_the_checksum_of_a_written_file_is_right(run, tmp_path):
    src = write(tmp_path / "src", plain())
    run("quantize", src, tmp_path / "dst", "--format", "mxfp4", "--layout", "compressed-tensors")
    checkpoint.load(tmp_path / "dst" / "model.safetensors")  # verifies it


KILLED = """
    import os, sys, time
    import jaxmoe.cli._quantize_write as write
    from jaxmoe.cli import main

    steps = 0

    def slowly(function):
        def call(*arguments, **options):
            global steps
            steps += 1
            if steps == int(sys.argv[1]):
                print("now", flush=True)
                time.sleep(60)
            return function(*arguments, **options)
        return call

    write._quantize_matrix = slowly(write._quantize_matrix)
    write._check_written = slowly(write._check_written)
    write._copy_rest = slowly(write._copy_rest)
    write._check_folder = slowly(write._check_folder)
    write._take_name = slowly(write._take_name)
    os.replace = slowly(os.replace)
    main(sys.argv[2:])
"""


# In a matrix, between a file's check and its name, in the last file, before and after config.json.
@pytest.mark.parametrize(
    ("layout", "step"),
    [("jaxmoe", 6), ("jaxmoe", 20), ("modelopt", 2), ("modelopt", 7), ("modelopt", 18)]
    + [("modelopt", step) for step in (20, 22, 24)],
)
def test_killed_at_any_point(run, tmp_path, layout, step):
    """kill -9 leaves no folder that looks complete, and the same command finishes it."""
    src, dst = write_shards(tmp_path / "src", plain()), tmp_path / "dst"
    arguments = ["quantize", src, dst, "--format", "nvfp4", "--layout", layout]
    code = "\n".join(line.removeprefix("    ") for line in KILLED.splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(step), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    reached = process.stdout.readline() == b"now\n"
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    assert reached or step > 20
    if reached:
        assert not dst.exists()
        partial = tmp_path / ".dst.partial"
        assert (partial / "job.json").exists() or (partial / "config.json").exists()
        assert run(*arguments)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dst", "src"]
    assert not [p for p in files(dst) if p.endswith((".tmp", "job.json"))]
    with open_folder(dst) as folder:
        experts = folder.experts(PREFIX, num_experts=E)
        assert experts.format.name == "nvfp4"
    for file in dst.glob("*.safetensors"):
        checkpoint.load(file)


# --- inspect --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "quantization", "config", "scheme", "weight"),
    [
        (plain, None, {}, None, ("BF16", [I, H])),
        (modelopt, MODELOPT, {}, "modelopt NVFP4", ("ModelOpt NVFP4", [I, H])),
        (fp8, FP8, {}, "fp8 FP8", ("block-scaled FP8", [I, H])),
        (
            gpt_oss, GPT_OSS, {"model_type": "gpt_oss"}, "mxfp4 MXFP4",
            ("gpt-oss MXFP4", [E, 2 * I, H]),
        ),
    ],
)  # fmt: skip
def test_inspect(run, tmp_path, make, quantization, config, scheme, weight):
    tensors = make()
    path = write(tmp_path, tensors, quantization, config)
    code, out, _ = run("inspect", path, "--json", "--deep")
    report = json.loads(out)
    assert code == 0
    assert report["problems"] == report["notes"] == []
    assert report["scheme"] == scheme
    assert report["model_type"] == {**CONFIG, **config}["model_type"]
    assert report["tensors"] == len(tensors)
    assert report["nbytes"] == sum(t.nbytes for t in tensors.values())
    assert sum(row["nbytes"] for row in report["weights"]) == report["nbytes"]
    name = "gate_up_proj" if make is gpt_oss else "*.gate_proj.weight"
    (row,) = (r for r in report["weights"] if r["name"].endswith(f"experts.{name}"))
    assert (row["format"], row["shape"]) == weight
    assert row["count"] == (1 if make is gpt_oss else E)
    code, out, _ = run("inspect", path)
    assert code == 0
    assert "No problems." in out
    assert weight[0] in out


def test_inspect_finds_problems(run, tmp_path):
    tensors = modelopt(lambda e, name: 2.0 if (e, name) == (1, UP) else 1.0)
    scale = tensors[f"{PREFIX}.3.{DOWN}.weight_scale"].view(np.uint8).copy()
    scale[0, 0] = 0x7F
    tensors[f"{PREFIX}.3.{DOWN}.weight_scale"] = scale.view(ml_dtypes.float8_e4m3fn)
    del tensors[f"{PREFIX}.0.{GATE}.weight_scale_2"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.ones((H, H), np.uint8)
    path = write(tmp_path, tensors, MODELOPT)
    code, out, _ = run("inspect", path, "--json")
    shallow = json.loads(out)
    assert code == 1
    assert len(shallow["problems"]) == 2
    assert any("0.gate_proj.weight_scale_2', which is missing" in p for p in shallow["problems"])
    assert any("k_proj" in p for p in shallow["problems"])
    code, out, _ = run("inspect", path, "--json", "--deep")
    deep = json.loads(out)
    assert (code, len(deep["problems"])) == (1, 3)
    assert any("3.down_proj.weight_scale' has 1 of" in p for p in deep["problems"])
    assert "1 modules" in deep["notes"][0]
    code, out, _ = run("inspect", path)
    assert (code, "2 problems." in out) == (1, True)
