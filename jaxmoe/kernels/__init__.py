"""Kernels: one module per family behind one dispatch.

To add a GPU family: add its rows to the capability table, its layout to `layouts.LAYOUTS`, and what
its kernels round to `judge` where no other family rounds that. Nothing else asks which family a
variant belongs to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from jaxmoe import capability, tuning
from jaxmoe.capability import TABLE, Problem, Resolution, Row
from jaxmoe.experts import CANONICAL, ExpertWeights, PreparedMatrix, format_of, is_plain
from jaxmoe.kernels import cpu, layouts, panel, xla
from jaxmoe.kernels.gpu import GPU_FAMILIES
from jaxmoe.kernels.xla import MlpConfig
from jaxmoe.quantization import QuantizedTensor

FAMILIES: Mapping[str, Any] = MappingProxyType({"cpu": cpu, **GPU_FAMILIES})
_ROWS: Mapping[str, Row] = MappingProxyType({row.variant: row for row in TABLE})
_disqualified: dict[str, str] = {}


@functools.cache
def _libraries() -> tuple[frozenset[str], frozenset[str]]:
    """Built variants and the features of this machine's CPU, asked of the libraries once."""
    built: set[str] = set()
    features: set[str] = set()
    for family in FAMILIES.values():
        module, _ = family.library()
        if module is not None:
            built |= set(module.manifest()["variants"])
            features |= family.features()
    return frozenset(built), frozenset(features)


def installation() -> dict[str, Any]:
    """What `Target` wants to know of this process: built variants, CPU features, failed tests."""
    built, features = _libraries()
    return {"built": built, "features": features, "disqualified": dict(_disqualified)}


def select(problem: Problem, implementation: Any = None) -> Resolution:
    """Resolves `problem` for the current target; the selected kernel has passed its self-test.

    A variant is tested when it is first selected. One that fails is disqualified, with the reason
    in every later `Resolution`, and the next best is taken.
    """
    while True:
        resolution = capability.select(problem, implementation, **installation())
        row = _ROWS[resolution.variant]
        if row.family not in FAMILIES or capability.current_override().target is not None:
            break  # nothing native, or tracing for a machine that may not be this one
        why = FAMILIES[row.family].self_test(row.variant)
        if not why:
            break
        _disqualified[row.variant] = why
    return with_tactic(resolution)


def with_tactic(resolution: Resolution) -> Resolution:
    """Adds which tactic runs `resolution.problem`, where its number of tokens is known."""
    if resolution.selected is None or resolution.problem.tokens is None:
        return resolution
    choice = _choice(tuning.Key.of(resolution))
    return dataclasses.replace(resolution, tactic=choice.tactic, tactic_by=choice.why)


def tactics(variant: str, compute: str | None = None) -> Mapping[str, int]:
    """What the library can be told to take for a variant, with its bytes of shared memory.

    Empty for a variant that has no choice, or whose library is not built. A CPU's take 0 bytes.

    Args:
      variant: the kernel variant.
      compute: its arithmetic, where a variant has several with tactics of their own; None: all.
    """
    manifest = _manifest(variant)
    stated = manifest["variants"].get(variant, {}) if manifest else {}
    found = stated.get("tactics", {})
    if compute is None or "computes" not in stated:
        return found
    return {name: found[name] for name in stated["computes"][compute]}


def build_id(variant: str) -> str:
    """Id of the build of the variant's library: that of its sources and compiler."""
    return _manifest(variant)["build"]


def _manifest(variant: str) -> Mapping[str, Any]:
    family = _ROWS[variant].family
    module = FAMILIES[family].library()[0] if family in FAMILIES else None
    return {} if module is None else module.manifest()


def _choice(key: tuning.Key) -> tuning.Choice:
    names = tuple(tactics(key.variant, key.compute))
    return tuning.lookup(key, names, build_id(key.variant) if names else "")


def layout_for(
    experts: ExpertWeights | QuantizedTensor, variant: str | None, gated: bool, compute: str
) -> str:
    """The layout that `variant`, or the variant selected for the current target, reads."""
    grouped = isinstance(experts, QuantizedTensor)
    w = experts if isinstance(experts, QuantizedTensor) else experts.down
    if is_plain(w):
        return CANONICAL
    problem = Problem(
        op="grouped_matmul" if grouped else "moe_mlp",
        weight_format=format_of(w).name,
        compute=compute,
        activation_dtype="bfloat16",
        activation="swiglu" if gated else "identity",
        bias=False,
        hidden_size=w.shape[2 if grouped else 1],  # K of a single matrix
        intermediate_size=w.shape[1 if grouped else 2],
        num_experts=w.shape[0],
        top_k=1,
        declared_compute=(experts.declared_compute if isinstance(experts, ExpertWeights) else None),
    )
    return _ROWS[select(problem, variant).variant].layout


def to_layout(w: Any, layout: str, *, gated: bool) -> PreparedMatrix:
    """A canonical matrix in another layout."""
    packed = layouts.pack(w, layout, gated)
    if layout == panel.NAME:
        cpu.use_huge_pages(packed.data)
    return packed


def lay_out(weights: Any, resolution: Resolution, gated: bool) -> Any:
    """`weights` as the selected variant reads them: as they are, or rearranged inside this call.

    Raises:
      ValueError: if they were prepared for a variant of another layout.
    """
    row = _ROWS[resolution.variant]
    w = weights.down if isinstance(weights, ExpertWeights) else weights
    have = w.layout if isinstance(w, PreparedMatrix) else CANONICAL
    if have == row.layout:
        return weights
    if have != CANONICAL:
        compute = resolution.compute
        readers = [
            {c for _, c in r.arithmetic}
            for r in TABLE
            if r.layout == have and not r.never and row.platform in (None, r.platform)
        ]
        others = sorted(set().union(*(c for c in readers if compute not in c)))
        as_they_are = [f"compute={c!r} to use them as they are" for c in others]
        ways_out = ["the canonical weights", f"prepare(weights, {row.variant!r}, {compute=})"]
        raise ValueError(
            f"weights were prepared in layout {have!r}, but {row.variant}, which was selected for "
            f"this call, reads {row.layout!r}; pass {', or '.join(ways_out + as_they_are)}"
        )
    if not isinstance(weights, ExpertWeights):
        return to_layout(weights, row.layout, gated=gated)
    return dataclasses.replace(
        weights,
        gate_up=to_layout(weights.gate_up, row.layout, gated=gated),
        down=to_layout(weights.down, row.layout, gated=False),
    )


def moe_mlp(key: tuning.Key, config: MlpConfig, x: jax.Array, *operands: Any) -> jax.Array:
    """Runs `key.variant` by its tactic for this T; the operands are those of `xla.moe_mlp`."""
    run = implementation(key.variant)
    return run(config, key.variant, x, *operands, **_attributes(key, x))


def implementation(variant: str) -> Callable[..., jax.Array]:
    """What runs a variant: `f(config, variant, x, *operands, **attributes)`, see `moe_mlp`."""
    family = _ROWS[variant].family
    return FAMILIES[family].moe_mlp if family in FAMILIES else _xla_moe_mlp


def _xla_moe_mlp(config: MlpConfig, variant: str, *operands: Any) -> jax.Array:
    return xla.moe_mlp(config, *operands, quantised=_quantised(variant))


def grouped_matmul(key: tuning.Key, x: jax.Array, *operands: Any) -> jax.Array:
    """As `moe_mlp`, with the operands of `xla.grouped_matmul`."""
    family, attributes = _ROWS[key.variant].family, _attributes(key, x)
    if family in FAMILIES:
        return FAMILIES[family].grouped_matmul(key.variant, x, *operands, **attributes)
    return xla.grouped_matmul(x, *operands, quantised=_quantised(key.variant))


def _quantised(variant: str) -> str | None:
    """By which arithmetic an xla variant quantises activations; None if it does not."""
    ((_, compute), *others) = _ROWS[variant].arithmetic
    return None if others else compute


def _attributes(key: tuning.Key, x: jax.Array) -> dict[str, str]:
    """What a library wants to be told: the tactic, unless it chooses by itself, and the arithmetic,
    where the variant has several.
    """
    attributes = {}
    if tactic := _choice(key.at(x.shape[0])).tactic:
        attributes["tactic"] = tactic
    if len(_ROWS[key.variant].computes(key.weight_format)) > 1:
        attributes["compute"] = key.compute
    return attributes
