"""Build the corpus of the bundled model: Python's own documentation and standard library.

Both halves are text under the PSF License Agreement. The documentation's reStructuredText sources
come with Debian's ``python3.11-doc`` package; it need not be installed:

    apt-get download python3.11-doc && dpkg -x python3.11-doc_*.deb doc
    python examples/corpus.py --docs doc/usr/share/doc/python3.11/html/_sources \\
        --out corpus.npz --heldout-folder examples/tiny-bf16/heldout

The standard library is that of the running interpreter (the bundled model: CPython 3.11.7).

The split is by topic, not by document: ``library/json.rst`` and the package ``json`` are on the
same side, because one quotes the other. Topics are taken in the order of the SHA-256 of their name
until the held-out share is full, so the split depends on names alone.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sysconfig
from collections import defaultdict
from pathlib import Path

import numpy as np

SEPARATOR = b"\0"  # stands before every document: "a document starts here"

# Tables, generated files, and pydoc's copy of the documentation, which would leak held-out text.
SKIPPED = {"encodings", "pydoc_data", "site-packages", "dist-packages", "test", "tests"}
SKIPPED |= {"__pycache__", "includes", "changelog.rst.txt"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


def documents(docs: Path, stdlib: Path) -> dict[str, bytes]:
    """Returns {name: UTF-8 text} of the documentation (``docs/…``) and the library (``lib/…``)."""
    found = {}
    for prefix, folder, pattern in (("docs", docs, "*.rst.txt"), ("lib", stdlib, "*.py")):
        for path in sorted(folder.rglob(pattern)):
            parts = path.relative_to(folder).parts
            if any(part in SKIPPED or part.startswith(SKIPPED_PREFIXES) for part in parts):
                continue
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            text = text.replace("\r\n", "\n").replace("\f", "").strip()
            if text and "\0" not in text:
                found["/".join((prefix, *parts))] = (text + "\n").encode()
    if not found:
        raise SystemExit(f"no *.rst.txt in {docs} and no *.py in {stdlib}: see --help")
    return found


def topic(name: str) -> str:
    """Everything about ``json``: ``docs/library/json.rst.txt``, ``lib/json/decoder.py``, …"""
    root, *parts = name.split("/")
    return re.split(r"[.-]", parts[0] if root == "lib" else parts[-1])[0].strip("_").lower()


def split(found: dict[str, bytes], heldout_bytes: int, largest: int = 40_000) -> set[str]:
    """Returns the held-out names: whole topics, about ``heldout_bytes`` in all.

    Topics with a document over ``largest`` bytes stay in training, so that the held-out text is
    many documents rather than three.
    """
    topics = defaultdict(list)
    for name in found:
        topics[topic(name)].append(name)
    heldout: set[str] = set()
    size = 0
    for key in sorted(topics, key=lambda key: hashlib.sha256(key.encode()).digest()):
        sizes = [len(found[name]) for name in topics[key]]
        if max(sizes) > largest or sum(sizes) < 1000 or size + sum(sizes) > heldout_bytes:
            continue
        heldout.update(topics[key])
        size += sum(sizes)
        if size > 0.97 * heldout_bytes:
            break
    return heldout


def join(texts: list[bytes]) -> np.ndarray:
    """Returns the texts as one uint8 stream, each after a separator."""
    return np.frombuffer(b"".join(SEPARATOR + text for text in texts), np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--docs", type=Path, default=Path("/usr/share/doc/python3.11/html/_sources")
    )
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_path("stdlib")))
    parser.add_argument("--heldout-bytes", type=int, default=160_000)
    parser.add_argument("--out", type=Path, default=Path("corpus.npz"))
    parser.add_argument("--heldout-folder", type=Path, help="also write the held-out texts here")
    args = parser.parse_args()

    found = documents(args.docs, args.stdlib)
    heldout = split(found, args.heldout_bytes)
    streams = {
        "train": join([text for name, text in found.items() if name not in heldout]),
        "heldout": join([text for name, text in found.items() if name in heldout]),
    }
    np.savez_compressed(args.out, **streams)
    for name, stream in streams.items():
        digest = hashlib.sha256(stream.tobytes()).hexdigest()[:16]
        print(f"{name}: {stream.size:,} bytes, sha256 {digest}…")
    for name in sorted(heldout):
        print(f"  held out: {name} ({len(found[name]):,} bytes)")
    if args.heldout_folder:
        args.heldout_folder.mkdir(parents=True, exist_ok=True)
        for name in heldout:
            flat = name.replace("/", ".").removesuffix(".txt") + ".txt"
            (args.heldout_folder / flat).write_bytes(found[name])


if __name__ == "__main__":
    main()
