"""Checks the machine code of a GPU library: what it is for, and the instructions that it must have.

    python .ci/check_sass.py sm90 build/_sm90.so

The products of each family must use the family's matrix instructions, none of a library's kernels
may use local memory, and there must be machine code alone, for the family's targets. Needs
`cuobjdump` on PATH or in the package nvidia-cuda-cuobjdump.
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
        {"gemm_kernel": ("HGMMA",), "decode_kernel": ("HMMA",), "fused_kernel": ("HMMA",)},
    ),
    "sm100": (
        {"sm_100f"},
        {
            "MainloopSm100Array.*float_ue4m3_t": ("UTCOMMA", "LDTM", "ACQBULK"),
            "MainloopSm100Array.*float_ue8m0_t": ("UTCQMMA", "LDTM", "ACQBULK"),
            "quantize_kernel|combine_kernel|arguments_kernel": (),
        },
    ),
    "sm120": (
        {"sm_120f"},
        {
            "MainloopSm120Array.*float_ue4m3_t": ("OMMA.SF", "ACQBULK"),
            "MainloopSm120Array.*float_ue8m0_t": ("QMMA.SF", "ACQBULK"),
            "quantize_kernel|combine_kernel|arguments_kernel": (),
        },
    ),
}


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nvidia-cuda-cuobjdump") or ():
            if file.name == "cuobjdump":
                return str(file.locate())
    sys.exit("cuobjdump was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def check(dump: str, family: str, few: bool = False) -> tuple[dict[str, int], list[str]]:
    """How many kernels there are of each kind and target, and what is wrong.

    A library of few kernels may lack a kind of them.
    """
    targets, required = FAMILIES[family]
    counted = {f"{target} {kind}": 0 for target in sorted(targets) for kind in required}
    wrong = []
    for section in re.split(r"(?m)^arch = ", dump)[1:]:
        target, _, functions = section.partition("\n")
        target = target.strip()
        if target not in targets:
            wrong.append(f"code for {target}, where {', '.join(sorted(targets))} belong")
            continue
        for function in functions.split("Function : ")[1:]:
            name, _, code = function.partition("\n")
            for kind, instructions in required.items():
                if not re.search(kind, name):
                    continue
                counted[f"{target} {kind}"] += 1
                wrong += [f"{target} {name}: no {i}" for i in instructions if i not in code]
                if re.search(r"\b(LDL|STL)\b", code):
                    wrong.append(f"{target} {name}: local memory (LDL or STL)")
    missing = [f"no code: {kind}" for kind, count in counted.items() if count == 0]
    if not few or len(missing) == len(counted):
        wrong += missing
    if "Fatbin ptx code" in dump:
        wrong.append("PTX; only machine code belongs here")
    return counted, wrong


def main(family: str, library: str, *options: str) -> None:
    dump = subprocess.run(
        [cuobjdump(), "-sass", "-ptx", library], check=True, capture_output=True, text=True
    ).stdout
    counted, wrong = check(dump, family, few="--few" in options)
    print(f"{library}: {counted}")
    if wrong:
        sys.exit("\n".join(f"{library}: {sentence}" for sentence in wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
