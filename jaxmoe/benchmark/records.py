"""Results as JSON rows: one object a line, the newest last."""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

import jaxmoe
from jaxmoe.benchmark.machine import Machine
from jaxmoe.benchmark.runner import Measurement
from jaxmoe.checkpoint import atomic_write


@functools.cache
def commit() -> str:
    """The commit of the source tree that this package runs from, else its version."""
    root = Path(jaxmoe.__file__).parents[1]
    if (root / ".git").exists():
        try:
            git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
            return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    return f"v{jaxmoe.__version__}"


def origin(device: str) -> dict[str, Any]:
    """What every row begins with: when, from which source, where, with which versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "jax": jax.__version__,
        "backend": " ".join(jax.local_devices()[0].client.platform_version.split()),
    }


def device_slug(device: str) -> str:
    """The name of the file that holds a device's rows.

    >>> device_slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def row(result: Measurement, machine: Machine) -> dict[str, Any]:
    """A measurement as a row of `benchmarks/results/`; times in microseconds."""
    return {
        **origin(machine.device),
        "implementation": result.implementation,
        "layer": result.layer.name,
        "format": result.weight_format,
        "compute": result.compute,
        "dtype": result.dtype,
        "T": result.tokens,
        "mode": result.mode,
        "us": _digits(result.seconds * 1e6),
        "gbps": _digits(result.gbps),
        "tflops": _digits(result.tflops),
        "error": _digits(result.error),
        "floor_us": _digits(result.floor * 1e6),
        "floor_fraction": _digits(result.floor / result.seconds),
        "overhead_us": None if result.overhead is None else _digits(result.overhead * 1e6),
        "runs": result.runs,
        "weight_sets": result.weight_sets,
        "bandwidth_gbps": _digits(machine.bandwidth / 1e9),
        "peak_tflops": _digits(machine.peak_of(result.compute) / 1e12),
    }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def read_rows(path: os.PathLike[str] | str) -> list[dict[str, Any]]:
    """The rows of a file that `append_rows` wrote; none if there is no file.

    Raises:
      ValueError: the file is not a JSON list of rows.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{os.fspath(path)}: must hold a JSON list of rows")
    return rows


def append_rows(path: os.PathLike[str] | str, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to a JSON file, which is made if there is none and replaced atomically.

    Raises:
      ValueError: the file exists and is not a JSON list of rows.
    """
    lines = ",\n".join(json.dumps(r) for r in (*read_rows(path), *rows))
    with atomic_write(path) as file:
        file.write(f"[\n{lines}\n]\n".encode())
