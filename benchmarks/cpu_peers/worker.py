"""A process that holds one implementation: `python -m cpu_peers.worker NAME FOLDER`.

It is told what to do by lines of JSON on its standard input, and answers each with one on its
standard output: what the implementation is, then

    {"do": "begin", "tokens": T, "rows": [...]}  ->  {"seconds": of the first call}, and the
        result at these tokens in FOLDER/NAME.npy
    {"do": "time", "first": n, "count": c}       ->  {"seconds": [...]} of c calls from the nth on

An answer may be {"refused": reason} or {"failed": reason} instead; it is the last.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from cpu_peers.problem import NotOfferedError, Problem

IMPLEMENTATIONS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "jaxmoe": ("jax_cpu", "Jaxmoe"),
        "jaxmoe-w4a8": ("jax_cpu", "JaxmoeW4A8"),
        "jaxmoe-avx2": ("jax_cpu", "JaxmoeAvx2"),
        "llama.cpp": ("llama_cpp_python", "LlamaCpp"),
        "ik_llama.cpp": ("ik_llama_cpp", "IkLlamaCpp"),
        "vllm": ("vllm_cpu", "Vllm"),
        "ragged_dot": ("jax_cpu", "RaggedDot"),
    }
)
"""Module and class by name."""


class Implementation(Protocol):
    """One way of computing a `Problem`; `__init__` takes the problem and arranges the weights.

    Args:
      name: what its rows are called.
      compute: its arithmetic, `w4a16` or `w4a8`, or `bf16`.
      dtype: that of x as it takes it.
      version: of the library, with what else identifies the code that runs.
      weight_sets: copies of the weights in rotation.
    """

    name: str
    compute: str
    dtype: str
    version: str
    weight_sets: int

    def begin(self, tokens: int) -> None:
        """Makes ready for calls with that many tokens: inputs, compilation, memory."""

    def call(self, number: int) -> float:
        """Seconds of one call, over the next weights and routing in rotation."""

    def output(self) -> np.ndarray:
        """`[T, H]`, the result of the last call."""


def create(name: str, problem: Problem) -> Implementation:
    """The implementation of that name.

    Raises:
      NotOfferedError: it cannot compute this problem.
    """
    module, of = IMPLEMENTATIONS[name]
    return getattr(importlib.import_module(f"cpu_peers.{module}"), of)(problem)


def serve(name: str, problem: Problem, commands: Any, answers: Any) -> None:
    """Answers commands until there are no more."""

    def answer(what: Mapping[str, Any]) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        implementation = create(name, problem)
        keys = ("name", "compute", "dtype", "version", "weight_sets")
        answer({key: getattr(implementation, key) for key in keys})
        for line in commands:
            command = json.loads(line)
            if command["do"] == "begin":
                implementation.begin(command["tokens"])
                seconds: Any = implementation.call(0)
                rows = np.asarray(implementation.output())[command["rows"]]
                np.save(problem.folder / f"{name}.npy", rows.astype(np.float32))
            else:
                first, count = command["first"], command["count"]
                seconds = [implementation.call(first + n) for n in range(count)]
            answer({"seconds": seconds})
    except NotOfferedError as error:
        answer({"refused": str(error)})
    except Exception as error:  # whatever a foreign library throws ends this process alone
        answer({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})


def main() -> None:
    name, folder = sys.argv[1:]
    problem = Problem.read(folder)
    if hasattr(os, "sched_setaffinity"):  # thread pools count these, and must not be larger
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: problem.threads])
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        serve(name, problem, sys.stdin, answers)


if __name__ == "__main__":
    main()
