"""Every family of `load_pretrained` against logits that `transformers` computed.

The folders in `tests/data/models` were written by `tests/reference_models.py`; where torch and
transformers are installed, new ones are made with other weights.
"""

import functools
import importlib
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_models
from flax import nnx
from reference_models import CONFIGS, FP4, PROMPTS

from jaxmoe import activations, checkpoint, models, routing
from jaxmoe.models._architecture import repetitions

DATA = Path(__file__).parent / "data" / "models"


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def run(graph, state, tokens, cache, valid):
    model = nnx.merge(graph, state)
    hidden, cache, _ = model.hidden(tokens, cache, valid=valid)
    return model.logits(hidden), cache


@functools.cache
def loaded(family, weight_format=None):
    return models.load_pretrained(DATA / family, weight_format=weight_format)


def recorded(family, name="logits"):
    tensors = checkpoint.load(DATA / f"{family}.safetensors")
    rows = range(len(PROMPTS))
    return [np.asarray(tensors[f"tokens.{i}"]) for i in rows], [
        np.asarray(tensors[f"{name}.{i}"]) for i in rows
    ]


def padded(rows, side):
    """Rows as `[B, T]` with padding on one side, and which are tokens."""
    width = max(map(len, rows))
    tokens = np.full((len(rows), width), 7, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, at], valid[i, at] = row, True
    return tokens, valid


def assert_close(got, expected, tolerance):
    """Largest difference, relative to the largest logit of the row."""
    error = max(np.abs(g - e).max() / np.abs(e).max() for g, e in zip(got, expected, strict=True))
    assert error < tolerance, f"relative error {error:.1e}"


def check_prefill(model, rows, expected, side, tolerance=1e-4):
    tokens, valid = padded(rows, side)
    logits, _ = run(*nnx.split(model), tokens, None, valid)
    assert_close([np.asarray(logits[i])[valid[i]] for i in range(len(rows))], expected, tolerance)


def check_decode(model, rows, expected, side, tolerance=1e-4):
    """Prompts of different lengths at once, then one token of each row at a time."""
    graph, state = nnx.split(model)
    prompts = [row[:length] for row, length in zip(rows, PROMPTS, strict=True)]
    tokens, valid = padded(prompts, side)
    logits, cache = run(graph, state, tokens, model.init_cache(len(rows), 64), valid)
    got = [[np.asarray(logits[i])[valid[i]]] for i in range(len(rows))]
    for step in range(len(rows[0]) - PROMPTS[0]):
        tokens = np.array([[row[n + step]] for row, n in zip(rows, PROMPTS, strict=True)])
        logits, cache = run(graph, state, tokens, cache, None)
        for row, one in zip(got, np.asarray(logits), strict=True):
            row.append(one)
    assert_close([np.concatenate(row) for row in got], expected, tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CONFIGS)
def test_prefill_matches_transformers(family, side):
    check_prefill(loaded(family), *recorded(family), side)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", CONFIGS)
def test_decode_matches_transformers(family, side):
    check_decode(loaded(family), *recorded(family), side)


@pytest.mark.parametrize("family", CONFIGS)
def test_fp4_experts_match_transformers_on_the_same_values(family):
    model = loaded(family, FP4[family])
    assert {block.moe.weight_format for block in model.layers if block.moe} == {FP4[family]}
    check_decode(model, *recorded(family, "fp4"), "left", tolerance=1e-2)
    # The rounding itself shows.
    with pytest.raises(AssertionError, match="relative error"):
        check_decode(model, *recorded(family), "left", tolerance=1e-2)


@pytest.mark.parametrize("family", CONFIGS)
def test_new_checkpoints_match_transformers(family, tmp_path):
    """Other weights and texts than the recorded ones; and `transformers`' own left-padded batch."""
    torch = pytest.importorskip("torch", reason="needs the reference extra")
    pytest.importorskip("transformers", reason="needs the reference extra")
    theirs = reference_models.make(family, tmp_path / "plain", seed=1)
    rows = reference_models.texts(seed=1)
    ours = models.load_pretrained(tmp_path / "plain")
    for side in ("left", "right"):
        logits = reference_models.logits(theirs, rows)
        check_decode(ours, rows, [cached for _, cached in logits], side)
        check_prefill(ours, rows, [whole for whole, _ in logits], side)
    if family != "llama4":  # whose temperature there goes by the index, padding included
        tokens, valid = padded(rows, "left")
        position = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
        with torch.no_grad():
            batch = theirs(
                torch.tensor(tokens.astype(np.int64)),
                attention_mask=torch.tensor(valid.astype(np.int64)),
                position_ids=torch.tensor(position),
            ).logits.numpy()
        expected = [batch[i][valid[i]] for i in range(len(rows))]
        check_prefill(ours, rows, expected, "left")
    rounded = reference_models.round_experts(family, tmp_path / "plain", tmp_path / "fp4")
    fp4 = models.load_pretrained(tmp_path / "plain", weight_format=FP4[family])
    expected = [whole for whole, _ in reference_models.logits(rounded, rows)]
    check_prefill(fp4, rows, expected, "left", tolerance=1e-2)


# --- what does not come from transformers --------------------------------------------------------


def greedy(model, prompt, count):
    """Tokens by argmax, each from the whole text again."""
    ids = np.zeros((1, 43), np.int32)
    ids[0, : len(prompt)] = prompt
    for end in range(len(prompt), len(prompt) + count):
        logits, _ = run(*nnx.split(model), ids, None, np.arange(43)[None] < end)
        ids[0, end] = np.argmax(logits[0, end - 1])
    return ids[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_texts_of_a_batch_are_those_of_each_alone(family):
    """Chunks of prompts, rows of different lengths, the cache and the stride change nothing."""
    model = loaded(family)
    rows, _ = recorded(family)
    prompts = [row[:length].tolist() for row, length in zip(rows, PROMPTS, strict=True)]
    parts = list(
        models.generate_tokens(
            model,
            prompts,
            max_new_tokens=10,
            sampling=models.Sampling(temperature=0),
            chunk=4,
            stride=4,
        )
    )
    assert [[len(row) for row in part] for part in parts] == [[4] * 3, [4] * 3, [2] * 3]
    texts = [[token for part in parts for token in part[i]] for i in range(3)]
    assert texts == [greedy(model, prompt, 10) for prompt in prompts]
    stop = texts[0][5]
    stopped = list(
        models.generate_tokens(
            model,
            prompts,
            max_new_tokens=10,
            sampling=models.Sampling(temperature=0),
            stop=[stop],
            chunk=4,
            stride=4,
        )
    )
    for i, text in enumerate(texts):
        end = text.index(stop) if stop in text else len(text)
        assert [token for part in stopped for token in part[i]] == text[:end]


def test_prompts_are_checked():
    model = loaded("mixtral")
    for prompts, options, message in (
        ([], {}, "at least one token"),
        ([[1], []], {}, r"at least one token, got lengths \[1, 0\]"),
        ([[1, 48]], {}, "tokens from 0 to 47, got 1 to 48"),
        ([[-1]], {}, "tokens from 0 to 47"),
        ([[1] * 250], {}, r"must fit into 256 tokens, got 250 \+ 8"),
        ([[1]], {"max_length": 300}, "must fit into 256 tokens"),
        ([[1]], {"max_new_tokens": 0}, "change max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            models.generate_tokens(model, prompts, **{"max_new_tokens": 8, **options})


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_next"])
def test_scanned_layers_compute_the_same(family):
    plain = loaded(family)
    scanned = nnx.eval_shape(lambda: models.Decoder(plain.architecture, rngs=nnx.Rngs(0)))
    assert len(scanned.layers.stacks) < len(plain.layers.stacks)
    for name in ("embed", "norm", "head"):
        setattr(scanned, name, getattr(plain, name))
    places = {scanned.layers.place(i): i for i in range(len(plain.layers))}
    for s, stack in enumerate(scanned.layers.stacks):
        for b, block in enumerate(stack.blocks):
            indices = [i for (stack_, block_, _), i in places.items() if (stack_, block_) == (s, b)]
            states = [nnx.state(plain.layers[i]) for i in sorted(indices)]
            state = jax.tree.map(lambda *a: jnp.stack(a), *states) if stack.count > 1 else states[0]
            nnx.update(block, state)
    rows, expected = recorded(family)
    check_decode(scanned, rows, expected, "right")


def test_layers_repeat():
    def pattern(family, **changes):
        config = {**json.loads((DATA / family / "config.json").read_text()), **changes}
        layers = models.read_config(config)[0].layers
        return [(len(part), count) for part, count in repetitions(layers)]

    assert pattern("qwen3_next", num_hidden_layers=48, layer_types=None) == [(4, 12)]
    assert pattern("gpt_oss", num_hidden_layers=24, layer_types=None) == [(2, 12)]
    assert pattern("deepseek_v3", num_hidden_layers=61, first_k_dense_replace=3) == [
        (1, 3),
        (1, 58),
    ]
    assert pattern("qwen3_moe") == [(1, 1), (1, 1), (1, 1)]


# The parts of the published models' config.json files that the loader reads.
PUBLISHED = {
    "Qwen3-30B-A3B": {
        "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "gpt-oss-20b": {
        "attention_bias": True, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
        "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072, "model_type": "gpt_oss", "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "num_local_experts": 32, "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False,
        },
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "vocab_size": 201088,
    },
    "DeepSeek-V3": {
        "attention_bias": False, "first_k_dense_replace": 3, "hidden_act": "silu",
        "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
        "v_head_dim": 128, "vocab_size": 129280,
    },
    "MiniMax-M2": {
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 1536,
        "max_position_embeddings": 196608, "model_type": "minimax_m2", "num_attention_heads": 48,
        "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8,
        "num_local_experts": 256, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-06,
        "rope_theta": 5000000, "rotary_dim": 64, "scoring_func": "sigmoid",
        "tie_word_embeddings": False, "use_qk_norm": True, "use_routing_bias": True,
        "vocab_size": 200064,
    },
}  # fmt: skip


def test_published_configs():
    read = {name: models.read_config(config)[0] for name, config in PUBLISHED.items()}
    qwen, oss = read["Qwen3-30B-A3B"].layers[0], read["gpt-oss-20b"].layers[0]
    assert qwen.mixer == models.Attention(32, 4, 128, models.Rope(128, 1e6), norm="head")
    assert qwen.feed_forward.router == routing.renormalize_naive(8)
    assert oss.mixer.window == 128
    assert read["gpt-oss-20b"].layers[1].mixer.window is None
    assert oss.mixer.sinks
    assert oss.mixer.bias
    assert oss.mixer.rope.amplitude == pytest.approx(0.1 * math.log(32) + 1)
    assert oss.feed_forward.activation == activations.SwiGLU.gpt_oss()
    deep = read["DeepSeek-V3"].layers
    assert [type(layer.feed_forward).__name__ for layer in deep[2:4]] == ["Dense", "Experts"]
    assert deep[3].feed_forward.router == routing.deepseek_v3(
        8, num_groups=8, topk_group=4, scale=2.5
    )
    # The published code: softmax_scale = 192^-0.5 · mscale², mscale = 0.1·ln 40 + 1.
    assert deep[3].mixer.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert deep[3].mixer.rope.amplitude == 1.0
    mini = read["MiniMax-M2"].layers[0]
    assert mini.mixer.rope == models.Rope(64, 5e6)
    assert mini.mixer.norm == "all"
    assert mini.feed_forward.router == routing.minimax2(8)


@pytest.mark.parametrize("name", PUBLISHED)
def test_rotations_of_published_configs_are_those_of_transformers(name):
    pytest.importorskip("torch", reason="needs the reference extra")
    transformers = pytest.importorskip("transformers", reason="needs the reference extra")
    values = {k: v for k, v in PUBLISHED[name].items() if k != "model_type"}
    config = transformers.AutoConfig.for_model(PUBLISHED[name]["model_type"], **values)
    architecture, _ = models.read_config(PUBLISHED[name])
    family = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    module = importlib.import_module(family.__module__)
    (kind,) = (value for key, value in vars(module).items() if key.endswith("RotaryEmbedding"))
    theirs = kind(config)
    rope = architecture.layers[0].mixer.rope
    np.testing.assert_allclose(rope.frequency, theirs.inv_freq.numpy(), rtol=2e-6)
    assert rope.amplitude == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"model_type": "gpt2"}, r"has model_type='gpt2'; known are qwen3_moe, "),
        ("mixtral", {"hidden_size": None}, "lacks the field 'hidden_size'"),
        ("mixtral", {"hidden_act": "gelu"}, "has hidden_act='gelu', .* must be 'silu'"),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "longrope"}}, "has rope_type='longrope'"),
        ("llama4", {"num_experts_per_tok": 2}, "has num_experts_per_tok=2"),
        ("deepseek_v3", {"topk_method": "greedy"}, "has topk_method='greedy'"),
        ("qwen3_next", {"shared_expert_intermediate_size": 20}, "must be a multiple of"),
        ("mixtral", {"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads=3"),
    ],
)
def test_configs_are_refused_by_name(family, changes, message, tmp_path):
    config = {**json.loads((DATA / family / "config.json").read_text()), **changes}
    shutil.copytree(DATA / family, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(checkpoint.CheckpointError, match=rf"config\.json: .*{message}"):
        models.load_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, r"'model.embed_tokens.weight' must have shape \(48, 48\)"),
        ({"head_dim": 8}, r"'model.layers.0.self_attn.q_proj.weight' must have shape"),
        ({"moe_intermediate_size": 32}, r"layers.0.mlp.experts must have .*= \(6, 32, 32\)"),
        ({"num_hidden_layers": 4}, r"holds no tensor 'model\.layers\.3"),
    ],
)
def test_tensors_that_contradict_the_config_are_named(changes, message, tmp_path):
    config = {**json.loads((DATA / "qwen3_moe" / "config.json").read_text()), **changes}
    shutil.copytree(DATA / "qwen3_moe", tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(checkpoint.CheckpointError, match=message):
        models.load_pretrained(tmp_path / "m")


def test_progress_is_told():
    seen = []
    models.load_pretrained(DATA / "mixtral", progress=lambda done, of: seen.append((done, of)))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "qwen3_next"])
def test_bfloat16_is_near(family):
    """Most tokens; where two experts are nearly alike, rounding may choose the other."""
    model = models.load_pretrained(DATA / family, dtype=jnp.bfloat16)
    rows, expected = recorded(family)
    tokens, valid = padded(rows, "left")
    logits, cache = run(*nnx.split(model), tokens, model.init_cache(3, 64), valid)
    assert cache.length.tolist() == [len(row) for row in rows]
    for i, right in enumerate(expected):
        error = np.abs(np.asarray(logits[i])[valid[i]] - right).max(-1) / np.abs(right).max()
        assert np.median(error) < 5e-2


@pytest.mark.parametrize(("family", "layout"), [("qwen3_moe", "modelopt"), ("gpt_oss", "gpt-oss")])
def test_checkpoints_that_other_tools_read(family, layout, tmp_path):
    """What `jaxmoe quantize` writes loads as FP4, with the logits of the rounded experts."""
    pytest.importorskip("typer", reason="needs the cli extra")
    from jaxmoe.cli import main

    arguments = ["quantize", DATA / family, tmp_path / "fp4", "--format", FP4[family]]
    include = r"\.experts\.(\d+\.)?(w[123]|\w+_proj)(\.weight)?$"
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in (*arguments, "--layout", layout, "--include", include)])
    assert ended.value.code == 0
    model = models.load_pretrained(tmp_path / "fp4")
    assert {block.moe.weight_format for block in model.layers if block.moe} == {FP4[family]}
    check_decode(model, *recorded(family, "fp4"), "right", tolerance=1e-2)
    other = {"nvfp4": "mxfp4", "mxfp4": "nvfp4"}[FP4[family]]
    with pytest.raises(checkpoint.CheckpointError, match="already; load them without"):
        models.load_pretrained(tmp_path / "fp4", weight_format=other)
