"""The commands and their options; what they do is in one module each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

import jaxmoe
from jaxmoe.capability import UnsupportedError
from jaxmoe.checkpoint import CheckpointError
from jaxmoe.cli._console import FailureError, err, say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Fp4 = Literal["nvfp4", "mxfp4"]
AnyFormat = Literal["nvfp4", "mxfp4", "mxfp8", "fp8", "bf16"]
Dtype = Literal["bfloat16", "float16", "float32"]
Json = Annotated[bool, Option("--json", help="Print JSON instead of tables.")]
Implementation = Annotated[
    str | None,
    Option(help="Variant, provider or family, strictly (cpu, xla, cpu_avx2, ...); default: best."),
]


def run(args: Sequence[str] | None = None) -> None:
    """Runs the command line; expected failures become one line and exit code 1."""
    try:
        app(args=None if args is None else list(args), prog_name="jaxmoe")
    except (FailureError, CheckpointError, UnsupportedError, OSError, MemoryError) as error:
        say(err(), f"jaxmoe: error: {error}" if str(error) else "jaxmoe: out of memory", "red")
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"jaxmoe {jaxmoe.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """FP4 Mixture-of-Experts for JAX: one layer, native kernels, and a selection that says why."""


@app.command()
def generate(
    words: Annotated[
        list[str] | None,
        Argument(
            metavar="[FOLDER] [PROMPT]",
            help="Folder of a model (default: the bundled one), and the text to continue or the "
            "question to answer.",
            show_default=False,
        ),
    ] = None,
    weight_format: Annotated[
        Fp4 | None,
        Option(
            "--format",
            help="Format of the experts. Default: nvfp4 for the bundled model, else as they are; "
            "experts that are not quantised yet can be.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Stop after this many tokens.")] = 256,
    temperature: Annotated[float, Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_k: Annotated[int | None, Option(help="Draw from this many of the likeliest.")] = None,
    top_p: Annotated[float, Option(help="Draw from the likeliest tokens of this mass.")] = 0.95,
    seed: Annotated[int, Option(min=0, help="Of the random choices.")] = 0,
    batch: Annotated[int, Option(min=1, help="Texts written at once; the first is shown.")] = 1,
    raw: Annotated[
        bool, Option("--raw", help="Continue the text, though the model has a chat template.")
    ] = False,
    implementation: Implementation = None,
    model: Annotated[
        Path | None, Option(help="Folder of the model, in place of the argument.")
    ] = None,
) -> None:
    """Write text with the bundled FP4 model, or one from Hugging Face.

    FOLDER holds what a model's page there does (config.json, safetensors files, tokenizer.json), or
    what jaxmoe.models.save wrote. The text goes to stdout; tokens/s, the kernel of each layer, and
    why, go to stderr.
    """
    from jaxmoe.cli._generate import generate as command

    command(
        words=words or [],
        weight_format=weight_format,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch=batch,
        raw=raw,
        implementation=implementation,
        folder=model,
    )


@app.command("eval")
def evaluate(
    words: Annotated[
        list[str],
        Argument(
            metavar="[FOLDER] TEXT...",
            help="Folder of a model (default: the bundled one), and UTF-8 files, or - for standard "
            "input.",
            show_default=False,
        ),
    ],
    weight_format: Annotated[Fp4 | None, Option("--format", help="As for `generate`.")] = None,
    context: Annotated[
        int | None,
        Option(help="Tokens that the model sees at once. Default: all it can, at most 2048."),
    ] = None,
    stride: Annotated[
        int | None,
        Option(help="How far windows lie apart; less costs more. Default: half of the context."),
    ] = None,
    batch: Annotated[int, Option(help="Windows at once.")] = 8,
    implementation: Implementation = None,
    model: Annotated[
        Path | None, Option(help="Folder of the model, in place of the argument.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure how well a model predicts text: perplexity, bits per token and per byte.

    Each file is a document. Every token is predicted once: the first from the token that starts
    texts, every other from at least context - stride tokens before it, or all that there are. The
    measures go to stdout; the kernel of each layer, and why, go to stderr.
    """
    from jaxmoe.cli._eval import evaluate as command

    command(
        words=words,
        weight_format=weight_format,
        context=context,
        stride=stride,
        batch=batch,
        implementation=implementation,
        folder=model,
        as_json=json,
    )


@app.command()
def capabilities(
    target: Annotated[
        str | None,
        Option(help="sm_120, 12.0, H100, 'rtx 5090', cpu, tpu, ...; default: this machine."),
    ] = None,
    json: Json = False,
) -> None:
    """List every kernel variant, whether a target can run it, and what is selected there."""
    from jaxmoe.cli._explain import capabilities as command

    command(target=target, as_json=json)


@app.command()
def explain(
    target: Annotated[
        list[str] | None,
        Option(
            help="As for `capabilities`; may be repeated. `all` stands for SM 90, 100, 103, 107, "
            "110, 120, 121, 89, CPU and TPU. Default: this machine."
        ),
    ] = None,
    op: Annotated[Literal["moe_mlp", "grouped_matmul"], Option(help="The operation.")] = "moe_mlp",
    weight_format: Annotated[AnyFormat, Option("--format", help="Of the weights.")] = "nvfp4",
    compute: Annotated[
        str, Option(help="auto, w4a16, w4a8, w4a4, ... (other than auto: strict).")
    ] = ("auto"),
    declared: Annotated[
        str | None, Option(help="Arithmetic that the checkpoint was made for; for `auto`.")
    ] = None,
    dtype: Annotated[Dtype, Option(help="Of the activations.")] = "bfloat16",
    activation: Annotated[str, Option(help="Name of the activation function.")] = "swiglu",
    bias: Annotated[bool, Option("--bias", help="The experts have biases.")] = False,
    input_scales: Annotated[
        bool, Option("--input-scales", help="The weights have static scales of the activations.")
    ] = False,
    layer: Annotated[
        str, Option(help="Sizes of a known layer (see `bench`), for those not given.")
    ] = "qwen3-30b-a3b",
    hidden_size: Annotated[int | None, Option(min=1, help="H (K of grouped_matmul).")] = None,
    intermediate_size: Annotated[int | None, Option(min=1, help="I (N of grouped_matmul).")] = None,
    num_experts: Annotated[int | None, Option(min=1, help="E.")] = None,
    top_k: Annotated[int | None, Option(min=1, help="k.")] = None,
    tokens: Annotated[
        int | None, Option(min=1, help="T; with it, also which tactic of the kernel.")
    ] = None,
    implementation: Implementation = None,
    json: Annotated[
        bool, Option("--json", help="Print a JSON list with one resolution for each target.")
    ] = False,
) -> None:
    """Say which kernel runs one problem, and why no other does."""
    from jaxmoe.cli._explain import explain as command

    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_experts": num_experts,
        "top_k": top_k,
    }
    command(
        targets=target or [],
        layer=layer,
        sizes={name: size for name, size in sizes.items() if size is not None},
        problem={
            "op": op,
            "weight_format": weight_format,
            "compute": compute,
            "declared_compute": declared,
            "activation_dtype": dtype,
            "activation": activation,
            "bias": bias,
            "input_scales": input_scales,
            "tokens": tokens,
        },
        implementation=implementation,
        as_json=json,
    )


@app.command()
def doctor(
    json: Json = False,
    evidence: Annotated[
        Path | None,
        Option(
            help="Run more: many problems and a short benchmark of every kernel that this machine "
            "has; write what came of it to this JSON file, to attach to a report.",
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Report versions, what is built and what this machine can run, and test every kernel here.

    Exits with 1 if a check fails.
    """
    if evidence is not None:
        from jaxmoe.cli._evidence import evidence as collect

        collect(evidence)
        return
    from jaxmoe.cli._doctor import doctor as command

    command(as_json=json)


@app.command()
def quantize(
    src: Annotated[Path, Argument(exists=True, help="A safetensors file, or a folder of them.")],
    dst: Annotated[Path, Argument(help="File or folder to write, like SRC.")],
    weight_format: Annotated[
        Fp4, Option("--format", help="Format of the weights.", show_default=False)
    ],
    include: Annotated[
        str | None,
        Option(
            help="Regular expression, searched in tensor names: which 2-D and 3-D float tensors to "
            "quantise. Default: the matrices of experts and MLPs, never routers.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        Literal["amax", "mse"], Option(help="How scales are chosen; mse searches and is slower.")
    ] = "amax",
    force: Annotated[bool, Option("--force", help="Replace DST if it exists.")] = False,
    layout: Annotated[
        Literal["jaxmoe", "modelopt", "compressed-tensors", "gpt-oss"],
        Option(help="Whose names and configuration the result has; all but jaxmoe need a folder."),
    ] = "jaxmoe",
    input_scales: Annotated[
        Path | None,
        Option(
            exists=True,
            dir_okay=False,
            help="JSON file with the scale of each quantised module's input (its largest magnitude "
            "/ 2688) by name or pattern; without it or --calibrate, only weights are FP4.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        Option(
            exists=True,
            dir_okay=False,
            help="UTF-8 file over which the unquantised model runs, to find the scales of the "
            "inputs of experts and MLPs.",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int, Option(min=1, help="Read no more of the file than this many tokens.")
    ] = 1 << 15,
) -> None:
    """Quantise the expert weights of a checkpoint, tensor by tensor.

    Weights are taken as [N, K] or [E, N, K], with the contracted axis K last. Everything else is
    copied unchanged (block-scaled FP8 becomes BF16). DST appears when it is complete and was
    checked; an interrupted run of a folder goes on where it was when the same command is run again.
    Read the result with jaxmoe.checkpoint.open_folder (a folder) or jaxmoe.checkpoint.load (a file
    of layout jaxmoe).
    """
    from jaxmoe.cli._quantize import quantize as command

    command(
        src=src,
        dst=dst,
        weight_format=weight_format,
        include=include,
        method=method,
        force=force,
        layout_name=layout,
        input_scales=input_scales,
        calibrate=calibrate,
        calibration_tokens=calibration_tokens,
    )


@app.command()
def inspect(
    folder: Annotated[Path, Argument(exists=True, help="A Hugging Face folder.")],
    deep: Annotated[
        bool, Option("--deep", help="Also read the values of all scales, not only headers.")
    ] = False,
    json: Json = False,
) -> None:
    """List what a checkpoint folder holds: formats, sizes and problems.

    Exits with 1 if there are problems.
    """
    from jaxmoe.cli._inspect import inspect as command

    command(folder=folder, deep=deep, as_json=json)


@app.command()
def bench(
    layer: Annotated[
        list[str] | None, Option(help="Layer; may be repeated. Default: qwen3-30b-a3b.")
    ] = None,
    tokens: Annotated[str, Option(help="Numbers of tokens T, with commas.")] = "1,8,64",
    weight_format: Annotated[
        list[str] | None, Option("--format", help="nvfp4 or mxfp4; may be repeated.")
    ] = None,
    implementation: Annotated[
        list[str] | None,
        Option(
            help="Variant or provider, `auto` (what is selected), `ragged_dot` (dequantise + "
            "jax.lax.ragged_dot); may be repeated. Default: auto, xla, ragged_dot."
        ),
    ] = None,
    dtype: Annotated[Dtype, Option(help="Of the activations.")] = "bfloat16",
    compute: Annotated[str, Option(help="As for `explain`.")] = "auto",
    mode: Annotated[
        list[str] | None,
        Option(
            help="`dispatch` (one jitted call, awaited) or `program` (many calls in one jitted "
            "function, the time of each); may be repeated. Default: both; on a CPU, dispatch."
        ),
    ] = None,
    seconds: Annotated[
        float, Option(min=0.01, help="Time to measure each implementation at each T.")
    ] = 2.0,
    memory: Annotated[
        float | None,
        Option(min=0.1, help="GiB that weights may take. Default: 40; on a CPU, 6."),
    ] = None,
    json: Annotated[
        Path | None, Option("--json", help="Add the rows to this JSON file.", dir_okay=False)
    ] = None,
) -> None:
    """Measure a layer's experts against jax.lax.ragged_dot on dequantised weights."""
    from jaxmoe.cli._bench import bench as command

    command(
        layers=layer or ["qwen3-30b-a3b"],
        tokens=tokens,
        formats=weight_format or ["nvfp4"],
        implementations=implementation or ["auto", "xla", "ragged_dot"],
        dtype=dtype,
        compute=compute,
        modes=mode,
        seconds=seconds,
        memory=memory,
        path=json,
    )


@app.command()
def tune(
    layer: Annotated[
        list[str] | None,
        Option(help="Layer; may be repeated; `all` stands for every one. Default: qwen3-30b-a3b."),
    ] = None,
    tokens: Annotated[
        str, Option(help="Numbers of tokens T, with commas; rounded up to powers of two.")
    ] = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192,16384",
    weight_format: Annotated[
        list[str] | None, Option("--format", help="nvfp4 or mxfp4; may be repeated.")
    ] = None,
    dtype: Annotated[Dtype, Option(help="Of the activations.")] = "bfloat16",
    compute: Annotated[str, Option(help="As for `explain`.")] = "auto",
    implementation: Implementation = None,
    seconds: Annotated[
        float, Option(min=0.01, help="Time to measure each tactic at each T.")
    ] = 0.3,
    memory: Annotated[float, Option(min=0.1, help="GiB that weights may take.")] = 6.0,
    json: Annotated[
        Path | None,
        Option("--json", help="Add to this table. Default: the user's cache.", dir_okay=False),
    ] = None,
) -> None:
    """Measure the tactics of this device's kernels for a layer, and record the fastest.

    Functions that are traced from then on use what is in the user's cache: $JAXMOE_TUNING_CACHE,
    else jaxmoe/tuning.json under $XDG_CACHE_HOME or ~/.cache. Nothing else ever writes it.
    """
    from jaxmoe.cli._tune import tune_layers as command

    command(
        layers=layer or ["qwen3-30b-a3b"],
        tokens=tokens,
        formats=weight_format or ["nvfp4"],
        dtype=dtype,
        compute=compute,
        implementation=implementation,
        seconds=seconds,
        memory=memory,
        path=json,
    )
