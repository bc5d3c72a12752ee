"""A native library's own account of its kernels, compared with the table in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxmoe.capability.table import Row


def check_manifest(manifest: Mapping[str, Any], rows: Iterable[Row]) -> list[str]:
    """What a library says of itself and the table does not, and the other way round.

    >>> from jaxmoe.capability import TABLE, check_manifest
    >>> manifest = {"variants": {}, "formats": [], "activations": []}
    >>> check_manifest(manifest, [row for row in TABLE if row.variant == "cpu_avx2"])
    ['cpu_avx2: in the table, but the library has no such kernel']

    Args:
      manifest: `{"variants": {name: {"layout": name, "features": [...]}}, "formats": [...],
        "activations": [...]}`. What a variant states itself (`formats` of its own, say) is stronger
        than what the library states for all; `ops`, `activation_dtypes`, `sms` and `smem_bytes` are
        compared where stated.
      rows: the rows that this library ought to serve.

    Returns:
      One sentence for each difference; empty where both agree.
    """
    table = {row.variant: row for row in rows if row.never is None}
    library = manifest["variants"]
    found = [
        f"{v}: in the table, but the library has no such kernel" for v in table.keys() - library
    ]
    found += [f"{v}: in the library, but the table has no such row" for v in library.keys() - table]
    for variant in table.keys() & library.keys():
        stated = {**manifest, "features": [], **library[variant]}
        for what, attribute in _COMPARED.items():
            if what not in stated and what not in _REQUIRED:
                continue
            theirs, ours = _plain(stated[what]), _plain(getattr(table[variant], attribute))
            if theirs != ours:
                found.append(f"{variant}: {what}: {theirs} in the library, {ours} in the table")
    return sorted(found)


# What a manifest calls a property -> what a row calls it.
_COMPARED = {
    "features": "features",
    "formats": "weight_formats",
    "activations": "activations",
    "layout": "layout",
    "ops": "ops",
    "activation_dtypes": "activation_dtypes",
    "sms": "sms",
    "smem_bytes": "smem_bytes",
}
_REQUIRED = ("formats", "activations", "layout")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, tuple, set, frozenset)) else value
