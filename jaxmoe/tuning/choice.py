"""The choice of a tactic while a function is traced: forced, from a table, or the library's own."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from jaxmoe.tuning.key import Key
from jaxmoe.tuning.tables import Entry, cache_path, load, shipped_path

_logger = logging.getLogger("jaxmoe")

# A plain global or context variable would leave stale results in jit's cache. JAX asks that user
# contexts are made while no other JAX call runs, hence at import.
_override = jax.make_user_context(None)


class Choice(NamedTuple):
    """A tactic and the sentence that says where it comes from.

    `tactic` is "" where the library chooses by itself; both are "" for a variant without tactics.
    """

    tactic: str
    why: str


@contextlib.contextmanager
def override(tactic: str | None) -> Iterator[None]:
    """Within the block, functions are traced for that tactic, whatever the tables say.

    >>> from jaxmoe import tuning
    >>> with tuning.override("wgmma64"):
    ...     tuning.lookup(key, tactics=["wgmma64"], build="any").why      # doctest: +SKIP
    'forced by jaxmoe.tuning.override'

    The tactic is part of the jit cache key: a jitted function is traced again where it differs.

    Args:
      tactic: name of a tactic; a call whose variant does not have it is an error. "" forces the
        library's own choice; None ends the effect of an outer block.

    Raises:
      ValueError: `tactic` is neither a string nor None.
    """
    if tactic is not None and not isinstance(tactic, str):
        raise ValueError(
            f"tactic must be a string or None, got {tactic!r}; "
            "jaxmoe.kernels.tactics(variant) lists the names"
        )
    with _override(tactic):
        yield


def lookup(key: Key, tactics: Collection[str], build: str) -> Choice:
    """The tactic for a problem: that of `override`, of the user's cache, of the package, or "".

    >>> from jaxmoe.capability import Problem, Target, resolve
    >>> problem = Problem(weight_format="nvfp4", hidden_size=2048, intermediate_size=768,
    ...                   num_experts=128, top_k=8, tokens=64)
    >>> key = Key.of(resolve(problem, Target.from_name("h100")))
    >>> lookup(key, tactics=["wgmma64"], build="0123456789ab").tactic
    ''

    Args:
      key: the problem.
      tactics: what the library has for the variant.
      build: id of the library build.

    Raises:
      ValueError: `override` forces a tactic that the variant does not have.
    """
    forced = _override.value
    if forced is not None:
        if forced and forced not in tactics:
            raise ValueError(
                f"tactic must be one that {key.variant} has for {key.compute} "
                f"({', '.join(tactics) or 'none'}), got {forced!r} from jaxmoe.tuning.override; "
                "leave that out, or pass an implementation that has the tactic"
            )
        return Choice(forced, "forced by jaxmoe.tuning.override")
    if not tactics:
        return Choice("", "")
    user, shipped = cache_path(), shipped_path(key.device)
    of_user = {at: entry for at, entry in load(user).items() if at[0] == key}
    of_package = [entry for (at, _), entry in load(shipped).items() if at == key]
    for path, entry in [
        *((user, entry) for (_, of), entry in of_user.items() if of == build),
        *((shipped, entry) for entry in of_package),
    ]:
        if entry.tactic and entry.tactic not in tactics:
            _warn_unknown(path, entry, tuple(tactics))
            continue
        return Choice(entry.tactic, f"tuned by {path} ({entry})")
    why = "the library's own choice"
    if of_user and (key, build) not in of_user:
        why += f"; {user} was tuned with another build of it: run `jaxmoe tune` again"
    return Choice("", why)


@functools.cache
def _warn_unknown(path: Path, entry: Entry, tactics: tuple[str, ...]) -> None:
    _logger.warning(
        "%s names the tactic %r for %s, which this library does not have (it has %s); the entry is "
        "ignored. Run `jaxmoe tune` again.",
        path,
        entry.tactic,
        entry.key.variant,
        ", ".join(tactics),
    )
