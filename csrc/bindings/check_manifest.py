"""Compares a library that was built with the capability table, in both directions.

    python csrc/bindings/check_manifest.py build/_sm120.so [--few]

A library of few kernels (`--few`) may take less shared memory than the table says.
"""

import importlib.util
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from jaxmoe.capability import TABLE, check_manifest


def main(library: str, *options: str) -> None:
    name = pathlib.Path(library).name.split(".")[0]
    spec = importlib.util.spec_from_file_location(name, library)
    if spec is None or spec.loader is None:
        sys.exit(f"{library} is not a Python module")
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:  # a kernel that no unit defines, for one
        sys.exit(f"{name} cannot be loaded: {error}")
    manifest = module.manifest()
    if "--few" in options:
        for variant in manifest["variants"].values():
            variant.pop("smem_bytes", None)
    wrong = check_manifest(manifest, [row for row in TABLE if row.family == manifest["library"]])
    if wrong:
        what = f"{name} and the capability table (jaxmoe/capability/table.py) do not agree:"
        sys.exit("\n  ".join([what, *wrong]))


if __name__ == "__main__":
    main(*sys.argv[1:])
