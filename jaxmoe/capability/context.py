"""Which target a function is traced for, and what is forced on it: part of the jit cache key."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax

from jaxmoe.capability.problem import Problem
from jaxmoe.capability.resolution import Resolution
from jaxmoe.capability.resolver import Request, requested_names, resolve
from jaxmoe.capability.table import TABLE
from jaxmoe.capability.targets import Target

_logger = logging.getLogger("jaxmoe")


@dataclasses.dataclass(frozen=True)
class Override:
    """What `override` put in force; None where nothing is."""

    target: Target | str | None = None
    implementation: str | tuple[str, ...] | None = None


# A plain global or context variable would leave stale results in jit's cache. JAX asks that user
# contexts are made while no other JAX call runs, hence at import.
_override = jax.make_user_context(Override())


@contextlib.contextmanager
def override(
    target: Target | str | None = None, implementation: Request = None
) -> Iterator[Override]:
    """Within the block, functions are traced for `target`, or by `implementation`.

    >>> from jaxmoe.capability import current_target, override
    >>> with override(target="sm_120", implementation="xla"):
    ...     print(current_target().name)
    sm_120

    The values are part of the jit cache key: a jitted function is traced again where they
    differ. Blocks nest; an argument that is None leaves what the outer block says. An
    `implementation` that a call itself passes is stronger than this one.

    Args:
      target: a `Target`, taken as it is, or a name (`sm_120`), to which this process adds what
        it has built.
      implementation: as for `moe_mlp`.

    Raises:
      ValueError: unknown target or implementation.
    """
    if isinstance(target, str):
        Target.from_name(target)  # a wrong name fails here, not at the next trace
    names = requested_names(implementation, TABLE)
    outer = _override.value
    value = Override(
        outer.target if target is None else target,
        outer.implementation if names is None else names,
    )
    with _override(value):
        yield value


def current_override() -> Override:
    """What the enclosing `override` blocks say."""
    return _override.value


def current_target(**info: Any) -> Target:
    """The target for which JAX is tracing now.

    >>> with override(target="b300"):
    ...     current_target().sm
    103

    In this order: the target of `override`, the device of the abstract mesh (lowering for a GPU
    that is not here), the default device.

    Args:
      **info: `features`, `built`, `disqualified` of this process, see `Target`.
    """
    forced = _override.value.target
    if isinstance(forced, Target):
        return forced
    if forced is not None:
        return Target.from_name(forced, **info)
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is None:
        return Target.from_device(_default_device(), **info)
    target = Target.from_abstract(abstract, **info)
    if target.platform == "cuda" and target.sm is None:
        # A mesh of the devices here, of a kind without an entry: they know their own SM.
        device = _default_device()
        if device.device_kind == abstract.device_kind:
            return Target.from_device(device, **info)
    return target


def _default_device() -> Any:
    default = jax.config.jax_default_device  # type: ignore[attr-defined]  # made at run time
    if default is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=default)[0] if isinstance(default, str) else default


def select(problem: Problem, implementation: Request = None, **info: Any) -> Resolution:
    """`resolve` for the current target and override; a degradation is logged once.

    >>> problem = Problem(weight_format="nvfp4", hidden_size=64, intermediate_size=64,
    ...                   num_experts=4, top_k=2)
    >>> with override(target="sm_120"):
    ...     select(problem, built={"sm80_w4a16"}).selected
    'sm80_w4a16'

    Args:
      problem: what to compute.
      implementation: as for `moe_mlp`; None leaves the choice to `override`, then to AUTO.
      **info: `features`, `built`, `disqualified` of this process, see `Target`.

    Raises:
      UnsupportedError: no variant asked for can run the problem.
    """
    if implementation is None:
        implementation = _override.value.implementation
    resolution = resolve(problem, current_target(**info), implementation)
    log_degradation(resolution)
    return resolution


_logged: set[tuple[str, ...]] = set()


def log_degradation(resolution: Resolution) -> None:
    """Warns on the logger `jaxmoe` that the arithmetic is not the declared one.

    Once a process for each variant, target and pair of declared and actual arithmetic.
    """
    if resolution.degraded_from is None:
        return
    problem, target = resolution.problem, resolution.target
    key = (
        problem.weight_format,
        resolution.degraded_from,
        str(resolution.compute),
        str(resolution.selected),
        str(target),
    )
    if key in _logged:
        return
    _logged.add(key)
    _logger.warning(
        "%s weights declare compute %s; %s runs them as %s (more accurate) on %s. "
        "`jaxmoe explain` says why; pass compute=%r to ask for this explicitly.",
        problem.weight_format,
        resolution.degraded_from,
        resolution.selected,
        resolution.compute,
        target,
        resolution.compute,
    )
