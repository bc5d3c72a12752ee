"""Checks the machine code of a GPU library: what it is for, and the instructions that it must have.

    python .ci/check_sass.py build/_sm90.so

The products of each family must use the family's matrix instructions, none of a library's kernels
may use local memory, and there must be machine code alone, for the family's target. Needs
`cuobjdump` on PATH or in the package nvidia-cuda-cuobjdump.
"""

import contextlib
import importlib.metadata
import re
import shutil
import subprocess
import sys

# For each target: kernels by a pattern of their mangled names, and what their code must contain.
# ACQBULK is the wait for the kernel before, without which a product would read its arguments too
# early; LDTM reads tensor memory.
REQUIRED = {
    "sm_90a": {
        "gemm_kernel": ("HGMMA",),
        "decode_kernel": ("HMMA",),
        "fused_kernel": ("HMMA",),
    },
    "sm_100f": {
        "MainloopSm100Array.*float_ue4m3_t": ("UTCOMMA", "LDTM", "ACQBULK"),
        "MainloopSm100Array.*float_ue8m0_t": ("UTCQMMA", "LDTM", "ACQBULK"),
    },
    "sm_120f": {
        "MainloopSm120Array.*float_ue4m3_t": ("OMMA.SF", "ACQBULK"),
        "MainloopSm120Array.*float_ue8m0_t": ("QMMA.SF", "ACQBULK"),
    },
}
# Kernels around the products, which any SM could run.
OTHERS = "quantize_kernel|combine_kernel|arguments_kernel"


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nvidia-cuda-cuobjdump") or ():
            if file.name == "cuobjdump":
                return str(file.locate())
    sys.exit("cuobjdump was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def check(library: str, dump: str, few: bool) -> list[str]:
    """What is wrong with a library, of which `dump` is the machine code.

    A library of few kernels may lack some of its kinds.
    """
    targets = set(re.findall(r"^arch = (\w+)$", dump, re.M))
    if len(targets) != 1 or not targets <= REQUIRED.keys():
        return [f"{library}: is for {sorted(targets)}; it must be for one of {list(REQUIRED)}"]
    required = REQUIRED[targets.pop()]
    counted = dict.fromkeys(required, 0)
    wrong = []
    for function in dump.split("Function : ")[1:]:
        name, _, code = function.partition("\n")
        kinds = [kind for kind in required if re.search(kind, name)]
        for kind in kinds:
            counted[kind] += 1
            wrong += [f"{name}: no {i}" for i in required[kind] if i not in code]
        if (kinds or re.search(OTHERS, name)) and re.search(r"\b(LDL|STL)\b", code):
            wrong.append(f"{name}: local memory (LDL or STL)")
    if "PTX" in dump:
        wrong.append(f"{library}: holds PTX; only machine code belongs there")
    print(f"{library}: {counted}")
    if not (any if few else all)(counted.values()):
        wrong.append(f"{library}: a kind of kernel is missing")
    return wrong


def main(library: str, *options: str) -> None:
    dump = subprocess.run(
        [cuobjdump(), "-sass", library], check=True, capture_output=True, text=True
    ).stdout
    wrong = check(library, dump, few="--few" in options)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
