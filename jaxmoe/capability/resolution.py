"""The one reader of the table: which variant runs a problem on a target, and why no other does.

Pure: nothing here asks a device, the environment, an importer or a clock, so the answer for a
machine that is elsewhere is the answer that the machine itself would give.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.capability.table import (
    COMPUTE,
    KNOWN_SMS,
    OPS,
    TABLE,
    UNKNOWN_SM_NAMES,
    Reason,
    Row,
)
from jaxmoe.capability.targets import Target

Request = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be computed, as far as the choice of a kernel depends on it.

    >>> Problem(weight_format="nvfp4", hidden_size=2048, intermediate_size=768, num_experts=128,
    ...         top_k=8, declared_compute="w4a4").chain
    ('w4a4', 'w4a8', 'w4a16')

    Args:
      op: `moe_mlp` or `grouped_matmul`.
      weight_format: `nvfp4`, `mxfp4`, `mxfp8`, `fp8` or `bf16` (any unquantised array).
      compute: the arithmetic, strictly, or `auto`: what the checkpoint declares, or the nearest
        more accurate one that the target has.
      activation_dtype: dtype of `x`.
      activation: name of the activation function; `grouped_matmul` has none and ignores it.
      bias: whether biases are added.
      hidden_size: `H`; for `grouped_matmul`, K.
      intermediate_size: `I`; for `grouped_matmul`, N.
      num_experts: `E`, experts of this shard.
      top_k: experts per token.
      declared_compute: what the checkpoint was made for; None stands for the most accurate
        (`w4a16` for FP4 weights).
    """

    op: str = "moe_mlp"
    weight_format: str
    compute: str = "auto"
    activation_dtype: str = "bfloat16"
    activation: str = "swiglu"
    bias: bool = False
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    declared_compute: str | None = None

    def __post_init__(self) -> None:
        dtype = self.activation_dtype
        if not isinstance(dtype, str):
            object.__setattr__(self, "activation_dtype", np.dtype(dtype).name)
        _require("op", self.op, OPS)
        _require("weight_format", self.weight_format, COMPUTE)
        every = dict.fromkeys(c for computes in COMPUTE.values() for c in computes)
        _require("compute", self.compute, ("auto", *every))
        if self.declared_compute is not None:
            _require("declared_compute", self.declared_compute, COMPUTE[self.weight_format])
        for name in ("hidden_size", "intermediate_size", "num_experts", "top_k"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")

    @property
    def declared(self) -> str:
        """The arithmetic that the checkpoint declares, with the default filled in."""
        return self.declared_compute or COMPUTE[self.weight_format][-1]

    @property
    def chain(self) -> tuple[str, ...]:
        """The arithmetic that will do, best first; never less accurate than the declared one."""
        if self.compute != "auto":
            return (self.compute,)
        computes = COMPUTE[self.weight_format]
        return computes[computes.index(self.declared) :]

    def __str__(self) -> str:
        compute = self.compute
        if compute == "auto":
            origin = "declares" if self.declared_compute else "declares nothing, taken as"
            compute = f"auto (the checkpoint {origin} {self.declared})"
        extras = [self.activation] * (self.op == "moe_mlp") + ["bias"] * self.bias
        return (
            f"{self.op} of {self.weight_format} weights, compute {compute}, "
            f"{', '.join([self.activation_dtype, *extras])}, H={self.hidden_size} "
            f"I={self.intermediate_size} E={self.num_experts} k={self.top_k}"
        )


class Rejection(NamedTuple):
    """A variant that was not taken, why, and the sentence that says what would have done."""

    variant: str
    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resolution:
    """The choice of a variant with everything that led to it. `print` it, or take `to_json()`.

    Args:
      problem: what was asked.
      target: for which machine.
      request: the names asked for, or None for AUTO.
      selected: the variant, or None in the `resolution` of an `UnsupportedError`.
      layout: the layout of prepared weights that the variant reads.
      compute: the arithmetic that will run.
      degraded_from: the declared arithmetic where `compute` is another (always a more accurate
        one), else None.
      selected_by: `auto`, `request` or `failed`.
      evidence: how the variant's numbers were checked, with the record.
      alternatives: variants that could run it too, best first.
      rejected: every other variant considered, with its reason.
      hint: after a failure, what would run.
    """

    problem: Problem
    target: Target
    request: tuple[str, ...] | None
    selected: str | None
    layout: str | None
    compute: str | None
    degraded_from: str | None
    selected_by: str
    evidence: str = ""
    alternatives: tuple[str, ...] = ()
    rejected: tuple[Rejection, ...] = ()
    hint: str = ""

    @property
    def variant(self) -> str:
        """`selected`, for a reader that needs one.

        Raises:
          UnsupportedError: nothing is selected.
        """
        if self.selected is None:
            raise UnsupportedError(self)
        return self.selected

    def __str__(self) -> str:
        asked = "AUTO" if self.request is None else f"implementation {', '.join(self.request)}"
        lines = [("problem", str(self.problem)), ("target", str(self.target)), ("asked", asked)]
        if self.selected is None:
            lines.append(("selected", "none"))
        else:
            lines.append(
                (
                    "selected",
                    f"{self.selected} ({self.compute}, layout {self.layout}, "
                    f"evidence: {self.evidence})",
                )
            )
        if self.degraded_from:
            lines.append(
                (
                    "degraded",
                    f"from {self.degraded_from}, which the checkpoint declares, to {self.compute} "
                    "(more accurate)",
                )
            )
        if self.alternatives:
            lines.append(("also able", ", ".join(self.alternatives)))
        if self.hint:
            lines.append(("way out", self.hint))
        text = [f"{head:<10}{body}" for head, body in lines]
        if self.rejected:
            text += ["rejected", *_rejection_table(self.rejected)]
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers; `from_dict` is the inverse."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["problem"] = dataclasses.asdict(self.problem)
        fields["target"] = {
            **dataclasses.asdict(self.target),
            "features": sorted(self.target.features),
            "built": sorted(self.target.built),
            "disqualified": dict(self.target.disqualified),
        }
        fields["request"] = None if self.request is None else list(self.request)
        fields["alternatives"] = list(self.alternatives)
        fields["rejected"] = [
            {"variant": r.variant, "reason": r.reason.name, "detail": r.detail}
            for r in self.rejected
        ]
        return fields

    def to_json(self, **kwargs: Any) -> str:
        """JSON of `to_dict()`; keyword arguments go to `json.dumps`."""
        return json.dumps(self.to_dict(), **kwargs)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Resolution:
        """The resolution that `to_dict` described."""
        request = fields["request"]
        return cls(
            **{
                **fields,
                "problem": Problem(**fields["problem"]),
                "target": Target(**fields["target"]),
                "request": None if request is None else tuple(request),
                "alternatives": tuple(fields["alternatives"]),
                "rejected": tuple(
                    Rejection(r["variant"], Reason[r["reason"]], r["detail"])
                    for r in fields["rejected"]
                ),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Resolution:
        """The resolution that `to_json` described."""
        return cls.from_dict(json.loads(text))


class UnsupportedError(NotImplementedError):
    """No variant that was asked for can run the problem; `resolution` holds every reason."""

    def __init__(self, resolution: Resolution) -> None:
        super().__init__(resolution)
        self.resolution = resolution

    def __str__(self) -> str:
        r = self.resolution
        asked = "none" if r.request is None else f"none of implementation={list(r.request)}"
        reasons = [f"  {v}: {reason.name}: {detail}" for v, reason, detail in r.rejected]
        message = f"{asked} can run this problem on {r.target}: {r.problem}"
        return "\n".join([message, *reasons, *([f"  way out: {r.hint}"] if r.hint else [])])


def resolve(
    problem: Problem,
    target: Target,
    request: Request = None,
    *,
    table: Sequence[Row] = TABLE,
) -> Resolution:
    """Chooses the kernel variant for `problem` on `target`.

    >>> from jaxmoe.capability import Problem, Target, resolve
    >>> problem = Problem(weight_format="nvfp4", hidden_size=2048, intermediate_size=768,
    ...                   num_experts=128, top_k=8)
    >>> resolve(problem, Target.from_name("sm_120")).selected
    'xla'

    Among the variants that can run the problem, the order of `request` counts first, then how
    near the arithmetic is to the declared one, then the order of the table.

    Args:
      problem: what to compute.
      target: where.
      request: None for AUTO; the name of a variant (`sm120_w4a4`), a provider (`cpu`, `cutlass`)
        or a family (`sm120`), strictly; or a sequence of names of which the first that can run
        the problem is taken.
      table: the rows to choose from.

    Raises:
      ValueError: `request` names nothing in the table.
      UnsupportedError: no variant asked for can run the problem; it carries every reason. AUTO
        raises it only for arithmetic that was asked for explicitly and is not there.
    """
    names = _names(request, table)
    able, rejected = _weigh(problem, target, names, table)
    common: dict[str, Any] = {
        "problem": problem,
        "target": target,
        "request": names,
        "alternatives": tuple(row.variant for row, _ in able[1:]),
        "rejected": tuple(rejected),
    }
    if not able:
        failure = Resolution(
            selected=None,
            layout=None,
            compute=None,
            degraded_from=None,
            selected_by="failed",
            hint=_hint(problem, target, names, table),
            **common,
        )
        raise UnsupportedError(failure)
    row, compute = able[0]
    degraded = problem.compute == "auto" and compute != problem.declared
    return Resolution(
        selected=row.variant,
        layout=row.layout,
        compute=compute,
        degraded_from=problem.declared if degraded else None,
        selected_by="auto" if names is None else "request",
        evidence=f"{row.evidence} ({row.record})" if row.record else row.evidence,
        **common,
    )


def explain(problem: Problem, target: Target, request: Request = None) -> str:
    """The text of `resolve`, also where it fails: what is selected, and why nothing else is.

    >>> problem = Problem(weight_format="nvfp4", compute="w4a4", hidden_size=64,
    ...                   intermediate_size=64, num_experts=4, top_k=2)
    >>> "W4A4 does not exist on SM 90" in explain(problem, Target.from_name("H100"))
    True
    """
    try:
        return str(resolve(problem, target, request))
    except UnsupportedError as error:
        return str(error.resolution)


def implementation_names(table: Sequence[Row] = TABLE) -> tuple[str, ...]:
    """Every name that `implementation` accepts: variants first, then providers and families."""
    return tuple(
        dict.fromkeys([row.variant for row in table] + [name for r in table for name in r.names])
    )


def _require(argument: str, value: str, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(allowed)}; got {value!r}")


def _names(request: Request, table: Sequence[Row]) -> tuple[str, ...] | None:
    """The request as a tuple of names that exist, or None for AUTO."""
    if request is None:
        return None
    names = (request,) if isinstance(request, str) else tuple(request)
    known = implementation_names(table)
    if not names:
        raise ValueError(
            "implementation must name at least one variant; got an empty sequence: pass None to "
            f"choose automatically, or names of {', '.join(known)}"
        )
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(
                f"implementation {name!r} is unknown; the names are {', '.join(known)}"
                + (f". Did you mean {close[0]!r}?" if close else "")
            )
    return tuple(dict.fromkeys(names))


def _has(row: Row, problem: Problem, compute: str) -> bool:
    return (problem.weight_format, compute) in row.arithmetic


def _weigh(
    problem: Problem, target: Target, names: tuple[str, ...] | None, table: Sequence[Row]
) -> tuple[list[tuple[Row, str]], list[Rejection]]:
    """The rows asked for: those able, best first, with the arithmetic of each; and the others."""
    able: list[tuple[int, int, int, Row]] = []  # rank in the request, in the chain, in the table
    rejected: list[tuple[int, int, Rejection]] = []
    for place, row in enumerate(table):
        ranks = [0] if names is None else [i for i, n in enumerate(names) if n in row.names]
        if not ranks:
            continue
        rejection = _reject(row, problem, target, table)
        if rejection is not None:
            rejected.append((ranks[0], place, Rejection(row.variant, *rejection)))
            continue
        step = next(i for i, c in enumerate(problem.chain) if _has(row, problem, c))
        able.append((ranks[0], step, place, row))
    able.sort(key=lambda item: item[:3])
    rejected.sort(key=lambda item: item[:2])
    return [(row, problem.chain[step]) for _, step, _, row in able], [r for *_, r in rejected]


def _hint(
    problem: Problem, target: Target, names: tuple[str, ...] | None, table: Sequence[Row]
) -> str:
    """What would run: by another variant as asked, else with other arithmetic, else with both."""
    relaxed = dataclasses.replace(problem, compute="auto")
    for attempt, request, change in (
        (problem, None, "implementation=None"),
        (relaxed, names, "compute='auto'"),
        (relaxed, None, "implementation=None and compute='auto'"),
    ):
        able, _ = _weigh(attempt, target, request, table)
        if able:
            row, compute = able[0]
            return f"with {change}, {row.variant} runs it as {compute}"
    return "no variant of this table can"


# --- Requirements, in the order in which they are asked: what cannot change before what can. ---


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
    here = [r.variant for r in table if r.sms and target.sm in r.sms and r.never is None]
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
    return (
        f"requires {formats} weights; got {problem.weight_format}: quantise to {formats} with "
        "jaxmoe.quantize"
    )


def _compute(row: Row, problem: Problem, target: Target, table: Sequence[Row]) -> str | None:
    if any(_has(row, problem, compute) for compute in problem.chain):
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
    if problem.activation_dtype in row.activation_dtypes:
        return None
    dtypes = " or ".join(sorted(row.activation_dtypes))
    return f"requires x of dtype {dtypes}; got {problem.activation_dtype}: cast x"


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
        f"source with nvcc and -C cmake.define.JAXMOE_CUDA_FAMILIES={row.family}"
    )


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
    (Reason.CPU_FEATURE_MISSING, _features),
    (Reason.NOT_BUILT, _built),
    (Reason.SELF_TEST_FAILED, _self_test),
)


def _reject(
    row: Row, problem: Problem, target: Target, table: Sequence[Row]
) -> tuple[Reason, str] | None:
    """The first requirement that fails, or None where the row can run the problem."""
    for reason, requirement in _REQUIREMENTS:
        detail = requirement(row, problem, target, table)
        if detail is not None:
            if reason is None:
                assert row.never is not None
                reason = row.never[0]
            return reason, detail
    return None


def _rejection_table(rejected: Sequence[Rejection], width: int = 100) -> list[str]:
    """Lines of an aligned table; neighbours with the same reason and sentence share a row."""
    merged: list[tuple[list[str], Reason, str]] = []
    for variant, reason, detail in rejected:
        if merged and merged[-1][1:] == (reason, detail):
            merged[-1][0].append(variant)
        else:
            merged.append(([variant], reason, detail))
    first = max(len(v) for v, _, _ in rejected) + 3
    second = max(len(r.name) for _, r, _ in rejected) + 2
    lines = []
    for variants, reason, detail in merged:
        sentence = textwrap.wrap(detail, max(40, width - first - second - 2))
        for i in range(max(len(variants), len(sentence))):
            variant = variants[i] if i < len(variants) else ""
            name = reason.name if i == 0 else ""
            text = sentence[i] if i < len(sentence) else ""
            lines.append(f"  {variant:<{first}}{name:<{second}}{text}".rstrip())
    return lines
