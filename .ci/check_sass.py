"""Checks the machine code of a GPU library: what it is for, and the instructions that it must have.

    python .ci/check_sass.py sm90 build/_sm90.so

The products of each family must use the family's matrix instructions, no product nor what runs
around it may use local memory, and there must be machine code alone, for the family's targets.
Needs `cuobjdump` on PATH or in the package nvidia-cuda-cuobjdump.
"""

import contextlib
import importlib.metadata
import re
import shutil
import subprocess
import sys

# By family: the targets that it holds code for, and what a kernel's code must contain, by a pattern
# of its mangled name. ACQBULK is the wait for the kernel before, without which a product would read
# its arguments too early; LDTM reads tensor memory.
FAMILIES = {
    "sm80": ({"sm_80", "sm_90", "sm_100", "sm_120"}, {"mma_kernel": ("HMMA",)}),
    "sm90": (
        {"sm_90a"},
        {
            "gemm_kernel": ("HGMMA",),
            "decode_kernel": ("HMMA",),
            "mma_kernel": ("HMMA",),
            "fused_kernel": ("HMMA",),
        },
    ),
    "sm100": (
        {"sm_100f"},
        {
            "MainloopSm100Array.*float_ue4m3_t": ("UTCOMMA", "LDTM", "ACQBULK"),
            "MainloopSm100Array.*float_ue8m0_t": ("UTCQMMA", "LDTM", "ACQBULK"),
        },
    ),
    "sm120": (
        {"sm_120f"},
        {
            "MainloopSm120Array.*float_ue4m3_t": ("OMMA.SF", "ACQBULK"),
            "MainloopSm120Array.*float_ue8m0_t": ("QMMA.SF", "ACQBULK"),
        },
    ),
}
# The same kernels with HMMA in place of their own instructions.
EMULATED = {
    f"{family}_emulated": ({"sm_90a"}, dict.fromkeys(FAMILIES[family][1], ("HMMA", "ACQBULK")))
    for family in ("sm100", "sm120")
}
# Kernels around the products, which any SM could run.
OTHERS = "quantize_kernel|combine_kernel|arguments_kernel"
# Of those, the kernels that divide as IEEE 754 says: a subroutine does it, around which registers
# go to local memory.
DIVIDING = "blackwell.*quantize_kernel"


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nvidia-cuda-cuobjdump") or ():
            if file.name == "cuobjdump":
                return str(file.locate())
    sys.exit("cuobjdump was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def check(family: str, dump: str) -> tuple[dict[str, int], list[str]]:
    """How many kernels there are of each target and kind, and what is wrong.

    Emulation may use local memory.
    """
    targets, required = (FAMILIES | EMULATED)[family]
    counted = {f"{target} {kind}": 0 for target in sorted(targets) for kind in required}
    wrong = []
    for section in re.split(r"(?m)^Fatbin ", dump)[1:]:
        if section.startswith("ptx"):
            wrong.append("PTX, where only machine code belongs")
            continue
        target = re.findall(r"(?m)^arch = (\w+)$", section)[0]
        if target not in targets:
            wrong.append(f"code for {target}, where {', '.join(sorted(targets))} belong")
            continue
        for function in section.split("Function : ")[1:]:
            name, _, code = function.partition("\n")
            kinds = [kind for kind in required if re.search(kind, name)]
            for kind in kinds:
                counted[f"{target} {kind}"] += 1
                wrong += [f"{target} {name}: no {i}" for i in required[kind] if i not in code]
            checked = kinds or (re.search(OTHERS, name) and not re.search(DIVIDING, name))
            local = checked and re.search(r"\b(LDL|STL)\b", code)
            if local and family not in EMULATED:
                wrong.append(f"{target} {name}: local memory (LDL or STL)")
    wrong += [f"no code: {kind}" for kind, count in counted.items() if count == 0]
    return counted, wrong


def main(family: str, library: str) -> None:
    dump = subprocess.run(
        [cuobjdump(), "-sass", "-ptx", library], check=True, capture_output=True, text=True
    ).stdout
    counted, wrong = check(family, dump)
    print(f"{library}: {counted}")
    if wrong:
        sys.exit("\n".join(f"{library}: {sentence}" for sentence in wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
