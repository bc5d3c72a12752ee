"""Bits per byte of the bundled model on held-out text: bf16 against NVFP4 and MXFP4.

    python examples/evaluate_tiny.py

The bf16 experts are in examples/tiny-bf16 (they are no part of the package), and so is the text:
documents of Python's documentation and library that the model was not trained on.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from jaxmoe import models
from jaxmoe import nn as moe_nn

FOLDER = Path(__file__).parent / "tiny-bf16"


def measure(
    bf16: Path = FOLDER, heldout: Path = FOLDER / "heldout", context: int | None = None
) -> dict[str, float]:
    """Returns the bits per byte of each format, in the order bf16, NVFP4, MXFP4."""
    documents = [path.read_bytes() for path in sorted(heldout.glob("*.txt"))]
    if not documents:
        raise SystemExit(f"no *.txt in {heldout}")
    print(f"{len(documents)} documents, {sum(map(len, documents)):,} bytes", flush=True)
    results = {}
    for weight_format in ("bf16", "nvfp4", "mxfp4"):
        start = time.monotonic()
        experts = bf16 if weight_format == "bf16" else None
        model = models.load(models.bundled(), weight_format, experts=experts)
        if weight_format != "bf16":
            model = moe_nn.prepare(model)
        score = models.evaluate(model, documents, context=context)
        bits = results[weight_format] = score.bits_per_byte
        change = bits / results["bf16"] - 1
        seconds = time.monotonic() - start
        print(f"{weight_format:6} {bits:.4f} bits per byte  {change:+.2%}  ({seconds:.0f} s)")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bf16", type=Path, default=FOLDER, help="folder of the bf16 experts")
    parser.add_argument("--heldout", type=Path, default=FOLDER / "heldout", help="folder of texts")
    parser.add_argument("--context", type=int, help="bytes per window (default: the model's)")
    measure(**vars(parser.parse_args()))
