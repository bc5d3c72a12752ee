"""A native library's own account of its kernels, compared with the table in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jaxmoe.capability.table import Row


def check_manifest(manifest: Mapping[str, Any], rows: Iterable[Row]) -> list[str]:
    """What a library says of itself and the table does not, and the other way round.

    >>> from jaxmoe.capability import TABLE, check_manifest
    >>> check_manifest(jaxmoe._cpu.manifest(), [r for r in TABLE if r.family == "cpu"])
    []

    Args:
      manifest: `{"variants": {name: {"features": [...]}}, "formats": [...], "activations": [...],
        "layout": name}`, with `"ops"` optional. A variant may also state `activation_dtypes`,
        `sms` and `smem_bytes`, which are then compared.
      rows: the rows that this library ought to serve.

    Returns:
      One sentence for each difference; empty where both agree.
    """
    rows = {row.variant: row for row in rows if row.never is None}
    variants = manifest["variants"]
    found = [
        f"{v}: in the table, but the library has no such kernel" for v in rows.keys() - variants
    ]
    found += [f"{v}: in the library, but the table has no such row" for v in variants.keys() - rows]

    def compare(who: str, what: str, library: Any, table: Any) -> None:
        if isinstance(library, (list, tuple, set, frozenset)):
            library, table = sorted(library), sorted(table or ())
        if library != table:
            found.append(f"{who}: {what} is {library} in the library, {table} in the table")

    for variant in variants.keys() & rows.keys():
        row, entry = rows[variant], variants[variant]
        compare(variant, "features", entry.get("features", []), row.features)
        for what in ("activation_dtypes", "sms", "smem_bytes"):
            if what in entry:
                compare(variant, what, entry[what], getattr(row, what))
        compare(variant, "formats", manifest["formats"], row.weight_formats)
        compare(variant, "activations", manifest["activations"], row.activations)
        compare(variant, "layout", manifest["layout"], row.layout)
        if "ops" in manifest:
            compare(variant, "ops", manifest["ops"], row.ops)
    return sorted(found)
