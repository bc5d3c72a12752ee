"""What refuses a wrong build: CUTLASS too old or changed, a generic target, too large a tile, code
that lacks its instructions, families that do not exist, kernels that the table does not have."""

import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest

from jaxmoe.capability import TABLE
from jaxmoe.capability.table import ACTIVATIONS

ROOT = pathlib.Path(__file__).parent.parent
CUTLASS = os.environ.get("CUTLASS_PATH")
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
    for name in (
        "cute/config.hpp",
        "cute/arch/mma_sm120.hpp",
        "cute/arch/copy_sm100.hpp",
        "cute/arch/tmem_allocator_sm100.hpp",
    ):
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


@pytest.mark.skipif(NVCC is None or not CUTLASS, reason="needs nvcc and CUTLASS_PATH")
def test_a_tile_over_the_limit_of_shared_memory_is_refused(tmp_path):
    source = tmp_path / "tactic.cu"
    source.write_text(
        '#include "sm120/config.cuh"\n'
        "using namespace jaxmoe::blackwell;\n"
        "struct Config : Sm120<Format::kNvfp4, 256, 256> {\n"
        '  static constexpr const char* kName = "n256";\n'
        "};\n"
        "extern const Tactic kTactic = GroupedGemm<Config>::kTactic;\n"
    )
    result = run(
        NVCC, "-c", "-std=c++17", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}",
        f"-isystem={CUTLASS}/include", "-gencode=arch=compute_120f,code=sm_120f", source,
        "-o", tmp_path / "tactic.o",
    )  # fmt: skip
    assert result.returncode != 0
    message = "the tile is too large: two stages of it, and the results, exceed the shared memory"
    assert message in result.stdout + result.stderr


PRODUCT = "MainloopSm120ArrayTmaWarpSpecialized_float_{}_t"
GOOD = f"""
Fatbin elf code:
================
arch = sm_120f
code version = [1,8]

\tcode for sm_120
\t\tFunction : {PRODUCT.format("ue8m0")}
\tQMMA.SF.16832.F32.E2M1.E4M3.E8 R0 ;
\tACQBULK ;
\t\tFunction : {PRODUCT.format("ue4m3")}
\tOMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X R0 ;
\tACQBULK ;
"""


def check_code(family, dump):
    return runpy.run_path(str(ROOT / ".ci/check_sass.py"))["check"](family, dump)[1]


@pytest.mark.parametrize(
    ("dump", "complaint"),
    [
        (GOOD, None),
        (GOOD.replace("OMMA.SF.16864", "HMMA"), "no OMMA.SF"),
        (GOOD.replace("QMMA.SF.16832", "HMMA"), "no QMMA.SF"),
        (GOOD.replace("ACQBULK", "NOP"), "no ACQBULK"),
        (GOOD + "\tSTL [R1], R2 ;\n", "local memory"),
        (GOOD.replace("sm_120f", "sm_120"), "code for sm_120, where sm_120f belong"),
        (GOOD + "Fatbin elf code:\narch = sm_90a\n", "code for sm_90a, where sm_120f belong"),
        (GOOD + "Fatbin ptx code:\narch = sm_120f\n", "PTX"),
        (GOOD.replace("ue4m3", "other"), "no code: sm_120f MainloopSm120Array.*float_ue4m3_t"),
        (GOOD.replace("ue8m0", "other"), "no code: sm_120f MainloopSm120Array.*float_ue8m0_t"),
    ],
)
def test_machine_code_is_checked(dump, complaint):
    wrong = check_code("sm120", dump)
    if complaint is None:
        assert wrong == []
    else:
        assert any(complaint in w for w in wrong), wrong


def test_a_library_for_many_sms_lacks_none_of_them():
    section = "Fatbin elf code:\narch = {}\n\t\tFunction : mma_kernel\n\tHMMA.16816.F32 R0 ;\n"
    dump = "".join(section.format(target) for target in ("sm_80", "sm_90", "sm_120"))
    assert check_code("sm80", dump) == ["no code: sm_100 mma_kernel"]
    assert check_code("sm80", dump + section.format("sm_100")) == []


def test_emulation_may_use_local_memory_and_only_hopper():
    emulated = GOOD.replace("sm_120f", "sm_90a") + "\tSTL ;\n"
    emulated = emulated.replace("OMMA.SF.16864", "HMMA").replace("QMMA.SF.16832", "HMMA")
    assert check_code("sm120_emulated", emulated) == []
    assert check_code("sm120_emulated", GOOD) != []


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


# --- kernels and tables ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sm100", "sm120"])
def test_every_tactic_of_a_family_is_a_unit_and_the_other_way_round(family):
    def names(text):
        return set(re.findall(r"\bkSm\d+\w+", text))

    listed = (ROOT / f"csrc/{family}/tactics.cc").read_text()
    declared, _, array = listed.partition("kTactics[] =")
    units = [path.read_text() for path in (ROOT / f"csrc/{family}").glob("tactic_*.cu")]
    defined = set().union(*map(names, units))
    assert len(defined) == len(units)
    assert names(declared) == names(array) == defined


def built(tmp_path, change=lambda variants: None, extra=""):
    """Checks a stand-in for the library sm120 whose manifest was changed."""
    variants = {
        row.variant: {
            "formats": sorted(row.weight_formats),
            "layout": row.layout,
            "smem_bytes": row.smem_bytes,
            "sms": sorted(row.sms),
        }
        for row in TABLE
        if row.family == "sm120" and row.never is None
    }
    change(variants)
    manifest = {"library": "sm120", "variants": variants, "activations": sorted(ACTIVATIONS)}
    library = tmp_path / "_sm120.py"
    library.write_text(f"{extra}\ndef manifest():\n    return {manifest!r}\n")
    return lambda *options: run(
        sys.executable, ROOT / "csrc/bindings/check_manifest.py", library, *options
    )


def test_a_library_that_agrees_with_the_table_is_taken(tmp_path):
    result = built(tmp_path)()
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda v: v.pop("sm120_w4a8"),
            "sm120_w4a8: in the table, but the library has no such kernel",
        ),
        (
            lambda v: v.update(sm120_w4a16=v["sm120_w4a4"]),
            "sm120_w4a16: in the library, but the table has no such row",
        ),
        (
            lambda v: v["sm120_w4a4"].update(smem_bytes=102400),
            "sm120_w4a4: smem_bytes: 102400 in the library, 97280 in the table",
        ),
        (
            lambda v: v["sm120_w4a4"].update(sms=[120]),
            "sm120_w4a4: sms: [120] in the library, [120, 121] in the table",
        ),
    ],
)
def test_a_build_that_differs_from_the_table_fails(tmp_path, change, complaint):
    result = built(tmp_path, change)()
    assert result.returncode == 1
    assert "_sm120 and the capability table" in result.stderr
    assert complaint in result.stderr


def test_a_build_of_few_kernels_may_take_less_shared_memory(tmp_path):
    check = built(tmp_path, lambda v: v["sm120_w4a4"].update(smem_bytes=1024))
    assert check().returncode == 1
    assert check("--few").returncode == 0


def test_a_library_that_lacks_a_symbol_fails_the_build(tmp_path):
    result = built(tmp_path, extra='raise ImportError("undefined symbol: kSm120Nvfp4N32")')()
    assert result.returncode == 1
    assert "_sm120 cannot be loaded: undefined symbol: kSm120Nvfp4N32" in result.stderr
