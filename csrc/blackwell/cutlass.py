"""Finds the CUTLASS headers that the Blackwell kernels are built with, and prints their folders.

    python csrc/blackwell/cutlass.py BUILD [CUTLASS]

CUTLASS is a checkout of it; without one, the headers of release 4.5.0 are taken from the package
`flashinfer-python` on PyPI, once, into the folder BUILD. Releases before 4.5 are refused: in 4.2 a
grouped product may start before its arguments are there, and until 4.4 kernels for SM 120 ask for
more shared memory than there is.
"""

import pathlib
import re
import subprocess
import sys
import zipfile

OLDEST = (4, 5)
PACKAGE = "flashinfer-python==0.7.2.post1"
INSIDE = "flashinfer/data/cutlass/"
FOLDERS = ("include", "tools/util/include")


def download(build: pathlib.Path) -> pathlib.Path:
    """Takes the headers out of the package, unless that was done before."""
    root = build / "cutlass"
    done = root / "complete"
    if done.exists():
        return root
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(build), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(
            f"CUTLASS was not found and {PACKAGE}, which holds it, cannot be downloaded:\n"
            f"{result.stderr.strip()}\nSet CUTLASS_PATH to a checkout of CUTLASS 4.5 or newer."
        )
    for wheel in build.glob("flashinfer_python-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                name = member.filename.removeprefix(INSIDE)
                if name != member.filename and name.startswith(tuple(f"{f}/" for f in FOLDERS)):
                    member.filename = name
                    archive.extract(member, root)
        wheel.unlink()
    done.touch()
    return root


def check_release(root: pathlib.Path) -> None:
    header = root / "include/cutlass/version.h"
    if not header.exists():
        sys.exit(
            f"CUTLASS_PATH must be a checkout of CUTLASS; {root} has no include/cutlass/version.h"
        )
    parts = dict(re.findall(r"#define CUTLASS_(MAJOR|MINOR|PATCH) (\d+)", header.read_text()))
    release = tuple(int(parts[part]) for part in ("MAJOR", "MINOR", "PATCH"))
    if release < OLDEST:
        sys.exit(
            f"CUTLASS_PATH: CUTLASS 4.5 or newer is required, and {root} is "
            f"{'.'.join(map(str, release))}. Its grouped kernels may read arguments too early "
            "(before 4.3), or take more shared memory than SM 120 has (before 4.4). Leave "
            "CUTLASS_PATH empty to download 4.5.0."
        )


def main(build: str, given: str = "") -> None:
    root = pathlib.Path(given) if given else download(pathlib.Path(build))
    check_release(root)
    print(";".join(str((root / folder).resolve()) for folder in FOLDERS))


if __name__ == "__main__":
    main(*sys.argv[1:])
