"""`jaxmoe doctor --evidence FILE`: what the kernels do on this machine, as a file to attach."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import typer

from jaxmoe import benchmark, kernels
from jaxmoe.benchmark.records import origin
from jaxmoe.capability import TABLE, Row, check_manifest
from jaxmoe.checkpoint import atomic_write
from jaxmoe.cli._console import argument, err, out, say, table
from jaxmoe.cli._doctor import obstacle, versions
from jaxmoe.cli._explain import find_target
from jaxmoe.kernels import judge
from jaxmoe.kernels.judge import Case

SCHEMA = "jaxmoe.evidence/1"

# One token and none; odd numbers of tokens around tile edges; more experts than tokens; sizes that
# are no multiple of a tile.
CASES = (
    judge.TINY,
    Case(tokens=0, num_experts=4, top_k=2, hidden_size=192, intermediate_size=64),
    Case(tokens=1, num_experts=32, top_k=8, hidden_size=256, intermediate_size=192),
    Case(tokens=33, num_experts=8, top_k=2, hidden_size=192, intermediate_size=320),
    Case(tokens=64, num_experts=128, top_k=8, hidden_size=256, intermediate_size=128),
    Case(tokens=257, num_experts=4, top_k=1, hidden_size=576, intermediate_size=320),
)

_ROWS = tuple(row for row in TABLE if row.never is None)
_DRIVER = Path("/proc/driver/nvidia/version")


@dataclasses.dataclass(frozen=True)
class Timed:
    """What a row is timed on."""

    layer: benchmark.Layer
    tokens: tuple[int, ...]
    seconds: float


_GPU = Timed(benchmark.get_layer("qwen3-30b-a3b"), (1, 64, 1024), 0.5)
_ELSEWHERE = Timed(benchmark.TINY, (1, 64), 0.1)


def evidence(path: Path) -> None:
    """Writes the file; exits with 1 if a row failed."""
    with argument("--evidence"):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"{path} must be a file in a folder that exists")
    status = err()
    with status.status("collecting evidence") as line:
        report = collect(lambda text: line.update(text))
    with atomic_write(path) as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    console = out()
    console.print(_summary(report))
    say(console, f"{path}: {'passed' if report['passed'] else 'FAILED'}", "bold")
    if not report["passed"]:
        raise typer.Exit(1)


def collect(progress: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Runs every row that this machine can run, and says why it cannot run the others.

    Returns:
      What is written: where and with what it ran; of each library its build and where its manifest
      differs from the table; of each row its errors against float64 with the row's own roundings,
      whether two runs gave the same bits, timings, and failures. See `docs/owners.md`.
    """
    machine = benchmark.measure_machine(**_SMALL) if _on_cpu() else benchmark.measure_machine()
    rows = [_row(row, machine, progress) for row in _ROWS]
    libraries = list(_libraries())
    return {
        "schema": SCHEMA,
        **origin(machine.device),
        "target": str(find_target(None)),
        "driver": _DRIVER.read_text().splitlines()[0] if _DRIVER.is_file() else None,
        "versions": versions(),
        "libraries": libraries,
        "rows": rows,
        "passed": not any(row["failures"] for row in rows)
        and not any(library["differences"] for library in libraries),
    }


_SMALL = {"megabytes": 64, "matrix_size": 512}


def _on_cpu() -> bool:
    return jax.local_devices()[0].platform == "cpu"


def _libraries() -> Iterator[dict[str, Any]]:
    for name, family in kernels.FAMILIES.items():
        module, why = family.library()
        rows = [row for row in TABLE if row.family == name]
        yield {
            "family": name,
            "build": None if module is None else module.manifest()["build"],
            "why_not": why,
            "differences": [] if module is None else check_manifest(module.manifest(), rows),
        }


def _row(row: Row, machine: benchmark.Machine, progress: Callable[[str], None]) -> dict[str, Any]:
    """One row of the table, as far as this machine can run it."""
    report: dict[str, Any] = {
        "variant": row.variant,
        "table_evidence": row.evidence,
        "unable": obstacle(row),
        "numbers": [],
        "timings": [],
        "failures": [],
    }
    if report["unable"]:
        return report
    for weight_format in sorted(row.weight_formats & {"nvfp4", "mxfp4"}):
        progress(f"{row.variant}, {weight_format}: numbers")
        report["numbers"] += _numbers(row, weight_format)
        progress(f"{row.variant}, {weight_format}: timings")
        try:
            report["timings"] += _timings(row, weight_format, machine)
        except Exception as error:  # a kernel may fail in any way; the file must still come
            report["failures"].append(f"timing {weight_format}: {_words(error)}")
    report["failures"] += _failures(report["numbers"])
    return report


def _numbers(row: Row, weight_format: str) -> list[dict[str, Any]]:
    """Every case by every tactic and arithmetic: its error, or what was raised."""
    run = kernels.implementation(row.variant)
    computes = row.computes(weight_format)

    def twice(*args: Any, **attributes: str) -> Any:
        config, variant, *operands = args
        call = jax.jit(functools.partial(run, config, variant, **attributes))
        first, second = (np.asarray(call(*operands)) for _ in range(2))
        if first.tobytes() != second.tobytes():
            raise ValueError("two runs gave different bits")
        return first

    found = []
    with jax.default_device(_device(row)):
        ways = [(c, t) for c in computes for t in ("", *kernels.tactics(row.variant, c))]
        for compute, tactic in ways:
            attributes = {"tactic": tactic} if tactic else {}
            if len(computes) > 1:
                attributes["compute"] = compute
            for case in CASES:
                result: dict[str, Any] = {
                    "format": weight_format,
                    "compute": compute,
                    "tactic": tactic,
                    **dataclasses.asdict(case),
                    "error": None,
                    "allowed": judge.TOLERANCE,
                    "raised": "",
                }
                try:
                    result["error"] = judge.error(row, weight_format, case, twice, **attributes)
                except Exception as error:
                    result["raised"] = _words(error)
                found.append(result)
    return found


def _failures(numbers: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong with a row's numbers, in sentences.

    A named tactic may refuse a case, but not all of them; the library's own choice refuses none.
    """
    failures = []
    for result in numbers:
        where = f"{result['format']}, {result['compute']}, tactic "
        where += f"{result['tactic'] or 'default'}, "
        where += ", ".join(f"{f.name} {result[f.name]}" for f in dataclasses.fields(Case))
        if result["raised"] and not result["tactic"]:
            failures.append(f"{where}: {result['raised']}")
        elif not result["raised"] and not result["error"] <= result["allowed"]:
            failures.append(f"{where}: {judge.verdict(result['error'], result['format'])}")
    for tactic, weight_format in dict.fromkeys((r["tactic"], r["format"]) for r in numbers):
        of_tactic = [r for r in numbers if (r["tactic"], r["format"]) == (tactic, weight_format)]
        if tactic and all(r["raised"] for r in of_tactic):
            failures.append(f"{weight_format}, tactic {tactic}: {of_tactic[0]['raised']}")
    return failures


def _timings(row: Row, weight_format: str, machine: benchmark.Machine) -> list[dict[str, Any]]:
    timed = _GPU if row.platform == "cuda" else _ELSEWHERE
    with jax.default_device(_device(row)):
        results = list(
            benchmark.measure_layer(
                timed.layer,
                weight_format,
                timed.tokens,
                machine=machine,
                implementations=[row.variant],
                compute=row.computes(weight_format)[-1],
                budget=timed.seconds,
            )
        )
    skipped = [r.reason for r in results if isinstance(r, benchmark.Skipped)]
    if skipped:
        raise RuntimeError(skipped[0])
    rows = [benchmark.row(r, machine) for r in results if isinstance(r, benchmark.Measurement)]
    wanted = ("layer", "format", "compute", "dtype", "T", "mode", "us", "gbps", "tflops", "error")
    return [{key: r[key] for key in wanted} for r in rows]


def _device(row: Row) -> Any:
    if row.platform == "cpu":
        return jax.local_devices(backend="cpu")[0]
    if row.platform == "cuda":
        return kernels.FAMILIES[row.family].device()
    return jax.local_devices()[0]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _summary(report: dict[str, Any]) -> Any:
    summary = table("variant", "largest error", "timed", "result", title="Evidence")
    for row in report["rows"]:
        errors = [r["error"] for r in row["numbers"] if r["error"] is not None]
        summary.add_row(
            row["variant"],
            f"{max(errors):.1e}" if errors else "",
            ", ".join(f"T={t['T']} {t['us']:,.0f} µs" for t in row["timings"]),
            row["unable"] or "\n".join(row["failures"]) or "passed",
        )
    return summary
