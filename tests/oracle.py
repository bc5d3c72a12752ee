"""The independent judge: FP4 formats and Mixture-of-Experts in NumPy float64.

Written from the format definitions alone, so that it can disagree with the package. It imports
neither jax nor jaxmoe. Weights arrive as raw bits (`Bits`), everything is decoded to float64 by
integer arithmetic on those bits, and every sum runs in float64.

Format definitions: OCP Microscaling Formats (MX) v1.0 for e2m1, e8m0, MXFP4 and MXFP8; OCP FP8
(OFP8) v1.0 for e4m3; NVFP4 is e2m1 with an e4m3 scale per 16 elements and a float32 scale on top.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

BLOCK_SIZES = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32, "fp8": None, "bf16": None}


# --- formats ------------------------------------------------------------------------------------


def _minifloat(bits: np.ndarray, exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """Value of sign | exponent | mantissa, with subnormals and without any special code."""
    bits = np.asarray(bits, dtype=np.int64)
    mantissa = bits & ((1 << mantissa_bits) - 1)
    exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = np.where(bits >> (mantissa_bits + exponent_bits) & 1, -1.0, 1.0)
    significand = mantissa + np.where(exponent > 0, 1 << mantissa_bits, 0)
    return sign * np.ldexp(
        significand.astype(np.float64), np.maximum(exponent, 1) - bias - mantissa_bits
    )


def decode_e2m1(bits: np.ndarray) -> np.ndarray:
    """4-bit codes -> float64: 1 sign, 2 exponent (bias 1), 1 mantissa bit; no infinity, no NaN."""
    values = _minifloat(np.arange(16), 2, 1, 1)  # of every code: matrices have millions
    return values[np.asarray(bits)]


def decode_e4m3(bits: np.ndarray) -> np.ndarray:
    """8-bit codes -> float64: 1 sign, 4 exponent (bias 7), 3 mantissa bits; S.1111.111 is NaN."""
    bits = np.asarray(bits)
    return np.where((bits & 0x7F) == 0x7F, np.nan, _minifloat(bits, 4, 3, 7))


def decode_e8m0(bits: np.ndarray) -> np.ndarray:
    """8-bit codes -> float64: 2^(b - 127); 0xFF is NaN."""
    bits = np.asarray(bits, dtype=np.int64)
    return np.where(bits == 0xFF, np.nan, np.ldexp(1.0, bits - 127))


def decode_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 codes -> float64: the upper half of a float32."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes quiet
        return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    """uint8[..., K/2] -> codes[..., K]; even k in the low nibble."""
    packed = np.asarray(packed, dtype=np.uint8)
    pairs = np.stack([packed & 0xF, packed >> 4], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


@dataclass(frozen=True)
class Bits:
    """A weight as its stored bits.

    data: uint8[..., K/2] (packed e2m1), uint8[..., K] (e4m3) or uint16[..., K] (bf16).
    scale: uint8[..., K/block] codes (e4m3 for nvfp4, e8m0 for mxfp4 and mxfp8), else None.
    global_scale: float32 of shape data.shape[:-2] (nvfp4, fp8), else None.
    """

    format: str
    data: np.ndarray
    scale: np.ndarray | None = None
    global_scale: np.ndarray | None = None

    def decode(self) -> np.ndarray:
        """float64[..., K]: element * block scale * global scale."""
        if self.format in ("nvfp4", "mxfp4"):
            values = decode_e2m1(unpack_nibbles(self.data))
        elif self.format in ("mxfp8", "fp8"):
            values = decode_e4m3(self.data)
        else:
            values = decode_bf16(self.data)
        if self.scale is not None:
            decode_scale = decode_e4m3 if self.format == "nvfp4" else decode_e8m0
            scale = decode_scale(self.scale)
            values = values * np.repeat(scale, BLOCK_SIZES[self.format], axis=-1)
        if self.global_scale is not None:
            values = values * np.asarray(self.global_scale, np.float64)[..., None, None]
        return values


Weight = Bits | np.ndarray


def _decoded(w: Weight) -> np.ndarray:
    return w.decode() if isinstance(w, Bits) else np.asarray(w).astype(np.float64)


# --- arithmetic ---------------------------------------------------------------------------------
# What stands between the definition of a product in float64 and what is multiplied.


def rounded(x: np.ndarray, mantissa_bits: int, smallest_exponent: int) -> np.ndarray:
    """To the nearest number of so many mantissa bits, ties to even; no overflow.

    Below 2^smallest_exponent, the smallest normal number, steps stay as wide as just above it.
    """
    exponent = np.maximum(np.frexp(x)[1] - 1, smallest_exponent)  # frexp: in [0.5, 1)
    return np.ldexp(np.rint(np.ldexp(x, mantissa_bits - exponent)), exponent - mantissa_bits)


_DTYPES = {"bfloat16": (7, -126), "float16": (10, -14), "float32": (23, -126)}


def fp8_rows(x: np.ndarray, input_scale: float | None = None) -> np.ndarray:
    """float64: e4m3(x / s) s, where s of a row is the least power of two with max|x| / s <= 448.

    s is 1 for a row of zeros, and neither s nor 1 / s is a subnormal float32. Or s is
    `input_scale`: then x times 1 / s, both float32, and e4m3 saturates at 448.
    """
    if input_scale is not None:
        quotient = np.asarray(x).astype(np.float32) * (np.float32(1) / np.float32(input_scale))
        codes = np.clip(rounded(quotient.astype(np.float64), 3, -6), -448, 448)
        return codes * float(np.float32(input_scale))
    fraction, exponent = np.frexp(np.abs(x).max(-1, keepdims=True, initial=0) / 448)
    exponent = np.where(fraction == 0, 0, exponent - (fraction == 0.5))
    exponent = np.clip(exponent, -126, 126)
    return np.ldexp(rounded(np.ldexp(x, -exponent), 3, -6), exponent)


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest_e2m1(magnitude: np.ndarray) -> np.ndarray:
    """Codes 0 ... 7 of the nearest magnitudes, ties to the even code."""
    distance = np.abs(np.asarray(magnitude)[..., None] - _E2M1)
    nearest = distance == distance.min(-1, keepdims=True)
    first, last = nearest.argmax(-1), 7 - nearest[..., ::-1].argmax(-1)
    return np.where(first % 2 == 0, first, last)


def rebased(w: Bits) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MXFP4 as W4A8 on Hopper reads it: codes[..., K], d[..., K/32], row exponents b[...].

    A weight is e2m1(code) 2^d 2^(b - 127).
    """
    codes, scale = unpack_nibbles(w.data), np.asarray(w.scale, np.int64)
    blocks = codes.reshape(*scale.shape, 32)
    zero = (blocks % 8 == 0).all(-1)
    row = np.maximum(np.where(zero, 0, scale).max(-1, initial=0) - 6, 0)
    d = scale - row[..., None]
    lower = np.minimum(d + 5, 0)
    magnitude = nearest_e2m1(np.ldexp(_E2M1[blocks % 8], lower[..., None]))
    return (blocks // 8 * 8 + magnitude).reshape(codes.shape), np.clip(d, -5, 6), row


def decode_rebased(w: Bits) -> np.ndarray:
    """float64[..., K]: the weights that W4A8 on Hopper multiplies."""
    codes, d, row = rebased(w)
    return decode_e2m1(codes) * np.ldexp(1.0, np.repeat(d + row[..., None] - 127, 32, axis=-1))


def block_decoded(w: Bits) -> np.ndarray:
    """float64[..., K]: element * block scale, without the global scale."""
    return Bits(w.format, w.data, w.scale).decode()


def global_scales(w: Bits) -> np.ndarray:
    """float64[E]: what multiplies the products of each expert."""
    scale = np.ones(len(w.data)) if w.global_scale is None else w.global_scale
    return np.asarray(scale, np.float64)


def nvfp4_rows(x: np.ndarray, input_scale: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows as NVFP4: e2m1 * e4m3 as float64[..., K], and the global scale float64[..., 1] of each.

    The global scale is amax / (448 * 6) (1 where that is 0), or `input_scale`. All that decides
    a rounding is float32, in this order: g = amax / 2688; s = e4m3(amax of 16 / (6 g)), saturating;
    e2m1(x / (s g)), saturating; ties to even. A block whose scale is 0 is 0.
    """
    one, zero = np.float32(1), np.float32(0)
    x = np.asarray(x).astype(np.float32)
    amax = np.abs(x).max(-1, keepdims=True, initial=0)
    g = amax / np.float32(2688)
    g = np.where(g > 0, g, one)
    if input_scale is not None:
        g = np.full_like(g, np.float32(input_scale))
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    with np.errstate(over="ignore"):  # an infinite quotient saturates
        scale = np.abs(blocks).max(-1, initial=0) / (np.float32(6) * g)
        scale = rounded(np.minimum(scale, np.float32(448)).astype(np.float64), 3, -6)
        step = scale.astype(np.float32)[..., None] * g[..., None]
        quotient = np.where(step > 0, np.abs(blocks) / np.where(step > 0, step, one), zero)
    codes = nearest_e2m1(np.minimum(quotient, np.float32(6)).astype(np.float64))
    values = np.copysign(_E2M1[codes], blocks) * scale[..., None]
    return values.reshape(x.shape), g.astype(np.float64)


def mxfp8_rows(x: np.ndarray, input_scale: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows as MXFP8: e4m3 * 2^e as float64[..., K], and `input_scale` (or 1) for each.

    x is first divided by the input scale, in float32. The exponent of 32 elements is
    floor(log2(amax)) - 8 within [-127, 127]; e4m3 rounds to even and saturates at 448.
    """
    x, g = np.asarray(x).astype(np.float32), np.float32(1)
    if input_scale is not None:
        g = np.float32(input_scale)
        x = x / g
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    amax = np.abs(blocks).max(-1, keepdims=True, initial=0)
    exponent = np.where(amax > 0, np.clip(np.frexp(amax)[1] - 1 - 8, -127, 127), -127)
    elements = np.clip(rounded(np.ldexp(blocks, -exponent), 3, -6), -448, 448)
    return np.ldexp(elements, exponent).reshape(x.shape), np.full((*x.shape[:-1], 1), float(g))


def int8_rows(x: np.ndarray) -> np.ndarray:
    """float64: 16 elements as integers q of at most 127 times 2^e, e the least from -125 on.

    q is x 2^-e rounded, ties to even. Blocks that have a NaN, or a magnitude of 127.5 * 2^104 or
    more, are NaN.
    """
    x = np.asarray(x).astype(np.float64)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    amax = np.abs(blocks).max(-1, keepdims=True, initial=0)
    good = amax < np.ldexp(127.5, 104)
    fraction, exponent = np.frexp(np.where(good, amax, 0))  # in [0.5, 1)
    exponent = np.maximum(exponent - 7 + (fraction >= 127.5 / 128), -125)
    values = np.ldexp(np.rint(np.ldexp(np.where(good, blocks, 0), -exponent)), exponent)
    return np.where(good, values, np.nan).reshape(x.shape)


def _no_factor(operand: Callable[[np.ndarray], np.ndarray]):
    """Rows rounded by `operand`, which needs no factor and reads no input scale."""
    return lambda x, input_scale: (operand(x), np.ones((*x.shape[:-1], 1)))


def _to_dtype(y: np.ndarray, dtype: str) -> np.ndarray:
    return rounded(y, *_DTYPES[dtype])


def _to_bf16(y: np.ndarray) -> np.ndarray:
    """What was summed in float32, as bfloat16: small terms break no tie that float32 has."""
    return _to_dtype(_to_dtype(y, "float32"), "bfloat16")


def _as_it_is(y: np.ndarray, *_) -> np.ndarray:
    return y


def _scaled(y: np.ndarray, of_expert, of_row: np.ndarray, bias) -> np.ndarray:
    return y * of_expert * of_row + bias


def _scaled_in_float32(y: np.ndarray, of_expert, of_row: np.ndarray, bias) -> np.ndarray:
    """The factor is rounded, then the sum: of few bits each, products are often ties afterwards."""
    return _to_dtype(y * _to_dtype(of_expert * of_row, "float32") + bias, "float32")


@dataclass(frozen=True)
class Arithmetic:
    """What one product of quantised rows and weights is, and what is rounded around it.

    scaled(product(values of a row x weight of an expert), factor of the expert, of the row, bias)

    weight: bits -> what is multiplied, `[E, N, K]`; factor: bits -> `[E]`.
    operand: rows, input scale -> what is multiplied, and the factor of each row `[..., 1]`.
    product: rounds the sums before any factor.
    scaled: multiplies them by both factors and adds the bias.
    result: rounds the activation's output and each slot's result, given the name of x's dtype.
    weigh_first: with weight_on_input, whether x is multiplied before it becomes an operand.
    """

    weight: Callable[[Weight], np.ndarray]
    factor: Callable[[Weight], np.ndarray]
    operand: Callable[[np.ndarray, float | None], tuple[np.ndarray, np.ndarray]]
    product: Callable[[np.ndarray], np.ndarray]
    result: Callable[[np.ndarray, str], np.ndarray]
    scaled: Callable[..., np.ndarray] = _scaled
    weigh_first: bool = False


def _ones(w: Weight) -> np.ndarray:
    return np.ones(len(w.data) if isinstance(w, Bits) else len(w))


def _block_scaled(operand) -> Arithmetic:
    """Both operands have block scales; sums leave the tensor cores as bfloat16."""
    return Arithmetic(
        block_decoded, global_scales, operand, _to_bf16, _as_it_is, _scaled_in_float32,
        weigh_first=True,
    )  # fmt: skip


ARITHMETIC: dict[str, Arithmetic] = {
    "exact": Arithmetic(_decoded, _ones, _no_factor(_as_it_is), _as_it_is, _as_it_is),
    "w4a8": Arithmetic(
        decode_rebased,
        _ones,
        lambda x, scale: (fp8_rows(x, scale), np.ones((*x.shape[:-1], 1))),
        _as_it_is,
        _to_dtype,
    ),
    "int8": Arithmetic(_decoded, _ones, _no_factor(int8_rows), _as_it_is, _as_it_is),
    "w4a4": _block_scaled(nvfp4_rows),
    "mxfp8": _block_scaled(mxfp8_rows),
}


# --- activations --------------------------------------------------------------------------------
# Each returns (value, d value/d gate, d value/d up). Non-gated ones take up = None and return None
# for its derivative. Where a clamp is active its derivative is zero.


def _sigmoid(z: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)


def _silu(z, slope=1.0):
    s = _sigmoid(slope * z)
    return z * s, s + slope * z * s * (1.0 - s)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _gelu(z):
    cdf = 0.5 * (1.0 + _erf(z / math.sqrt(2.0)))
    return z * cdf, cdf + z * np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def _gelu_tanh(z):
    c, a = math.sqrt(2.0 / math.pi), 0.044715
    t = np.tanh(c * (z + a * z**3))
    return 0.5 * z * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * c * (
        1.0 + 3 * a * z * z
    )


def _swiglu(gate, up, alpha=1.0, beta=0.0, limit=np.inf):
    clamped, linear = np.minimum(gate, limit), np.clip(up, -limit, limit)
    value, slope = _silu(clamped, alpha)
    return (
        value * (linear + beta),
        slope * (gate < limit) * (linear + beta),
        value * (np.abs(up) < limit),
    )


def _swiglu_step(gate, up, limit=7.0):
    value, slope = _silu(gate)
    capped, linear = np.minimum(value, limit), np.clip(up, -limit, limit)
    return capped * linear, slope * (value < limit) * linear, capped * (np.abs(up) < limit)


def _situ(gate, up, gate_bound=4.0, up_bound=25.0):
    tg, tu, s = np.tanh(gate / gate_bound), np.tanh(up / up_bound), _sigmoid(gate)
    value = gate_bound * tg * s
    slope = (1.0 - tg * tg) * s + gate_bound * tg * s * (1.0 - s)
    return value * up_bound * tu, slope * up_bound * tu, value * (1.0 - tu * tu)


def _times_up(function):
    def gated(gate, up):
        value, slope = function(gate)
        return value * up, slope * up, value

    return gated


def _alone(function):
    def plain(gate, up):
        assert up is None
        return (*function(gate), None)

    return plain


ACTIVATIONS: dict[str, Callable] = {
    "swiglu": _swiglu,
    "swiglu_step": _swiglu_step,
    "geglu": _times_up(_gelu),
    "geglu_tanh": _times_up(_gelu_tanh),
    "situ": _situ,
    "relu2": _alone(lambda z: (np.maximum(z, 0.0) ** 2, 2.0 * np.maximum(z, 0.0))),
    "silu": _alone(_silu),
    "gelu": _alone(_gelu),
    "gelu_tanh": _alone(_gelu_tanh),
    "relu": _alone(lambda z: (np.maximum(z, 0.0), (z > 0).astype(np.float64))),
    "identity": _alone(lambda z: (z, np.ones_like(z))),
}
GATED = frozenset({"swiglu", "swiglu_step", "geglu", "geglu_tanh", "situ"})


def activate(name: str, hidden: np.ndarray, params: tuple[float, ...] = ()):
    """hidden[..., 2I] = [gate; up], or [..., I] -> value[..., I] and its two derivatives."""
    if name in GATED:
        gate, up = np.split(hidden, 2, axis=-1)
        return ACTIVATIONS[name](gate, up, *params)
    return ACTIVATIONS[name](hidden, None, *params)


# --- operations ---------------------------------------------------------------------------------


def _expert_params(params, expert: int) -> tuple[float, ...]:
    """One expert's activation parameters; each is a number or one number per local expert."""
    return tuple(float(p if np.ndim(p) == 0 else np.asarray(p, np.float64)[expert]) for p in params)


def _local_pairs(expert_ids: np.ndarray, expert_offset: int, num_local: int):
    """Yields (local expert, tokens, slots) for ids inside [offset, offset + num_local)."""
    local = np.asarray(expert_ids, np.int64) - int(expert_offset)
    for expert in range(num_local):
        tokens, slots = np.nonzero(local == expert)
        if tokens.size:
            yield expert, tokens, slots


def moe_mlp(
    x,
    gate_up: Weight,
    down: Weight,
    expert_ids,
    weights,
    *,
    activation: str = "swiglu",
    params=(),
    gate_up_bias=None,
    down_bias=None,
    expert_offset: int = 0,
    weight_on_input: bool = False,
    arithmetic: str = "exact",
    input_scales: tuple[float | None, float | None] = (None, None),
) -> np.ndarray:
    """float64[T, H]: sum over slots of weight * (act(x gate_up^T + bias) down^T + bias)."""
    return moe_mlp_pairs(
        x, gate_up, down, expert_ids, weights, activation=activation, params=params,
        gate_up_bias=gate_up_bias, down_bias=down_bias, expert_offset=expert_offset,
        weight_on_input=weight_on_input, arithmetic=arithmetic, input_scales=input_scales,
    ).sum(axis=1)  # fmt: skip


def moe_mlp_pairs(
    x, gate_up, down, expert_ids, weights, *, activation="swiglu", params=(), gate_up_bias=None,
    down_bias=None, expert_offset=0, weight_on_input=False, arithmetic="exact",
    input_scales=(None, None),
) -> np.ndarray:  # fmt: skip
    """float64[T, k, H]: each slot's weighted contribution; zero where the id is not local."""
    how, dtype = ARITHMETIC[arithmetic], np.asarray(x).dtype.name
    x, weights = np.asarray(x).astype(np.float64), np.asarray(weights).astype(np.float64)
    first, second = how.weight(gate_up), how.weight(down)
    first_factor, second_factor = how.factor(gate_up), how.factor(down)
    out = np.zeros((*np.shape(expert_ids), second.shape[1]))
    for expert, tokens, slots in _local_pairs(expert_ids, expert_offset, first.shape[0]):
        weight = weights[tokens, slots][:, None]
        rows = x[tokens] * weight if weight_on_input and how.weigh_first else x[tokens]
        rows, factor = how.operand(rows, input_scales[0])
        if weight_on_input and not how.weigh_first:
            factor = factor * weight
        bias = 0.0 if gate_up_bias is None else np.asarray(gate_up_bias, np.float64)[expert]
        hidden = how.scaled(how.product(rows @ first[expert].T), first_factor[expert], factor, bias)
        value, _, _ = activate(activation, hidden, _expert_params(params, expert))
        inner, factor = how.operand(how.result(value, dtype), input_scales[1])
        bias = 0.0 if down_bias is None else np.asarray(down_bias, np.float64)[expert]
        result = how.product(inner @ second[expert].T)
        result = how.result(how.scaled(result, second_factor[expert], factor, bias), dtype)
        out[tokens, slots] = result if weight_on_input else weight * result
    return out


def moe_mlp_gradients(
    cotangent, x, gate_up, down, expert_ids, weights, *, activation="swiglu", params=(),
    gate_up_bias=None, down_bias=None, expert_offset=0, weight_on_input=False,
) -> Mapping[str, np.ndarray]:  # fmt: skip
    """Gradients of sum(cotangent * moe_mlp(...)) in float64, by the chain rule written out.

    Keys: x[T, H], weights[T, k], gate_up_bias[E, 2I], down_bias[E, H], gate_up[E, 2I, H],
    down[E, H, I]; the biases' gradients are given whether or not a bias was.
    """
    x, weights = np.asarray(x).astype(np.float64), np.asarray(weights).astype(np.float64)
    cotangent = np.asarray(cotangent).astype(np.float64)
    first, second = _decoded(gate_up), _decoded(down)
    grads = {
        "x": np.zeros_like(x),
        "weights": np.zeros_like(weights),
        "gate_up_bias": np.zeros(first.shape[:2]),
        "down_bias": np.zeros(second.shape[:2]),
        "gate_up": np.zeros_like(first),
        "down": np.zeros_like(second),
    }
    for expert, tokens, slots in _local_pairs(expert_ids, expert_offset, first.shape[0]):
        weight = weights[tokens, slots][:, None]
        rows = x[tokens] * weight if weight_on_input else x[tokens]
        hidden = rows @ first[expert].T
        if gate_up_bias is not None:
            hidden = hidden + np.asarray(gate_up_bias, np.float64)[expert]
        value, d_gate, d_up = activate(activation, hidden, _expert_params(params, expert))
        result = value @ second[expert].T
        if down_bias is not None:
            result = result + np.asarray(down_bias, np.float64)[expert]

        d_result = cotangent[tokens] if weight_on_input else cotangent[tokens] * weight
        d_value = d_result @ second[expert]
        d_hidden = d_value * d_gate
        if d_up is not None:
            d_hidden = np.concatenate([d_hidden, d_value * d_up], axis=-1)
        d_rows = d_hidden @ first[expert]
        if weight_on_input:
            d_weight, d_x = (d_rows * x[tokens]).sum(-1), d_rows * weight
        else:
            d_weight, d_x = (cotangent[tokens] * result).sum(-1), d_rows
        np.add.at(grads["x"], tokens, d_x)
        grads["weights"][tokens, slots] = d_weight
        grads["gate_up_bias"][expert] = d_hidden.sum(0)
        grads["down_bias"][expert] = d_result.sum(0)
        grads["gate_up"][expert] = d_hidden.T @ rows
        grads["down"][expert] = d_result.T @ value
    return grads


def _groups(group_sizes, group_offset: int, num_local: int, num_rows: int):
    """Yields (local group, first row, past-the-last row) of the groups that the weights cover."""
    ends = np.cumsum(np.asarray(group_sizes, np.int64))
    for group, end in enumerate(ends):
        local, start = group - int(group_offset), end - int(group_sizes[group])
        if 0 <= local < num_local:
            yield local, min(start, num_rows), min(end, num_rows)


def grouped_matmul(
    x, w: Weight, group_sizes, *, bias=None, group_offset: int = 0, arithmetic: str = "exact",
    input_scale: float | None = None,
) -> np.ndarray:  # fmt: skip
    """float64[M, N]: rows of group g times w[g - offset]^T plus bias; all other rows zero."""
    how = ARITHMETIC[arithmetic]
    x, factor = how.operand(np.asarray(x).astype(np.float64), input_scale)
    w, w_factor = how.weight(w), how.factor(w)
    out = np.zeros((x.shape[0], w.shape[1]))
    for group, start, end in _groups(group_sizes, group_offset, w.shape[0], x.shape[0]):
        added = 0.0 if bias is None else np.asarray(bias, np.float64)[group]
        product = how.product(x[start:end] @ w[group].T)
        out[start:end] = how.scaled(product, w_factor[group], factor[start:end], added)
    return out


def grouped_matmul_gradients(cotangent, x, w: Weight, group_sizes, *, group_offset: int = 0):
    """Gradients of sum(cotangent * grouped_matmul(...)): keys x[M, K], bias[E, N], w[E, N, K]."""
    x, w = np.asarray(x).astype(np.float64), _decoded(w)
    cotangent = np.asarray(cotangent).astype(np.float64)
    grads = {"x": np.zeros_like(x), "bias": np.zeros(w.shape[:2]), "w": np.zeros_like(w)}
    for group, start, end in _groups(group_sizes, group_offset, w.shape[0], x.shape[0]):
        grads["x"][start:end] = cotangent[start:end] @ w[group]
        grads["bias"][group] = cotangent[start:end].sum(0)
        grads["w"][group] = cotangent[start:end].T @ x[start:end]
    return grads
