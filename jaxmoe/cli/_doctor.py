"""`jaxmoe doctor`: what is installed, what can run here, and whether its numbers are right."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import platform
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

import jaxmoe
from jaxmoe import kernels
from jaxmoe.benchmark.data import distance, random_experts, random_tokens, reference
from jaxmoe.benchmark.layers import TINY
from jaxmoe.capability import TABLE, Problem, Row, check_manifest
from jaxmoe.capability.requirements import build_option
from jaxmoe.cli._console import out, say, table
from jaxmoe.cli._explain import find_target, try_resolve
from jaxmoe.experts import ExpertWeights
from jaxmoe.kernels import cpu, judge, panel
from jaxmoe.kernels.xla import MlpConfig

PACKAGES = ("jax", "jaxlib", "numpy", "ml_dtypes", "flax", "safetensors", "typer", "rich")

# Relative L2 distance from float64: float32 sums; for bfloat16, its rounding of inputs and output.
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3}

TOKENS = 19  # of the numeric checks, which also run the first token alone


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was tried; `ok` is None where it cannot be tried here."""

    name: str
    ok: bool | None
    detail: str


def doctor(*, as_json: bool) -> None:
    """Prints the report; exits with 1 if a check failed."""
    report: dict[str, Any] = {
        "versions": versions(),
        "device": str(find_target(None)),
        "cpu_features": sorted(kernels.installation()["features"]),
        "libraries": [*_cpu_library(), *_cuda_libraries()],
        "bundled_model": _bundled_model(),
    }
    checks = run_checks()
    healthy = all(check.ok is not False for check in checks)
    if as_json:
        report["checks"] = [dataclasses.asdict(check) for check in checks]
        print(json.dumps({**report, "healthy": healthy}, indent=2))
    else:
        _print(report, checks, healthy)
    if not healthy:
        raise typer.Exit(1)


def versions() -> dict[str, str]:
    """Versions of what matters; "not installed" for an absent extra."""
    found = {"jaxmoe": jaxmoe.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["machine"] = f"{platform.system()} {platform.machine()}"
    return found


def _native_rows(platform: str) -> list[Row]:
    return [row for row in TABLE if row.platform == platform and row.never is None]


def _cpu_library() -> list[str]:
    module, why = cpu.library()
    if module is None:
        return [f"CPU: {why}."]
    variants = ", ".join(module.manifest()["variants"])
    return [f"CPU: the library jaxmoe._cpu is built, with {variants}."]


def _cuda_libraries() -> list[str]:
    built = kernels.installation()["built"]
    families: dict[str, list[str]] = {}
    for row in _native_rows("cuda"):
        if row.variant in built or not row.only_by_name:  # the latter are in no wheel
            families.setdefault(row.family, []).extend({row.variant} & built)
    sentences = [
        f"CUDA: the library jaxmoe._{family} is built, with {', '.join(variants)}."
        for family, variants in families.items()
        if variants
    ]
    absent = [family for family, variants in families.items() if not variants]
    if absent:
        sentences.append(
            f"CUDA: the families {', '.join(absent)} are not in this build (each is built where it "
            f"is asked for, with nvcc and -C cmake.define.{build_option(absent[0])}); GPUs of "
            "theirs run other families' kernels, or xla's."
        )
    return sentences


def _bundled_model() -> str:
    try:
        from jaxmoe import models
    except ModuleNotFoundError as error:
        return f"jaxmoe.models needs {error.name}: pip install 'jaxmoe[flax,hf]'."
    formats = models.available_formats(models.bundled())
    return f"formats {', '.join(formats)}." if formats else "not in this installation."


def run_checks() -> list[Check]:
    """Runs every kernel that this machine can run, against its self-test and float64."""
    module, why = cpu.library()
    checks = [Check("native CPU library", module is not None, why or "loaded")]
    if module is not None:
        rows = _native_rows("cpu")
        differences = check_manifest(module.manifest(), rows)
        checks.append(
            Check("library and table agree", not differences, "; ".join(differences) or "yes")
        )
        checks += [_attempt(f"{row.variant} self-test", _self_test, row) for row in rows]
    checks += _cuda_checks()
    for row in [*_native_rows("cpu"), *(r for r in TABLE if r.platform is None)]:
        checks.append(_attempt(f"{row.variant} numbers", _numbers, row))
    return checks


def _cuda_checks() -> list[Check]:
    """The GPU libraries that are built: their manifests, and their self-tests on this GPU."""
    checks = []
    for family in dict.fromkeys(row.family for row in _native_rows("cuda")):
        module = kernels.FAMILIES[family].library()[0] if family in kernels.FAMILIES else None
        if module is None:
            continue
        rows = [row for row in _native_rows("cuda") if row.family == family]
        differences = check_manifest(module.manifest(), rows)
        name = f"jaxmoe._{family} and table agree"
        checks.append(Check(name, not differences, "; ".join(differences) or "yes"))
        checks += [_attempt(f"{row.variant} self-test", _self_test, row) for row in rows]
    return checks


def _attempt(name: str, check: Callable[[Row], tuple[bool | None, str]], row: Row) -> Check:
    try:
        return Check(name, *check(row))
    except Exception as error:  # a kernel may fail in any way; the report must still come
        return Check(name, False, f"{type(error).__name__}: {error}")


def obstacle(row: Row) -> str:
    """Why this machine cannot run a variant, or ""."""
    problem = _problem(row)
    # Built and tested or not is what the checks find out; here the machine alone counts.
    here = _host() if row.platform in (None, "cpu") else find_target(None)
    target = dataclasses.replace(here, disqualified=())
    rejected = try_resolve(problem, target, row.variant).rejected
    return next((r.detail for r in rejected if r.variant == row.variant), "")


@functools.cache
def _host() -> Any:
    return find_target("cpu")


def _problem(row: Row) -> Problem:
    """A small layer with weights and arithmetic that the row has."""
    weight_format, compute = sorted(row.arithmetic)[0]
    return Problem(
        weight_format=weight_format,
        compute=compute,
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.intermediate_size,
        num_experts=TINY.num_experts,
        top_k=TINY.top_k,
    )


def _self_test(row: Row) -> tuple[bool | None, str]:
    if why := obstacle(row):
        return None, why
    why = kernels.FAMILIES[row.family].self_test(row.variant)
    return not why, why or "passed"


def _numbers(row: Row) -> tuple[bool | None, str]:
    """Both formats and all dtypes, decode and a small batch, against float64 and against xla."""
    if why := obstacle(row):
        return None, why
    if row.only_by_name:
        return _own_numbers(row)
    worst: dict[str, float] = {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for weight_format in ("nvfp4", "mxfp4"):
            for dtype in sorted(TOLERANCE.keys() & row.activation_dtypes):
                case = _case(weight_format, dtype)
                for t in (1, TOKENS):
                    y = case.by_xla[:t] if row.platform is None else case.run(row.variant, t)
                    expected = (case.exact[:t], np.asarray(case.by_xla[:t], np.float64))
                    errors = [distance(y, e) for e in expected]
                    worst[dtype] = max(worst.get(dtype, 0.0), *errors)
    right = all(error <= TOLERANCE[dtype] for dtype, error in worst.items())
    text = ", ".join(
        f"{dtype} {error:.1e} (at most {TOLERANCE[dtype]:.0e})" for dtype, error in worst.items()
    )
    return right, f"relative error against float64 and xla: {text}"


def _own_numbers(row: Row) -> tuple[bool, str]:
    """A variant that quantises activations, against float64 that does the same."""
    (weight_format,) = row.weight_formats
    run = kernels.implementation(row.variant)

    def jitted(config: MlpConfig, variant: str, *operands: Any) -> jax.Array:
        return jax.jit(functools.partial(run, config, variant))(*operands)

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        off = judge.error(row, weight_format, judge.TINY, jitted)
    text = f"relative error against float64 with the same roundings: {off:.1e}"
    return not judge.verdict(off, weight_format), f"{text} (at most {judge.TOLERANCE:.0e})"


@dataclasses.dataclass(frozen=True)
class _Case:
    """A small layer with its input and results that a kernel's must agree with."""

    experts: ExpertWeights  # in layout panel32
    tokens: tuple[jax.Array, ...]
    by_xla: jax.Array
    exact: np.ndarray

    def run(self, variant: str, tokens: int) -> jax.Array:
        return _run(self.experts, tuple(a[:tokens] for a in self.tokens), variant)


@functools.cache
def _case(weight_format: str, dtype: str) -> _Case:
    experts = random_experts(TINY, weight_format, panel.NAME, seed=1)
    inputs = random_tokens(TINY, TOKENS, dtype, seed=2)
    by_xla = _run(_canonical(experts), inputs, "xla")
    return _Case(experts, inputs, by_xla, reference(experts, inputs, np.arange(TOKENS)))


def _canonical(experts: ExpertWeights) -> ExpertWeights:
    """The same weights as the xla kernels read them."""
    everyone = jnp.arange(experts.num_experts, dtype=jnp.int32)
    matrices: dict[str, Any] = {
        name: panel.unpack(getattr(experts, name), everyone) for name in ("gate_up", "down")
    }
    return dataclasses.replace(experts, **matrices)


def _run(experts: ExpertWeights, tokens: tuple[jax.Array, ...], variant: str) -> jax.Array:
    x, ids, weights = tokens
    call = functools.partial(jaxmoe.moe_mlp, implementation=variant)
    return jax.jit(call)(x, experts, ids, weights)


def _print(report: dict[str, Any], checks: Sequence[Check], healthy: bool) -> None:
    console = out()
    about = table("", "", title="Installation")
    about.show_header = False
    for name, version in report["versions"].items():
        about.add_row(name, version)
    about.add_row("device", report["device"])
    about.add_row("CPU features", ", ".join(report["cpu_features"]) or "none that a kernel uses")
    for sentence in report["libraries"]:
        about.add_row("library", sentence)
    about.add_row("bundled model", report["bundled_model"])
    console.print(about)
    tried = table("check", "result", "detail", title="Checks")
    words = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "[dim]not here[/]"}
    for check in checks:
        tried.add_row(check.name, words[check.ok], check.detail)
    console.print(tried)
    failed = [check.name for check in checks if check.ok is False]
    say(
        console,
        "All checks passed." if healthy else f"Failed: {', '.join(failed)}.",
        "bold green" if healthy else "bold red",
    )
