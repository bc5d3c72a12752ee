"""Checks the machine code of a GPU library: matrix instructions there, local memory nowhere.

    python .ci/check_sass.py sm90 build/_sm90.so

Needs `cuobjdump` on PATH or in the package nvidia-cuda-cuobjdump.
"""

import contextlib
import importlib.metadata
import re
import shutil
import subprocess
import sys

# By family: the targets that it holds code for, and what a kernel's code must contain, by a part of
# its mangled name.
FAMILIES = {
    "sm80": ({"sm_80", "sm_90", "sm_100", "sm_120"}, {"mma_kernel": "HMMA"}),
    "sm90": (
        {"sm_90a"},
        {"gemm_kernel": "HGMMA", "decode_kernel": "HMMA", "fused_kernel": "HMMA"},
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


def check(dump: str, family: str) -> tuple[dict[str, int], list[str]]:
    """How many kernels there are of each kind and target, and what is wrong."""
    targets, required = FAMILIES[family]
    counted = {f"{target} {part}": 0 for target in sorted(targets) for part in required}
    wrong = []
    for section in re.split(r"(?m)^\s*code for ", dump)[1:]:
        target, _, functions = section.partition("\n")
        target = target.strip()
        if target not in targets:
            wrong.append(f"code for {target}, where {', '.join(sorted(targets))} belong")
            continue
        for function in functions.split("Function : ")[1:]:
            name, _, code = function.partition("\n")
            for part, instruction in required.items():
                if part not in name:
                    continue
                counted[f"{target} {part}"] += 1
                if instruction not in code:
                    wrong.append(f"{target} {name}: no {instruction}")
                if re.search(r"\b(LDL|STL)\b", code):
                    wrong.append(f"{target} {name}: local memory (LDL or STL)")
    wrong += [f"no code: {kind}" for kind, count in counted.items() if count == 0]
    if "Fatbin ptx code" in dump:
        wrong.append("PTX; only machine code belongs here")
    return counted, wrong


def main(family: str, library: str) -> None:
    dump = subprocess.run(
        [cuobjdump(), "-sass", "-ptx", library], check=True, capture_output=True, text=True
    ).stdout
    counted, wrong = check(dump, family)
    print(f"{library}: {counted}")
    if wrong:
        sys.exit("\n".join(f"{library}: {sentence}" for sentence in wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
