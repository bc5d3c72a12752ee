"""The largest magnitudes that quantised products will read, found by running a model over text."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.checkpoint import CheckpointError, open_folder
from jaxmoe.models import _architecture as architecture
from jaxmoe.models._cache import Place
from jaxmoe.models._families import Names, read_config
from jaxmoe.models._layers import Block
from jaxmoe.models._pretrained import _Reader
from jaxmoe.models._text import Text
from jaxmoe.nn import MoE
from jaxmoe.nn._variables import array
from jaxmoe.ops import grouped_matmul

_LOG = logging.getLogger("jaxmoe")
_CONTEXT = 2048  # tokens of a window, for models that take more
_BATCH = 4


def input_amax(
    folder: str | os.PathLike[str],
    documents: Iterable[str],
    text: Text,
    *,
    max_tokens: int = 1 << 15,
    dtype: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Finds the largest magnitude of what each matrix of a model's experts and MLPs reads.

    >>> amax = input_amax("Qwen3-30B-A3B", ["Some text."], Tokenizer(folder))  # doctest: +SKIP
    >>> amax["model.layers.0.mlp.experts.7.down_proj"] / (448 * 6)             # doctest: +SKIP

    That over 448 · 6 is ModelOpt's `input_scale` of NVFP4 activations: the factor with which the
    largest becomes the largest e2m1 times the largest e4m3 scale of a block
    (`NVFP4QTensor.get_activation_scaling_factor` in nvidia-modelopt).

    The model runs unquantised, one layer after the other over all tokens, so that one layer is in
    memory at a time. An expert that no token reached counts as the layer's largest.

    Args:
      folder: of a model that `load_pretrained` reads; FP8 weights are dequantised.
      documents: what to read, in windows of at most 2048 tokens, each document from its start.
      text: makes tokens of it.
      max_tokens: read no more than this.
      dtype: as for `load_pretrained`.
      progress: called with the number of layers done, and of all.

    Returns:
      By module, for experts `<prefix>.experts.<e>.<part>`; gate and up read the same.

    Raises:
      CheckpointError: as `load_pretrained`; also if a layer gives values that are not finite, or
        only zeros.
      ValueError: if there are no tokens, or one is unknown to the model.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    path = Path(folder)
    found: dict[str, float] = {}
    with open_folder(path) as source:
        config, names = _config(path, source.config)
        reader = _Reader(source, path, names, dtype, None)
        batches = list(_batches(config, documents, text, max_tokens))
        embed = nnx.eval_shape(
            lambda: nnx.Embed(
                config.vocab_size,
                config.hidden_size,
                dtype=dtype,
                param_dtype=dtype,
                rngs=nnx.Rngs(0),
            )
        )
        name = f"{names.root}.embed_tokens.weight"
        reader.fill(embed.embedding, source.tensor(name), name)
        states = [(embed(jnp.asarray(tokens)), count) for tokens, count in batches]
        del embed

        @functools.cache
        def empty(layer: architecture.Layer) -> Any:
            """A block without weights; one for equal layers, which are then compiled once."""
            options = {"attention": None, "dtype": dtype, "param_dtype": dtype}
            return nnx.split(
                nnx.eval_shape(
                    lambda: Block(layer, config, weight_format="bf16", rngs=nnx.Rngs(0), **options)
                )
            )

        for index, layer in enumerate(config.layers):
            block = nnx.merge(*empty(layer))
            reader.block(block, layer, f"{names.root}.layers.{index}", prepare=False)
            if block.moe is not None and block.moe.quantized:
                raise CheckpointError(
                    path, f"layer {index} is {block.moe.weight_format}; calibrate the plain model"
                )
            graph, weights = nnx.split(block)
            del block
            largest: dict[str, Any] = {}
            for i, (x, count) in enumerate(states):
                x, amax = _layer(graph, weights, x, count)
                states[i] = x, count
                largest = jax.tree.map(np.maximum, amax, largest or amax)
            for part, values in largest.items():
                found |= _named(path, names, index, part, np.asarray(values, np.float64))
            del weights  # before the next layer is read
            if progress is not None:
                progress(index + 1, config.num_layers)
    return found


def calibrated_modules(folder: str | os.PathLike[str]) -> frozenset[str]:
    """The modules that `input_amax` gives values for."""
    path = Path(folder)
    with open_folder(path) as source:
        config, names = _config(path, source.config)
    found: set[str] = set()
    for index, layer in enumerate(config.layers):
        part = layer.feed_forward
        count = () if isinstance(part, architecture.Dense) else (part.num_experts,)
        for kind in ("gate_up", "down"):
            found |= _named(path, names, index, kind, np.ones(count)).keys()
    return frozenset(found)


def _config(path: Path, values: Any) -> tuple[architecture.Architecture, Names]:
    try:
        return read_config(values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(path / "config.json", str(error)) from error


def _batches(
    config: architecture.Architecture, documents: Iterable[str], text: Text, max_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows `i32[B, C]` in batches of one shape, and how many tokens each has."""
    first = [] if text.start is None else [text.start]
    parts: list[list[int]] = []
    left = max_tokens
    size = min(_CONTEXT, config.max_length)
    for document in documents:
        tokens = [*first, *text.encode_document(document.encode())][: max(0, left)]
        left -= len(tokens)
        if tokens and not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
            raise ValueError(
                f"text must give tokens from 0 to {config.vocab_size - 1}, which the model knows, "
                f"got {min(tokens)} to {max(tokens)}; take the model's own tokenizer"
            )
        parts += [tokens[i : i + size] for i in range(0, len(tokens), size)]
    if not parts:
        raise ValueError("documents must hold at least one token, got none")
    width = max(map(len, parts))
    rows = min(_BATCH, len(parts))
    for start in range(0, len(parts), rows):
        windows, count = np.zeros((rows, width), np.int32), np.zeros(rows, np.int32)
        for row, part in enumerate(parts[start : start + rows]):
            windows[row, : len(part)], count[row] = part, len(part)
        yield windows, count


@functools.partial(jax.jit, static_argnums=0)
def _layer(
    graph: Any, state: Any, x: jax.Array, count: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`Block`, and the largest magnitudes before gate and up, and before down.

    Args:
      graph, state: the block.
      x: `[B, C, H]`.
      count: `i32[B]`, tokens in each row; the rest is padding.

    Returns:
      `[B, C, H]`, and by part `f32[E]` for experts, `f32[]` for an MLP.
    """
    block = nnx.merge(graph, state)
    position = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    y, _ = block.attention(block.attention_norm(x), Place(position, count), None, 0)
    x = x + y
    normed = block.moe_norm(x)
    valid = (position < count[:, None]).reshape(-1)
    rows = normed.reshape(-1, normed.shape[-1])
    if block.moe is not None:
        return x + block.moe(normed), _experts_amax(block.moe, rows, valid)
    hidden = jax.nn.silu(block.mlp.gate(rows)) * block.mlp.up(rows)
    amax = {"gate_up": _amax(rows, valid).max(), "down": _amax(hidden, valid).max()}
    return x + block.mlp(normed), amax


def _amax(rows: jax.Array, valid: jax.Array) -> jax.Array:
    """The largest magnitude of each row, 0 where it is not valid."""
    return jnp.where(valid, jnp.abs(rows.astype(jnp.float32)).max(-1), 0)


def _experts_amax(moe: MoE, rows: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
    """Of the tokens of each expert, before and after its first product."""
    experts = moe.experts()
    chosen = moe.routing(moe.logits(rows), selection_bias=array(moe.correction_bias))
    expert = chosen.expert_ids.reshape(-1)
    order = jnp.argsort(expert, stable=True)
    expert, token = expert[order], order // moe.top_k
    pairs, valid = rows[token], valid[token]
    if moe.routing.weight_on_input:
        pairs = pairs * chosen.weights.reshape(-1)[order][:, None].astype(pairs.dtype)
    hidden = grouped_matmul(
        pairs,
        experts.gate_up,
        jnp.bincount(expert, length=moe.num_experts).astype(jnp.int32),
        bias=experts.gate_up_bias,
        preferred_element_type=jnp.float32,
    )
    parts = jnp.split(hidden, 2, axis=-1) if moe.activation.gated else [hidden]
    params = moe.activation.params(moe.num_experts)[:, expert, None]
    hidden = moe.activation.formula(*parts, *params)
    zero = jnp.zeros(moe.num_experts, jnp.float32)
    return {
        "gate_up": zero.at[expert].max(_amax(pairs, valid)),
        "down": zero.at[expert].max(_amax(hidden, valid)),
    }


def _named(path: Path, names: Names, index: int, part: str, amax: np.ndarray) -> dict[str, float]:
    """Values by module; experts without tokens take the largest of the layer."""
    prefix = f"{names.root}.layers.{index}.{names.feed_forward}"
    if not np.isfinite(amax).all() or amax.max() == 0:
        what = "only zeros" if amax.max() == 0 else "values that are not finite"
        raise CheckpointError(path, f"{prefix}: the text gives {what} before {part}")
    if amax.ndim == 0:
        kinds = ("gate_proj", "up_proj") if part == "gate_up" else ("down_proj",)
        return {f"{prefix}.{kind}": float(amax) for kind in kinds}
    kinds = names.expert_parts[:2] if part == "gate_up" else names.expert_parts[2:]
    values = np.where(amax > 0, amax, amax.max())
    if (missing := int((amax == 0).sum())) and part == "gate_up":
        _LOG.warning(
            "%s: %d of %d experts got no token; they take the layer's largest; a longer text may "
            "reach them", prefix, missing, len(amax),
        )  # fmt: skip
    return {
        f"{prefix}.experts.{e}.{kind}": float(value)
        for e, value in enumerate(values)
        for kind in kinds
    }
