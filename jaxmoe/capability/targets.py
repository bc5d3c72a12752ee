"""The machine that a problem is to run on, as a value: also one that is not here."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxmoe.capability.table import DEVICE_SMS

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_SM = re.compile(r"(?:sm_?|compute_?)?([5-9]\d|\d{3})[af]?|(\d{1,2})\.(\d)[af]?")
_DEVICES = sorted(DEVICE_SMS.items(), key=lambda item: -len(item[0]))


def _words(kind: str) -> str:
    """The words of a device name, lower case, set off by single blanks on both sides."""
    return " ".join(["", *re.findall(r"[a-z0-9]+", kind.lower()), ""])


def _identify(kind: str) -> tuple[str, int | None] | None:
    """Platform and SM of a device name, or None where the name says nothing."""
    name = kind.strip().lower()
    if name in ("cpu", "tpu", "rocm"):
        return name, None
    if match := _SM.fullmatch(name):
        sm, major, minor = match.groups()
        return "cuda", int(sm) if sm else int(major) * 10 + int(minor)
    words = _words(kind)
    if words.startswith(" tpu "):
        return "tpu", None
    if name.startswith("gfx") or " amd " in words:
        return "rocm", None
    for device, sm_of_device in _DEVICES:
        if f" {device} " in words:
            return "cuda", sm_of_device
    if name in ("unknown", "cuda", "gpu") or " nvidia " in words:
        return "cuda", None
    return None


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine, as far as the choice of a kernel depends on it. Hashable, holds no device.

    >>> Target.from_name("RTX 5090").sm
    120
    >>> Target.from_name("sm_90a").name
    'sm_90'

    Args:
      platform: `cpu`, `cuda`, `rocm`, `tpu`, or what else XLA calls it.
      sm: `major * 10 + minor` of a CUDA device, None where unknown or of another platform.
      device_kind: the device's name, for messages.
      features: CPU features, as the native library names them (`avx512f`).
      built: variants that this installation has kernels for.
      disqualified: variants that failed their self-test, with what was wrong.
    """

    platform: str
    sm: int | None = None
    device_kind: str = ""
    features: frozenset[str] = frozenset()
    built: frozenset[str] = frozenset()
    disqualified: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if self.sm is not None and self.platform != "cuda":
            raise ValueError(
                f"sm is for platform 'cuda' alone; got sm={self.sm} with platform "
                f"{self.platform!r}: leave sm out, or set platform='cuda'"
            )
        pairs = tuple(sorted(dict(self.disqualified).items()))
        object.__setattr__(self, "disqualified", pairs)
        object.__setattr__(self, "features", frozenset(self.features))
        object.__setattr__(self, "built", frozenset(self.built))

    @property
    def name(self) -> str:
        """Short name: `sm_120`, `cpu`, `tpu`, `cuda`."""
        return self.platform if self.sm is None else f"sm_{self.sm}"

    def __str__(self) -> str:
        kind = self.device_kind
        return f"{self.name} ({kind})" if kind and kind != self.name else self.name

    @classmethod
    def from_name(cls, name: str, **info: Any) -> Target:
        """The target that a name stands for: `cpu`, `tpu`, `sm_120`, `12.0`, `H100`, `rtx 5090`.

        >>> Target.from_name("gb10")  # doctest: +ELLIPSIS
        Target(platform='cuda', sm=121, device_kind='gb10', ...)

        Args:
          name: platform, SM, compute capability, or device name, in any case. `unknown` is a
            CUDA device of unknown SM.
          **info: `features`, `built`, `disqualified`. `features` are kept for a CPU alone.

        Raises:
          ValueError: the name says nothing about platform or SM.
        """
        found = _identify(name)
        if found is None:
            known = (*_PLATFORMS, "unknown", "sm_90", *DEVICE_SMS)
            close = difflib.get_close_matches(name.lower(), known, n=1)
            raise ValueError(
                f"target {name!r} is unknown: name a platform ({', '.join(_PLATFORMS)}), an SM "
                f"('sm_120' or '12.0') or one of the devices {', '.join(DEVICE_SMS)}"
                + (f"; did you mean {close[0]!r}?" if close else "")
            )
        return cls._make(*found, name, **info)

    @classmethod
    def from_device(cls, device: Any, **info: Any) -> Target:
        """The target of a concrete `jax.Device`: its own compute capability, not its name, counts.

        >>> Target.from_device(jax.devices("cpu")[0]).name
        'cpu'

        Args:
          device: a `jax.Device`; its `platform`, `device_kind` and `compute_capability` are read.
          **info: `features`, `built`, `disqualified`.
        """
        platform, kind = device.platform.lower(), device.device_kind
        # JAX calls NVIDIA and AMD devices alike "gpu"; the compute capability tells "9.0" from
        # "gfx942".
        if platform in ("gpu", "cuda", "rocm"):
            capability = str(getattr(device, "compute_capability", ""))
            found = _identify(capability) or _identify(kind) or ("cuda", None)
            platform = "rocm" if platform == "rocm" else found[0]
            return cls._make(platform, found[1] if platform == "cuda" else None, kind, **info)
        return cls._make(platform, None, kind, **info)

    @classmethod
    def from_abstract(cls, device: Any, **info: Any) -> Target:
        """The target of a `jax.sharding.AbstractDevice`, which has a name but no capability.

        >>> device = jax.sharding.AbstractDevice("NVIDIA GB10", num_cores=None, platform="gpu")
        >>> Target.from_abstract(device).name
        'sm_121'

        Args:
          device: an `AbstractDevice`; its `device_kind` and, where JAX has it, `platform` are read.
          **info: `features`, `built`, `disqualified`.
        """
        kind = device.device_kind
        platform = (getattr(device, "platform", None) or "").lower()
        found = _identify(kind)
        if platform in ("", "gpu"):
            platform = found[0] if found else "cuda" if platform else "unknown"
        sm = found[1] if found and found[0] == platform == "cuda" else None
        return cls._make(platform, sm, kind, **info)

    @classmethod
    def _make(
        cls,
        platform: str,
        sm: int | None,
        device_kind: str,
        *,
        features: Iterable[str] = (),
        built: Iterable[str] = (),
        disqualified: Mapping[str, str] | tuple[tuple[str, str], ...] = (),
    ) -> Target:
        return cls(
            platform,
            sm,
            device_kind,
            # Another platform's kernels do not depend on the host's CPU; without them, a target
            # equals its namesake built on any machine.
            frozenset(features) if platform == "cpu" else frozenset(),
            frozenset(built),
            tuple(dict(disqualified).items()),
        )
