"""Measures every layer in both formats and records the rows under `results/`.

    python benchmarks/run.py                       # all layers that fit, this device's token counts
    python benchmarks/run.py --layer gpt-oss-20b --tokens 1,64

One layer and format after the other, each as `jaxmoe bench` does it; a layer that does not fit is
named and left out. Let nothing else run on the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import jax

from jaxmoe import benchmark

RESULTS = Path(__file__).parent / "results"


def device_file() -> Path:
    """`results/<device>.json`."""
    return RESULTS / f"{benchmark.device_slug(benchmark.device_name())}.json"


def main() -> None:
    platform = "cpu" if jax.default_backend() == "cpu" else "gpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", action="append", choices=[*benchmark.LAYERS], default=None)
    parser.add_argument("--tokens", default=",".join(map(str, benchmark.TOKENS[platform])))
    parser.add_argument("--seconds", default="2")
    parser.add_argument("--memory", default="6", help="GiB")
    arguments = parser.parse_args()
    path = device_file()
    failed = []
    for layer in arguments.layer or benchmark.LAYERS:
        for weight_format in ("nvfp4", "mxfp4"):
            # A process each: memory that one layer leaves fragmented does not slow the next.
            command = [sys.executable, "-m", "jaxmoe.cli", "bench", "--layer", layer]
            command += ["--format", weight_format, "--tokens", arguments.tokens]
            command += ["--seconds", arguments.seconds, "--memory", arguments.memory]
            if subprocess.run([*command, "--json", str(path)], check=False).returncode:
                failed.append(f"{layer} {weight_format}")
    print(f"rows: {path}")
    if failed:
        sys.exit(f"not measured: {', '.join(failed)} (the reasons stand above)")


if __name__ == "__main__":
    main()
