"""Error of W4A16, of W4A8, and of what W4A8 could not do: NVFP4 weights folded into e4m3.

    python benchmarks/accuracy.py

NumPy in float64 with the roundings of each arithmetic written in: no kernel runs. One expert of
qwen3-30b-a3b's sizes, SwiGLU, 64 tokens; weights are normally distributed and then quantised. x is
normally distributed, or every 64th of its channels is 30 times larger. Errors are relative L2
distances of y, from the same quantised weights without any rounding ("arithmetic") and from the
weights before they were quantised ("all"). `docs/accuracy.md` has the figures.
"""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxmoe

TOKENS, HIDDEN, INTERMEDIATE = 64, 2048, 768


def bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def fp8_rows(x: np.ndarray) -> np.ndarray:
    """e4m3 times the least power of two for each row that keeps it within 448."""
    s = 2.0 ** np.ceil(np.log2(np.abs(x).max(axis=-1, keepdims=True) / 448))
    return (x / s).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * s


def mlp(x, gate_up, down, operand, result):
    """SwiGLU MLP: `operand` rounds what a product reads, `result` what it leaves."""
    gate, up = np.split(operand(x) @ gate_up.T, 2, axis=-1)
    h = result(gate / (1 + np.exp(-gate)) * up)
    return result(operand(h) @ down.T)


def distance(y: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(y - want) / np.linalg.norm(want))


def exact(x: np.ndarray) -> np.ndarray:
    return x


# name -> format, what is done to the quantised weights, to the operands, to the results
CASES = {
    "W4A16, NVFP4": ("nvfp4", exact, exact, bf16),
    "W4A16, MXFP4": ("mxfp4", exact, exact, bf16),
    "W4A8, MXFP4": ("mxfp4", exact, fp8_rows, bf16),
    "NVFP4 folded into e4m3, bf16 activations": ("nvfp4", fp8_rows, exact, bf16),
    "NVFP4 folded into e4m3, FP8 activations": ("nvfp4", fp8_rows, fp8_rows, bf16),
}


def main() -> None:
    rng = np.random.default_rng(0)
    shapes = ((2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
    weights = [rng.standard_normal(shape) / shape[1] ** 0.5 for shape in shapes]
    normal = rng.standard_normal((TOKENS, HIDDEN))
    outliers = normal * np.where(np.arange(HIDDEN) % 64 == 0, 30.0, 1.0)
    quantised = {}
    for fmt in ("nvfp4", "mxfp4"):
        tensors = [jaxmoe.quantize(jnp.asarray(w, jnp.float32), fmt) for w in weights]
        quantised[fmt] = [np.asarray(jaxmoe.dequantize(q)).astype(np.float64) for q in tensors]
    print(f"{'':44}{'normal x':>22}{'x with outliers':>22}")
    print(f"{'':44}" + f"{'arithmetic':>13}{'all':>9}" * 2)
    for name, (fmt, fold, operand, result) in CASES.items():
        errors = []
        for x in map(bf16, (normal, outliers)):
            y = mlp(x, *(fold(w) for w in quantised[fmt]), operand, result)
            references = (quantised[fmt], weights)
            errors += [distance(y, mlp(x, *w, exact, exact)) for w in references]
        print(f"{name:44}{errors[0]:13.2%}{errors[1]:9.2%}{errors[2]:13.2%}{errors[3]:9.2%}")
    for fmt, values in quantised.items():
        lost = [distance(fp8_rows(v), v) for v in values]
        print(f"{fmt} weights folded into e4m3: off by {lost[0]:.2%} and {lost[1]:.2%}")


if __name__ == "__main__":
    main()
