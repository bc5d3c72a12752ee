"""`jaxmoe doctor --evidence`: what it writes, and what it makes of kernels that fail."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")

import jaxmoe
from jaxmoe import benchmark, kernels
from jaxmoe.capability import TABLE
from jaxmoe.cli import _evidence, main
from jaxmoe.kernels import cpu, judge

ROWS = {row.variant: row for row in TABLE}
MACHINE = benchmark.Machine("a machine", "cpu", bandwidth=1e10, peak=1e11, cache_bytes=0)


@pytest.fixture
def short(monkeypatch):
    """Few rows, one case, short timings."""
    assert {row.variant for row in TABLE if row.never} & {
        r.variant for r in _evidence._ROWS
    } == set()
    rows = [ROWS[name] for name in ("sm120_w4a4", "cpu_portable", "xla_w4a4")]
    monkeypatch.setattr(_evidence, "_ROWS", rows)
    monkeypatch.setattr(_evidence, "CASES", (judge.TINY, dataclasses.replace(judge.TINY, tokens=0)))
    timed = dataclasses.replace(_evidence._ELSEWHERE, tokens=(1,), seconds=0.01)
    monkeypatch.setattr(_evidence, "_ELSEWHERE", timed)
    monkeypatch.setattr(benchmark, "measure_machine", lambda **kwargs: MACHINE)


def collect(tmp_path):
    """Runs the command; returns its exit code and what it wrote."""
    path = tmp_path / "evidence.json"
    code = 0
    try:
        main(["doctor", "--evidence", str(path)])
    except SystemExit as end:
        code = end.code or 0
    return code, json.loads(path.read_text()) if path.exists() else None


@pytest.mark.usefixtures("short")
def test_the_file_says_where_what_and_how_well(tmp_path, capsys):
    code, report = collect(tmp_path)
    assert code == 0
    assert report["passed"]
    assert report["schema"] == "jaxmoe.evidence/1"
    assert report["device"] == "a machine"
    assert report["versions"]["jaxmoe"] == jaxmoe.__version__
    assert {"date", "commit", "jax", "backend", "target", "driver"} <= report.keys()
    libraries = {library["family"]: library for library in report["libraries"]}
    assert set(libraries) == set(kernels.FAMILIES)
    assert libraries["cpu"]["build"] == cpu.library()[0].manifest()["build"]
    if kernels.FAMILIES["sm120"].library()[0] is None:
        assert libraries["sm120"]["build"] is None
        assert "jaxmoe._sm120" in libraries["sm120"]["why_not"]
    rows = {row["variant"]: row for row in report["rows"]}
    assert "requires" in rows["sm120_w4a4"]["unable"]
    for variant, formats in (("cpu_portable", ["mxfp4", "nvfp4"]), ("xla_w4a4", ["nvfp4"])):
        row = rows[variant]
        assert (row["unable"], row["failures"]) == ("", [])
        ways = [(r["format"], r["tactic"], r["compute"]) for r in row["numbers"] if r["tokens"]]
        assert ways == [
            (fmt, tactic, compute)
            for fmt in formats
            for compute in ROWS[variant].computes(fmt)
            for tactic in ("", *kernels.tactics(variant, compute))
        ]
        assert all(r["error"] <= r["allowed"] and not r["raised"] for r in row["numbers"])
        assert [t["format"] for t in row["timings"]] == formats
        assert all(t["us"] > 0 and t["T"] == 1 for t in row["timings"])
    assert "cpu_portable" in capsys.readouterr().out


def a_number():
    """Another one in every call, under jit too."""
    return jax.pure_callback(lambda: np.float32(next(COUNTER)), jax.ShapeDtypeStruct((), "f4"))


COUNTER = itertools.count(1)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda y: 1.1 * y, "a relative error of 1.0e-01 with"),
        (lambda y: y * np.nan, "a relative error of nan with"),
        (lambda y: y + a_number(), "two runs gave different bits"),
    ],
    ids=["wrong", "nan", "random"],
)
def test_wrong_numbers_fail_with_their_case(tmp_path, monkeypatch, spoil, words):
    right = kernels.implementation

    def implementation(variant):
        def run(*args, **attributes):
            y = right(variant)(*args, **attributes)
            return spoil(y).astype(y.dtype) if variant == "cpu_portable" else y

        return run

    monkeypatch.setattr(kernels, "implementation", implementation)
    code, report = collect(tmp_path)
    assert code == 1
    assert not report["passed"]
    rows = {row["variant"]: row for row in report["rows"]}
    failures = rows["cpu_portable"]["failures"]
    assert any(words in failure for failure in failures)
    assert all("mxfp4" in f or "nvfp4" in f for f in failures)
    assert "tactic default, tokens 5, num_experts 4" in failures[0]
    assert rows["xla_w4a4"]["failures"] == []


@pytest.mark.usefixtures("short")
def test_a_kernel_that_raises_is_written_down(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("the kernel is broken")

    monkeypatch.setattr(cpu, "moe_mlp", broken)
    monkeypatch.setattr(benchmark, "measure_layer", broken)
    code, report = collect(tmp_path)
    assert code == 1
    row = next(r for r in report["rows"] if r["variant"] == "cpu_portable")
    assert all(r["raised"] == "RuntimeError: the kernel is broken" for r in row["numbers"])
    assert all(r["error"] is None for r in row["numbers"])
    assert "timing nvfp4: RuntimeError: the kernel is broken" in row["failures"]


@pytest.mark.usefixtures("short")
def test_a_library_that_differs_from_the_table_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(_evidence, "check_manifest", lambda manifest, rows: ["cpu_x: no such row"])
    code, report = collect(tmp_path)
    assert code == 1
    cpu_library = next(x for x in report["libraries"] if x["family"] == "cpu")
    assert cpu_library["differences"] == ["cpu_x: no such row"]


def result(tactic="", raised="", error=1e-3):
    error = None if raised else error
    return {
        "format": "nvfp4", "compute": "w4a16", "tactic": tactic, **dataclasses.asdict(judge.TINY),
        "error": error, "allowed": judge.TOLERANCE, "raised": raised,
    }  # fmt: skip


def test_a_tactic_may_refuse_a_case_but_not_all():
    refused = result("fused", "ValueError: at most 8 tokens")
    assert _evidence._failures([result(), refused, result("fused")]) == []
    assert _evidence._failures([result(), refused]) == [
        "nvfp4, tactic fused: ValueError: at most 8 tokens"
    ]
    (failure,) = _evidence._failures([result(raised="ValueError: no")])
    assert failure.endswith("seed 0: ValueError: no")
    (failure,) = _evidence._failures([result("fused", error=0.5)])
    assert "tactic fused, tokens 5" in failure


@pytest.mark.usefixtures("short")
def test_an_impossible_file_is_refused_before_anything_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_evidence, "collect", lambda *a: pytest.fail("it ran"))
    for path in (tmp_path / "nowhere" / "evidence.json", tmp_path):
        with pytest.raises(SystemExit) as end:
            main(["doctor", "--evidence", str(path)])
        assert end.value.code == 2
        assert "--evidence" in capsys.readouterr().err


@pytest.mark.usefixtures("short")
def test_an_interrupted_run_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "evidence.json").write_text('{"old": true}')

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(_evidence, "_row", interrupt)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main(["doctor", "--evidence", str(tmp_path / "evidence.json")])
    assert json.loads((tmp_path / "evidence.json").read_text()) == {"old": True}
    assert [path.name for path in tmp_path.iterdir()] == ["evidence.json"]


@pytest.mark.parametrize("variant", ["xla_w4a4", "xla_w4a8", "xla", "sm90_w4a8"])
def test_the_judge_tells_right_numbers_from_those_of_other_arithmetic(variant):
    """With xla in a kernel's place: its own arithmetic passes, any other does not."""
    row = ROWS[variant]
    for weight_format in sorted(row.weight_formats & {"nvfp4", "mxfp4"}):
        for quantised in (None, "w4a4", "w4a8"):
            if weight_format == "nvfp4" and quantised == "w4a8":
                continue  # no kernel multiplies these

            def run(config, variant, *operands, quantised=quantised):
                return kernels.xla.moe_mlp(config, *operands, quantised=quantised)

            right = quantised == (row.computes(weight_format)[-1] if row.only_by_name else None)
            right &= variant != "sm90_w4a8"  # which rounds rows to e4m3 by a rule of its own
            off = judge.error(row, weight_format, judge.TINY, run)
            assert (judge.verdict(off, weight_format) == "") == right
            if right:
                assert off < 3e-3
    assert judge.verdict(float("nan"), "mxfp4") != ""
