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
    return model(info.read_text()) if info.is_file() else model("")


def model(info: str) -> str:
    """The processor that the text of /proc/cpuinfo describes, as far as it does.

    Its name alone says too little: virtual machines call several generations "AMD EPYC", and an ARM
    core has none.

    >>> model("cpu family : 25\\nmodel : 17\\nmodel name : AMD EPYC\\n")
    'AMD EPYC family 25 model 17'
    """
    said = dict(re.findall(r"^(.+?)\s*: *(.+?) *$", info, re.MULTILINE))  # of the last core
    name = said.get("model name") or platform.processor() or platform.machine()
    fields = ("cpu family", "model", "CPU implementer", "CPU part")
    return " ".join([name, *(f"{f.split()[-1]} {said[f]}" for f in fields if f in said)])
