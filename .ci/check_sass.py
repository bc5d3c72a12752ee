"""Checks the machine code of the Hopper kernels: matrix instructions there, local memory nowhere.

    python .ci/check_sass.py build/_sm90.so

Needs `cuobjdump` on PATH or in the package nvidia-cuda-cuobjdump.
"""

import contextlib
import importlib.metadata
import re
import shutil
import subprocess
import sys

# What a kernel's code must contain, by a part of its mangled name.
REQUIRED = {"gemm_kernel": "HGMMA", "decode_kernel": "HMMA", "fused_kernel": "HMMA"}


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("nvidia-cuda-cuobjdump") or ():
            if file.name == "cuobjdump":
                return str(file.locate())
    sys.exit("cuobjdump was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")


def main(library: str) -> None:
    dump = subprocess.run(
        [cuobjdump(), "-sass", library], check=True, capture_output=True, text=True
    ).stdout
    counted = dict.fromkeys(REQUIRED, 0)
    wrong = []
    for function in dump.split("Function : ")[1:]:
        name, _, code = function.partition("\n")
        for part, instruction in REQUIRED.items():
            if part in name:
                counted[part] += 1
                if instruction not in code:
                    wrong.append(f"{name}: no {instruction}")
        if any(part in name for part in REQUIRED) and re.search(r"\b(LDL|STL)\b", code):
            wrong.append(f"{name}: local memory (LDL or STL)")
    if ".target sm_90a" in dump or "PTX" in dump:
        wrong.append(f"{library}: holds PTX; only machine code for sm_90a belongs there")
    print(f"{library}: {counted}")
    if wrong or not all(counted.values()):
        sys.exit("\n".join(wrong) or "a kind of kernel is missing")


if __name__ == "__main__":
    main(*sys.argv[1:])
