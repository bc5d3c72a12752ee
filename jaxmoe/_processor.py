"""This machine's CPU, as far as figures that were measured on it depend on it."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path


def num_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def name() -> str:
    """Its model, with the number of usable cores: JAX calls every CPU "cpu"."""
    return f"{_model()}, {num_cores()} cores"


@functools.cache
def _model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file() and (match := re.search(r"model name\s*:\s*(.+)", info.read_text())):
        return match.group(1).strip()
    return platform.processor() or platform.machine()
