"""What a row requires of a problem and a target: one small function for each reason to refuse.

A function returns None where the requirement is met, else a sentence that names what was required,
what came, and the way out. All are pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxmoe.capability.problem import Problem
from jaxmoe.capability.table import (
    EMULATED,
    KNOWN_SMS,
    UNKNOWN_SM_NAMES,
    Reason,
    Row,
)
from jaxmoe.capability.targets import Target


def has_compute(row: Row, problem: Problem, compute: str) -> bool:
    """Whether the row has this arithmetic for the problem's weights, and may take it."""
    asked = problem.compute != "auto" or compute not in row.opt_in
    return asked and (problem.weight_format, compute) in row.arithmetic


def _sm_list(sms: Iterable[int]) -> str:
    *first, last = sorted(sms)
    return f"SM {', '.join(map(str, first))} or {last}" if first else f"SM {last}"


def _platform(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    if row.platform in (None, target.platform):
        return None
    return f"requires platform {row.platform}; this target is {target}"


def _sm_unknown(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    if row.sms is None or target.sm in KNOWN_SMS:
        return None
    required = f"requires {_sm_list(row.sms)}"
    if target.sm is None:
        return (
            f"{required}; the SM of {target} is unknown, and is not guessed: name it with "
            "jaxmoe.override(target='sm_NN')"
        )
    device = UNKNOWN_SM_NAMES.get(target.sm)
    return (
        f"{required}; SM {target.sm}{f' ({device})' if device else ''} is an unknown SM, not "
        "guessed from a range: no native variant claims it, xla runs there"
    )


def _sm(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    if row.sms is None or target.sm in row.sms:
        return None
    here = [
        r.variant
        for r in table
        if r.sms and target.sm in r.sms and r.never is None and not r.only_by_name
    ]
    return (
        f"requires {_sm_list(row.sms)}; this target is {target}, whose native variants are "
        f"{', '.join(here) or 'none (xla runs everywhere)'}"
        + ("; jaxmoe ships no such kernel" if row.never else "")
    )


def _op(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    if problem.op in row.ops:
        return None
    return f"serves {', '.join(sorted(row.ops))} alone; asked for {problem.op}"


def _format(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    if problem.weight_format in row.weight_formats:
        return None
    formats = " or ".join(sorted(row.weight_formats))
    because = f" ({row.other_formats})" if row.other_formats else ""
    return (
        f"requires {formats} weights; got {problem.weight_format}{because}: quantise to {formats} "
        "with jaxmoe.quantize"
    )


def _compute(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    if any(has_compute(row, problem, compute) for compute in problem.chain):
        return None
    offered = row.computes(problem.weight_format)
    if problem.compute == "auto":
        came = f"the checkpoint declares {problem.declared}, and auto takes nothing less accurate"
    else:
        came = f"compute={problem.compute!r} was asked for, which is never replaced silently"
    return (
        f"computes {' or '.join(offered)} with {problem.weight_format} weights; {came}: pass "
        f"compute={offered[-1]!r} to accept its arithmetic"
    )


def _dtype(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    x, result = problem.activation_dtype, problem.result_dtype
    if x not in row.activation_dtypes:
        dtypes = " or ".join(sorted(row.activation_dtypes))
        return f"requires x of dtype {dtypes}; got {x}: cast x"
    if not row.any_result and result not in (None, x):
        return (
            f"requires a result of x's dtype {x}; got preferred_element_type {result}: leave it "
            "out and cast the result, or let xla round the float32 sums to it"
        )
    return None


def _activation(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    if (
        problem.op == "grouped_matmul"
        or row.activations is None
        or problem.activation in row.activations
    ):
        return None
    able = [r.variant for r in table if r.activations is None]
    return (
        f"requires one of the activations {', '.join(sorted(row.activations))}; got "
        f"{problem.activation}, which {', '.join(able) or 'no variant'} can run"
    )


def _bias(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    if row.bias or not problem.bias:
        return None
    able = [r.variant for r in table if r.bias and r.platform in (None, target.platform)]
    return f"requires experts without bias; got biases, which {', '.join(able)} add"


def _alignment(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    k, n = row.alignment
    sizes = {"hidden_size": problem.hidden_size, "intermediate_size": problem.intermediate_size}
    if problem.op == "grouped_matmul":  # K = hidden_size, N = intermediate_size
        steps = {"hidden_size": k, "intermediate_size": n}
    else:  # each size is contracted by one product and put out by the other
        steps = dict.fromkeys(sizes, int(np.lcm(k, n)))
    for name, step in steps.items():
        if sizes[name] % step:
            return (
                f"requires {name} to be a multiple of {step}; got {sizes[name]}: pad to "
                f"{-(-sizes[name] // step) * step}"
            )
    return None


def _experts(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    if row.max_experts is None or problem.num_experts <= row.max_experts:
        return None
    return (
        f"requires at most {row.max_experts} experts in a call; got {problem.num_experts}: split "
        "them, each part with its expert_offset"
    )


def _built(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    if row.platform is None or row.variant in target.built:
        return None
    if row.platform == "cpu":
        return (
            "this build holds no such kernel in its CPU library (jaxmoe._cpu): install jaxmoe "
            "from source with a C++17 compiler"
        )
    return (
        f"this build holds no {row.family} library (jaxmoe._{row.family}): build jaxmoe from "
        f"source with nvcc and -C cmake.define.{build_option(row.family)}"
    )


def build_option(family: str) -> str:
    """The CMake definition that builds a GPU family's library."""
    real = family.removesuffix(EMULATED)
    return f"JAXMOE_CUDA_FAMILIES={family}" if real == family else f"JAXMOE_EMULATE={real}"


def _features(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    if row.features <= target.features:
        return None
    lacking = ", ".join(sorted(row.features - target.features))
    able = [r.variant for r in table if r.platform == "cpu" and r.features <= target.features]
    return (
        f"requires the CPU features {', '.join(sorted(row.features))}; this CPU lacks {lacking}, "
        f"and can run {', '.join(able) or 'none'}"
    )


def _self_test(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    found = dict(target.disqualified).get(row.variant)
    if found is None:
        return None
    return f"requires right numbers in its self-test on this device; it gave: {found}"


# In the order in which they are asked: what cannot change before what can.
_Requirement = Callable[[Row, Problem, Target, Sequence[Row]], str | None]
_REQUIREMENTS: tuple[tuple[Reason | None, _Requirement], ...] = (
    (Reason.PLATFORM_UNSUPPORTED, _platform),
    (Reason.SM_UNKNOWN, _sm_unknown),
    (Reason.SM_UNSUPPORTED, _sm),
    (None, lambda row, *_: row.never[1] if row.never else None),
    (Reason.OP_UNSUPPORTED, _op),
    (Reason.FORMAT_UNSUPPORTED, _format),
    (Reason.COMPUTE_UNSUPPORTED, _compute),
    (Reason.DTYPE_UNSUPPORTED, _dtype),
    (Reason.ACTIVATION_UNSUPPORTED, _activation),
    (Reason.BIAS_UNSUPPORTED, _bias),
    (Reason.SHAPE_UNALIGNED, _alignment),
    (Reason.TOO_MANY_EXPERTS, _experts),
    (Reason.NOT_BUILT, _built),
    (Reason.CPU_FEATURE_MISSING, _features),
    (Reason.SELF_TEST_FAILED, _self_test),
)


def reject(
    row: Row, problem: Problem, target: Target, table: Sequence[Row], by_auto: bool = False
) -> tuple[Reason, str] | None:
    """The first requirement that fails, or None where the row can run the problem."""
    for reason, requirement in _REQUIREMENTS:
        detail = requirement(row, problem, target, table)
        if detail is not None:
            if reason is None:
                assert row.never is not None
                reason = row.never[0]
            return reason, detail
    if by_auto and row.only_by_name:
        return (
            Reason.ONLY_BY_NAME,
            f"AUTO never takes it, since {row.only_by_name}: pass implementation={row.variant!r}",
        )
    return None
