"""What refuses a wrong build: CUTLASS too old or changed, a generic target, code that lacks its
instructions, families that do not exist."""

import pathlib
import runpy
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True)


def cutlass(folder: pathlib.Path, major: int, minor: int, patch: int) -> pathlib.Path:
    header = folder / "include/cutlass/version.h"
    header.parent.mkdir(parents=True)
    header.write_text(
        f"#define CUTLASS_MAJOR {major}\n#define CUTLASS_MINOR {minor}\n"
        f"#define CUTLASS_PATCH {patch}\n"
    )
    return folder


def find_cutlass(build: pathlib.Path, given: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, ROOT / "csrc/blackwell/cutlass.py", build, given)


@pytest.mark.parametrize("release", [(3, 9, 2), (4, 2, 0), (4, 4, 2)])
def test_cutlass_before_4_5_is_refused(tmp_path, release):
    result = find_cutlass(tmp_path, cutlass(tmp_path / "old", *release))
    assert result.returncode == 1
    assert "CUTLASS 4.5 or newer is required" in result.stderr
    assert ".".join(map(str, release)) in result.stderr
    assert "Leave CUTLASS_PATH empty" in result.stderr


def test_a_folder_that_is_not_cutlass_is_refused(tmp_path):
    result = find_cutlass(tmp_path, tmp_path)
    assert result.returncode == 1
    assert "CUTLASS_PATH must be a checkout of CUTLASS" in result.stderr


@pytest.mark.parametrize("release", [(4, 5, 0), (4, 7, 0), (5, 0, 0)])
def test_newer_cutlass_is_taken(tmp_path, release):
    root = cutlass(tmp_path / "new", *release)
    result = find_cutlass(tmp_path, root)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{root}/include;{root}/tools/util/include"


@pytest.mark.parametrize("family", ["sm100", "sm120"])
def test_the_overlay_refuses_headers_that_have_changed(tmp_path, family):
    overlay = ROOT / "csrc/emulation/overlay.py"
    main = runpy.run_path(str(overlay))["FAMILIES"][family]
    for name in ("cute/config.hpp", "cute/arch/mma_sm120.hpp"):
        header = tmp_path / name
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text("#pragma once\n")
    with pytest.raises(SystemExit, match=r"has 0 places that match(.|\n)*where 1 were expected"):
        main(tmp_path)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize(
    ("target", "accepted"), [("120", False), ("120f", True), ("100", False), ("100f", True)]
)
def test_a_generic_target_is_refused(tmp_path, target, accepted):
    source = tmp_path / "kernel.cu"
    source.write_text('#include "blackwell/target.cuh"\n__global__ void kernel() {}\n')
    gencode = f"-gencode=arch=compute_{target},code=sm_{target}"
    result = run(NVCC, "-c", f"-I{ROOT / 'csrc'}", gencode, source, "-o", tmp_path / "kernel.o")
    assert (result.returncode == 0) == accepted
    assert accepted or "need a family target" in result.stderr


PRODUCT = "MainloopSm120ArrayTmaWarpSpecialized_float_ue4m3_t"
GOOD = f"""
Fatbin elf code:
================
arch = sm_120f

\tcode for sm_120
\t\tFunction : {PRODUCT}
\tOMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X R0 ;
\tACQBULK ;
"""


@pytest.mark.parametrize(
    ("dump", "complaint"),
    [
        (GOOD, None),
        (GOOD.replace("OMMA.SF.16864", "HMMA"), "no OMMA.SF"),
        (GOOD.replace("ACQBULK", "NOP"), "no ACQBULK"),
        (GOOD + "\tSTL [R1], R2 ;\n", "local memory"),
        (GOOD.replace("sm_120f", "sm_120"), "code for sm_120, where sm_120f belong"),
        (GOOD + "arch = sm_90a\n", "code for sm_90a, where sm_120f belong"),
        (GOOD + "Fatbin ptx code:\n", "PTX"),
        (GOOD.replace("ue4m3", "other"), "no code"),
    ],
)
def test_machine_code_is_checked(dump, complaint):
    check = runpy.run_path(str(ROOT / ".ci/check_sass.py"))["check"]
    _, wrong = check(dump, "sm120", few=True)
    if complaint is None:
        assert wrong == []
    else:
        assert any(complaint in w for w in wrong), wrong


def test_a_library_lacks_no_kind_of_kernel():
    check = runpy.run_path(str(ROOT / ".ci/check_sass.py"))["check"]
    counted, wrong = check(GOOD, "sm120")
    assert list(counted.values()) == [1, 0, 0]
    assert len(wrong) == 2


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("JAXMOE_CUDA_FAMILIES=sm121", "'sm121' is not a family"),
        ("JAXMOE_CUDA_FAMILIES=sm90_emulated", "is not a family"),
        ("JAXMOE_EMULATE=sm90", "'sm90' cannot be emulated"),
    ],
)
def test_families_that_do_not_exist_are_refused(tmp_path, option, complaint):
    result = run("cmake", "-S", ROOT, "-B", tmp_path, f"-D{option}")
    assert result.returncode != 0
    assert complaint in " ".join(result.stderr.split())
