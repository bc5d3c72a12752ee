"""Train the bundled byte-level language model: six layers of eight FP4 experts, two per byte.

    python examples/corpus.py --docs … --out corpus.npz
    python examples/train_tiny.py --corpus corpus.npz --minutes 9 --out tiny

The budget is wall-clock time on whatever device is there: the learning rate follows the share of
the budget that is spent, so a slow device gives a worse model, not an unfinished one. For the last
part of it the forward pass sees NVFP4-rounded experts (straight-through gradients), so that the
weights settle where rounding costs little. At the end the folder holds the model in bf16, NVFP4
and MXFP4, with a log and a sample.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxmoe import models
from jaxmoe import nn as moe_nn

START = time.monotonic()

PRESETS = {
    # 7.8 MB: 1.33 M shared parameters in bf16, 4.72 M of experts in NVFP4 and again in MXFP4.
    "tiny": models.DecoderConfig(
        hidden_size=256,
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        intermediate_size=128,
        num_experts=8,
        top_k=2,
        max_length=1024,
    ),
    # For trying this script out.
    "smoke": models.DecoderConfig(
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        intermediate_size=64,
        num_experts=8,
        top_k=2,
        max_length=128,
    ),
}
PROMPTS = ("\0", "The following example shows how to", "    def __init__(self, ")
LOAD_BALANCE, ROUTER_Z, WEIGHT_DECAY = 0.01, 0.001, 0.1


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over 2 % of the budget, then a cosine down to 1 % of the peak."""
    warm = min(1.0, (progress + 1e-4) / 0.02)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def optimizer() -> optax.GradientTransformation:
    """AdamW without its learning rate, which `train_steps` multiplies in; no decay on norms."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(
            WEIGHT_DECAY,
            mask=lambda params: jax.tree.map_with_path(
                lambda path, _: "scale" not in jax.tree_util.keystr(path), params
            ),
        ),
    )


def train_steps(
    graph: Any,
    steps: int,
    batch: int,
    context: int,
    params: Any,
    moments: Any,
    data: jax.Array,
    key: jax.Array,
    rate: jax.Array,
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """Takes a few steps in one device call; returns the means of what the log shows."""

    def loss(params: Any, windows: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = nnx.merge(graph, params)
        hidden, _, aux = model.hidden(windows[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(
            model.logits(hidden), windows[:, 1:]
        ).mean()
        counts = aux.expert_counts.astype(jnp.float32)
        log = {
            "bits_per_byte": nats / math.log(2),
            "load_balance": aux.load_balance_loss,
            "router_z": aux.router_z_loss,
            "busiest_expert": (counts.max(axis=1) / counts.mean(axis=1)).max(),
        }
        return nats + LOAD_BALANCE * aux.load_balance_loss + ROUTER_Z * aux.router_z_loss, log

    def step(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], Any]:
        params, moments = carry
        start = jax.random.randint(key, (batch, 1), 0, data.shape[0] - context)
        windows = data[start + jnp.arange(context + 1)].astype(jnp.int32)
        gradients, log = jax.grad(loss, has_aux=True)(params, windows)
        log["gradient_norm"] = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradients)))
        updates, moments = optimizer().update(gradients, moments, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return (params, moments), log

    (params, moments), logs = jax.lax.scan(step, (params, moments), jax.random.split(key, steps))
    return params, moments, jax.tree.map(jnp.mean, logs)


def graphs(
    config: models.DecoderConfig, attention: str | None, dtype: Any, seed: int
) -> tuple[Any, Any, Any]:
    """The model's graph, the same with fake-quantised experts, and the initial parameters."""
    model = models.Decoder(config, attention=attention, dtype=dtype, rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model)
    model.layers.stacks[0].blocks[0].moe.qat = "nvfp4"
    return graph, nnx.split(model)[0], params


def heldout_documents(stream: np.ndarray) -> list[bytes]:
    """Splits a stream of `corpus.py` into its documents."""
    return [text for text in stream.tobytes().split(b"\0") if text]


def train(args: argparse.Namespace, log: Any) -> models.Decoder:
    """Trains within the budget and returns the model with bf16 activations."""
    corpus = np.load(args.corpus)
    data = jax.device_put(corpus["train"])
    heldout = heldout_documents(corpus["heldout"])
    config = PRESETS[args.preset]
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    key = jax.random.key(args.seed)

    def compile(attention: str | None) -> tuple[Any, Any, Any, Any]:
        plain, rounded, params = graphs(config, attention, dtype, args.seed)
        moments = optimizer().init(params)
        run = jax.jit(train_steps, static_argnums=(0, 1, 2, 3), donate_argnums=(4, 5))
        sizes = (args.steps_per_call, args.batch, config.max_length)
        make = functools.partial(_compile, run, sizes, params, moments, data, key)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            compiled = list(pool.map(make, (plain, rounded)))
        return plain, compiled, params, moments

    attentions = [args.attention] if args.attention != "auto" else ["cudnn", "xla"]
    for attention in attentions:
        try:
            graph, compiled, params, moments = compile(attention)
            break
        except Exception as error:
            if attention == attentions[-1]:
                raise
            log(f"attention {attention!r} does not compile here ({type(error).__name__}: "
                f"{str(error)[:200]}); trying {attentions[-1]!r}")  # fmt: skip
    count = sum(p.size for p in jax.tree.leaves(params))
    log(
        f"{count:,} parameters, {data.size:,} bytes of text, {jax.devices()[0].device_kind}, "
        f"attention {attention!r}, compiled after {time.monotonic() - START:.0f} s"
    )

    begin = time.monotonic()
    end = START + 60 * args.minutes
    step, next_evaluation = 0, 0.1
    progress, last, last_step = 0.0, begin, 0
    while progress < 1:
        rounded = progress >= args.qat_from
        key, now = jax.random.split(key)
        rate = jnp.float32(learning_rate(progress, args.learning_rate))
        params, moments, means = compiled[rounded](params, moments, data, now, rate)
        step += args.steps_per_call
        means = {name: float(value) for name, value in means.items()}  # waits for the device
        clock = time.monotonic()
        progress = (clock - begin) / (end - begin)
        if args.max_steps:
            progress = step / args.max_steps
        if not all(map(math.isfinite, means.values())):
            raise SystemExit(f"step {step}: {means}; lower --learning-rate")
        if clock - last > args.log_seconds or progress >= 1:
            speed = (step - last_step) * args.batch * config.max_length / (clock - last)
            values = " ".join(f"{name} {value:.4f}" for name, value in means.items())
            log(f"step {step} {progress:.1%} {values} rate {rate:.2e}"
                f"{' nvfp4' if rounded else ''} {speed:,.0f} bytes/s")  # fmt: skip
            last, last_step = clock, step
        if progress >= next_evaluation and progress < 1:
            next_evaluation += 0.1
            bits = models.evaluate(nnx.merge(graph, params), heldout).bits_per_byte
            log(f"step {step} held-out bits per byte {bits:.4f}")
            last, last_step = time.monotonic(), step
    log(f"trained {step} steps of {args.batch} x {config.max_length} bytes in "
        f"{time.monotonic() - begin:.0f} s")  # fmt: skip
    return nnx.merge(graph, params)


def _compile(
    run: Any,
    sizes: tuple[int, int, int],
    params: Any,
    moments: Any,
    data: Any,
    key: Any,
    graph: Any,
) -> Any:
    return run.lower(graph, *sizes, params, moments, data, key, jnp.float32(0)).compile()


def finish(model: models.Decoder, args: argparse.Namespace, log: Any) -> None:
    """Saves the model in every format, measures the stored files and writes a sample."""
    folder = args.out / "model"
    models.save(model, folder)
    # What is measured, quantised and bundled is the bf16 file, not the float32 weights behind it.
    stored = models.load(folder, "bf16")
    for weight_format in ("nvfp4", "mxfp4"):
        models.save(moe_nn.quantize(stored, weight_format), folder)
    log("saved " + ", ".join(f"{p.name} {p.stat().st_size:,}" for p in sorted(folder.iterdir())))
    heldout = heldout_documents(np.load(args.corpus)["heldout"])
    results = {}
    for weight_format in ("bf16", "nvfp4", "mxfp4"):
        loaded = models.load(folder, weight_format)
        results[weight_format] = models.evaluate(loaded, heldout).bits_per_byte
        log(f"held-out bits per byte {weight_format} {results[weight_format]:.4f}")
    log(json.dumps(results))
    model = models.load(folder, "nvfp4")
    sampling = models.Sampling(temperature=0.7, top_p=0.95)
    with open(args.out / "sample.txt", "w") as file:
        for prompt in PROMPTS:
            options = {"max_new_tokens": args.sample_bytes, "sampling": sampling, "stride": 32}
            text = prompt + "".join(models.generate_text(model, prompt, **options))
            file.write(f"{text}\n{'-' * 79}\n")
            log(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default=Path("corpus.npz"))
    parser.add_argument("--out", type=Path, default=Path("tiny"))
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--minutes", type=float, default=9, help="from start to end of training")
    parser.add_argument("--max-steps", type=int, help="a budget in steps instead of minutes")
    parser.add_argument("--batch", type=int, default=64, help="sequences per step")
    parser.add_argument("--steps-per-call", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--qat-from", type=float, default=0.86, help="share of the budget")
    parser.add_argument("--attention", default="auto", choices=["auto", "xla", "cudnn"])
    parser.add_argument("--log-seconds", type=float, default=10)
    parser.add_argument("--sample-bytes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.attention == "auto" and jax.default_backend() != "gpu":
        args.attention = "xla"
    args.out.mkdir(parents=True, exist_ok=True)

    with open(args.out / "log.txt", "w") as file:

        def log(message: str) -> None:
            line = f"[{time.monotonic() - START:6.1f} s] {message}"
            print(line, flush=True)
            print(line, file=file, flush=True)

        finish(train(args, log), args, log)


if __name__ == "__main__":
    main()
