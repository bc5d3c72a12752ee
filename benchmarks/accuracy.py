"""What W4A16, W4A8 and W4A4 cost in accuracy: on random layers, and on the bundled model.

    python benchmarks/accuracy.py
    python benchmarks/accuracy.py --model --bytes 65536

The first is NumPy in float64 with the roundings of each arithmetic written in: no kernel runs. One
expert of qwen3-30b-a3b's sizes, SwiGLU, 64 tokens; weights are normally distributed and then
quantised. x is normally distributed; or every 64th of its channels is 30 times larger; or it has
Student's t distribution with 3 degrees of freedom. Errors are relative L2 distances of y, from
the same quantised weights without any rounding ("arithmetic") and from the weights before they were
quantised ("all").

The second runs the bundled model on held-out text in plain JAX, with the experts' activations
quantised by each arithmetic and everything else in float32: bits per byte.

`docs/accuracy.md` has the figures.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from types import MappingProxyType
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxmoe
from jaxmoe.kernels import judge

TOKENS, HIDDEN, INTERMEDIATE = 64, 2048, 768
HELDOUT = Path(__file__).parents[1] / "examples" / "tiny-bf16"


def bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def exact(x: np.ndarray) -> np.ndarray:
    return x


def folded(w: np.ndarray) -> np.ndarray:
    """Weights in e4m3, with the least power of two for each row that keeps it within 448."""
    values, factor = judge.FP8_ROWS.rows(w)
    return values * factor


def int8(block: int) -> judge.Arithmetic:
    """Blocks of integers times amax / 127, as llama.cpp's q8_0 has them for 32."""

    def rows(x):
        blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
        unit = np.abs(blocks).max(-1, keepdims=True) / 127
        unit = np.where(unit == 0, 1, unit)
        return (np.rint(blocks / unit) * unit).reshape(x.shape), 1.0

    return judge.Arithmetic(rows, exact, exact)


EXACT = judge.Arithmetic(lambda x: (x, 1.0), exact, exact)

# name -> format, what is done to the quantised weights, what is rounded around the products
CASES = {
    "W4A16, NVFP4": ("nvfp4", exact, judge.BF16),
    "W4A16, MXFP4": ("mxfp4", exact, judge.BF16),
    "W4A8, MXFP4 × FP8 (e4m3 per token)": ("mxfp4", exact, judge.FP8_ROWS),
    "W4A8, MXFP4 × MXFP8": ("mxfp4", exact, judge.MXFP8),
    "W4A8 on CPUs, NVFP4 × int8": ("nvfp4", exact, judge.INT8),
    "W4A8 on CPUs, MXFP4 × int8": ("mxfp4", exact, judge.INT8),
    "NVFP4 × int8, amax / 127 of 16": ("nvfp4", exact, int8(16)),
    "NVFP4 × int8, amax / 127 of 32": ("nvfp4", exact, int8(32)),
    "W4A4, NVFP4 × NVFP4": ("nvfp4", exact, judge.NVFP4),
    "NVFP4 folded into e4m3, bf16 activations": ("nvfp4", folded, judge.BF16),
    "NVFP4 folded into e4m3, FP8 activations": ("nvfp4", folded, judge.FP8_ROWS),
}


def mlp(x, gate_up, down, arithmetic, result=exact):
    """SwiGLU MLP with the roundings of an arithmetic; `result` is what is left of y."""

    def product(rows, w):
        values, factor = arithmetic.rows(rows)
        return arithmetic.sums(values @ w.T) * factor

    gate, up = np.split(product(x, gate_up), 2, axis=-1)
    h = arithmetic.inner(gate / (1 + np.exp(-gate)) * up)
    return result(product(h, down))


def distance(y: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(y - want) / np.linalg.norm(want))


def layers() -> None:
    """Prints the errors of one random expert."""
    rng = np.random.default_rng(0)
    shapes = ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    weights = [rng.standard_normal(shape) / shape[1] ** 0.5 for shape in shapes]
    normal = rng.standard_normal((TOKENS, HIDDEN))
    inputs = {
        "normal x": normal,
        "x with outliers": normal * np.where(np.arange(HIDDEN) % 64 == 0, 30.0, 1.0),
        "x of Student's t": rng.standard_t(3, (TOKENS, HIDDEN)) / 3**0.5,
    }
    quantised = {}
    for fmt in ("nvfp4", "mxfp4"):
        tensors = [jaxmoe.quantize(jnp.asarray(w, jnp.float32), fmt) for w in weights]
        quantised[fmt] = [np.asarray(jaxmoe.dequantize(q)).astype(np.float64) for q in tensors]
    print(f"{'':42}" + "".join(f"{name:>22}" for name in inputs))
    print(f"{'':42}" + f"{'arithmetic':>13}{'all':>9}" * len(inputs))
    for name, (fmt, fold, arithmetic) in CASES.items():
        errors = []
        for x in map(bf16, inputs.values()):
            y = mlp(x, *(fold(w) for w in quantised[fmt]), arithmetic, bf16)
            errors += [distance(y, mlp(x, *w, EXACT)) for w in (quantised[fmt], weights)]
        columns = "".join(f"{e:13.2%}" if i % 2 == 0 else f"{e:9.2%}" for i, e in enumerate(errors))
        print(f"{name:42}{columns}")
    for fmt, values in quantised.items():
        lost = [distance(folded(v), v) for v in values]
        print(f"{fmt} weights folded into e4m3: off by {lost[0]:.2%} and {lost[1]:.2%}")


# --- the bundled model ----------------------------------------------------------------------------


def fp8_rows(x: jax.Array, input_scale: None) -> tuple[jax.Array, jax.Array]:
    """What `sm90_w4a8` multiplies, in JAX: e4m3 and the least power of two of each row."""
    largest = jnp.abs(x).max(-1, keepdims=True)
    s = jnp.exp2(jnp.ceil(jnp.log2(jnp.where(largest > 0, largest, 448) / 448)))
    return (x / s).astype(jnp.float8_e4m3fn).astype(jnp.bfloat16), s


# name -> format, implementation, compute, what stands in for the rule of MXFP8
MODELS = {
    "W16A16, bf16": ("bf16", "xla", "auto", None),
    "W4A16, NVFP4": ("nvfp4", "xla", "w4a16", None),
    "W4A16, MXFP4": ("mxfp4", "xla", "w4a16", None),
    "W4A8, MXFP4 × FP8 (e4m3 per token)": ("mxfp4", "xla_w4a8", "w4a8", fp8_rows),
    "W4A8, MXFP4 × MXFP8": ("mxfp4", "xla_w4a8", "w4a8", None),
    "W4A8 on CPUs, NVFP4 × int8": ("nvfp4", "cpu", "w4a8", None),
    "W4A8 on CPUs, MXFP4 × int8": ("mxfp4", "cpu", "w4a8", None),
    "W4A4, NVFP4 × NVFP4": ("nvfp4", "xla_w4a4", "w4a4", None),
}


def bundled(size: int) -> None:
    """Prints the bits per byte of the bundled model on the first `size` bytes of held-out text."""
    from flax import nnx

    from jaxmoe import models
    from jaxmoe.kernels import operands
    from jaxmoe.nn import MoE

    text = b"\n".join(path.read_bytes() for path in sorted((HELDOUT / "heldout").glob("*.txt")))
    text = text[:size]
    print(f"{len(text):,} bytes")
    first = None
    for name, (weight_format, implementation, compute, rule) in MODELS.items():
        start = time.monotonic()
        experts = HELDOUT if weight_format == "bf16" else None
        model = models.load(models.bundled(), weight_format, experts=experts, dtype=jnp.float32)
        for _, layer in nnx.iter_graph(model):
            if isinstance(layer, MoE):
                layer.implementation, layer.compute = implementation, compute
        rules = {**operands.OPERANDS, **({} if rule is None else {"w4a8": rule})}
        with mock.patch.object(operands, "OPERANDS", MappingProxyType(rules)):
            jax.clear_caches()  # the rule is no part of their keys
            bits = models.evaluate(model, text).bits_per_byte
        first = first or bits
        seconds = time.monotonic() - start
        print(f"{name:36} {bits:.4f}  {bits / first - 1:+.2%}  ({seconds:.0f} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="store_true", help="the bundled model, not a layer")
    parser.add_argument("--bytes", type=int, default=1 << 16, help="of held-out text")
    arguments = parser.parse_args()
    run = functools.partial(bundled, arguments.bytes) if arguments.model else layers
    run()


if __name__ == "__main__":
    main()
