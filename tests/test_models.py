"""The decoder: attention and positions against NumPy, cache against no cache, sampling, storage."""

import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe import checkpoint, models
from jaxmoe import nn as moe_nn
from jaxmoe.models import DecoderConfig, Rope, Sampling, _generation, _rope, _sampling
from jaxmoe.models._cache import Place, RingCache, SlotCache
from jaxmoe.models._structure import split, split_known

CONFIG = DecoderConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=32,
    num_experts=8,
    top_k=2,
    max_length=96,
)


def copied(model):
    """A model with its own variables; `nnx.merge(*nnx.split(model))` would share them."""
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda a: a, state))


def filled(config, seed=0):
    """A model with weights from NumPy, since compiling the initialisers takes seconds."""
    model = nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if "scale" in jax.tree_util.keystr(path):
            return jnp.ones(leaf.shape, leaf.dtype)
        return jax.device_put(np.float32(rng.normal(size=leaf.shape) / 8))

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(fill, state))


@pytest.fixture(scope="module")
def unquantized():
    return filled(CONFIG)


@pytest.fixture(scope="module")
def fp4(unquantized):
    return moe_nn.prepare(moe_nn.quantize(unquantized, "nvfp4"))


@pytest.fixture
def model(fp4):
    """With FP4 experts as for serving, and a test's own to change."""
    return copied(fp4)


@pytest.fixture(scope="module")
def folder(unquantized, tmp_path_factory):
    """The model on disk in bf16 and both FP4 formats, quantised from the bf16 file."""
    folder = tmp_path_factory.mktemp("model")
    models.save(unquantized, folder)
    stored = models.load(folder, "bf16")
    for weight_format in ("nvfp4", "mxfp4"):
        models.save(moe_nn.quantize(stored, weight_format), folder)
    return folder


def tokens(batch, length, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 256)


@functools.partial(jax.jit, static_argnums=0)
def run(graph, state, ids, cache):
    model = nnx.merge(graph, state)
    hidden, cache, aux = model.hidden(ids, cache)
    return model.logits(hidden), cache, aux


def logits_of(model, ids):
    """Logits `[B, T, 256]` of the whole text; always the same shape, so that one is compiled."""
    batch, length = ids.shape
    padded = jnp.zeros((2, CONFIG.max_length), jnp.int32).at[:batch, :length].set(ids)
    return np.asarray(run(*nnx.split(model), padded, None)[0])[:batch, :length]


# --- configuration -------------------------------------------------------------------------------


def test_config_survives_json():
    assert DecoderConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be an int of at least 1, got 0"),
        ({"hidden_size": 64.0}, "hidden_size must be an int"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads=3, got 4"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"top_k": 9}, "top_k must be at most num_experts=8, got 9"),
        ({"depth": 3}, "unknown field 'depth'"),
        ({"num_heads": None}, "field 'num_heads' is missing"),
    ],
)
def test_config_refuses_by_name(change, message):
    values = {**CONFIG.to_dict(), **change}
    values = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        DecoderConfig.from_dict(values)


# --- attention -----------------------------------------------------------------------------------


def rotate_complex(x, position, theta):
    """The paper's form: feature pairs as complex numbers times exp(i * position * frequency)."""
    half = x.shape[-1] // 2
    z = x[..., :half] + 1j * x[..., half:]
    frequency = theta ** (-2 * np.arange(half) / x.shape[-1])
    z = z * np.exp(1j * position[:, None, None] * frequency)
    return np.concatenate([z.real, z.imag], -1)


def test_rotation_is_a_complex_multiplication():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 16))
    position = np.array([0, 1, 7, 500, 1023])
    y = _rope.rotate(jnp.float32(x), jnp.int32(position)[None], Rope(16, 10000.0))
    # The angle itself carries float32 rounding: up to 1023 * 2^-24.
    np.testing.assert_allclose(y, rotate_complex(x, position, 10000.0), atol=3e-4)
    np.testing.assert_array_equal(y[:, 0], np.float32(x[:, 0]))


def attention_oracle(layer, x):
    """Float64 grouped-query attention, one query head and position at a time."""
    c = CONFIG
    x = np.asarray(x, np.float64)
    b, t, _ = x.shape

    def heads(linear, n):
        return (x @ np.asarray(linear.weight[...], np.float64).T).reshape(b, t, n, c.head_dim)

    def norm(z, rms):
        z = z / np.sqrt((z**2).mean(-1, keepdims=True) + c.norm_eps)
        return rotate_complex(z * np.asarray(rms.scale[...]), np.arange(t), c.rope_theta)

    q = norm(heads(layer.query, c.num_heads), layer.query_norm)
    k = norm(heads(layer.key, c.num_kv_heads), layer.key_norm)
    v = heads(layer.value, c.num_kv_heads)
    out = np.zeros_like(q)
    group = c.num_heads // c.num_kv_heads
    for i, n, s in itertools.product(range(b), range(c.num_heads), range(t)):
        score = k[i, : s + 1, n // group] @ q[i, s, n] / math.sqrt(c.head_dim)
        p = np.exp(score - score.max())
        out[i, s, n] = p / p.sum() @ v[i, : s + 1, n // group]
    return out.reshape(b, t, -1) @ np.asarray(layer.out.weight[...], np.float64).T


def test_attention_matches_numpy(unquantized):
    layer = unquantized.layers[1].attention
    layer.query_norm.scale[...] = jnp.linspace(0.5, 2, CONFIG.head_dim)
    x = jax.random.normal(jax.random.key(1), (2, 9, CONFIG.hidden_size))
    place = Place(jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.full(2, 9))
    y, cache = jax.jit(lambda x: layer(x, place, None, 0))(x)
    assert cache is None
    expected = attention_oracle(layer, x)
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert error < 2e-6


def test_later_tokens_do_not_matter(folder):
    # Unquantised experts: the FP4 kernels round by how many tokens an expert takes.
    model = models.load(folder, "bf16")
    a = tokens(1, 20)
    b = a.at[0, 12:].add(1) % 256
    la, lb = logits_of(model, a), logits_of(model, b)
    np.testing.assert_array_equal(la[:, :12], lb[:, :12])
    assert np.abs(la[:, 12:] - lb[:, 12:]).max() > 1e-3


def test_cache_gives_the_logits_of_the_whole_text(model):
    ids = tokens(2, 24)
    cache = model.init_cache(2, 32)
    graph, state = nnx.split(model)
    got = []
    for start, end in itertools.pairwise([0, 7, 8, 9, 16, 23, 24]):
        logits, cache, _ = run(graph, state, ids[:, start:end], cache)
        assert cache.length.tolist() == [end, end]
        got.append(logits)
    expected = logits_of(model, ids)
    error = np.linalg.norm(jnp.concatenate(got, axis=1) - expected)
    assert error < 2e-6 * np.linalg.norm(expected)


def test_layers_run_one_after_the_other(model):
    ids = tokens(2, CONFIG.max_length)
    x = model.embed(ids)
    place = Place(jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape), jnp.full(2, ids.shape[1]))
    run_block = jax.jit(
        lambda graph, state, x: nnx.merge(graph, state)(x, place)[0], static_argnums=0
    )
    assert len(model.layers) == CONFIG.num_layers
    for block in model.layers:
        x = run_block(*nnx.split(block), x)
    expected = logits_of(model, ids)
    error = np.linalg.norm(model.logits(model.norm(x)) - expected)
    assert error < 2e-6 * np.linalg.norm(expected)


def test_tied_embeddings_have_no_output_matrix():
    config = DecoderConfig.from_dict({**CONFIG.to_dict(), "tie_embeddings": True, "qk_norm": False})
    key = jax.random.key(0, impl="unsafe_rbg")  # compiles much faster than threefry
    model = models.Decoder(config, rngs=nnx.Rngs(key))
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert names == {"embed", "layers", "norm"}
    hidden = jax.random.normal(jax.random.key(0), (3, CONFIG.hidden_size))
    expected = np.asarray(hidden) @ np.asarray(model.embed.embedding[...]).T
    np.testing.assert_allclose(model.logits(hidden), expected, rtol=1e-5, atol=1e-6)


def test_aux_counts_every_choice(model):
    ids = tokens(2, CONFIG.max_length)
    aux = run(*nnx.split(model), ids, None)[2]
    assert aux.expert_counts.shape == (2, 8)
    np.testing.assert_array_equal(aux.expert_counts.sum(axis=1), ids.size * CONFIG.top_k)
    assert aux.load_balance_loss.shape == aux.router_z_loss.shape == ()


def test_shapes_are_refused_by_name(model):
    with pytest.raises(ValueError, match=r"tokens must have 2 axes"):
        model(jnp.zeros(4, jnp.int32))
    with pytest.raises(ValueError, match=r"tokens must have at most 96 positions, got 97"):
        model(jnp.zeros((1, 97), jnp.int32))
    with pytest.raises(ValueError, match=r"max_length must be from 1 to config.max_length=96"):
        model.init_cache(1, 97)


def test_gradients_reach_every_parameter(unquantized):
    graph, state = nnx.split(unquantized)
    ids = tokens(8, 32)

    def loss(state):
        model = nnx.merge(graph, state)
        log_p = jax.nn.log_softmax(model(ids[:, :-1]))
        return -jnp.take_along_axis(log_p, ids[:, 1:, None], -1).mean()

    gradients = jax.jit(jax.grad(loss))(state)
    for path, g in nnx.to_flat_state(gradients):
        assert float(jnp.abs(g[...]).max()) > 0, path


LENGTHS = (19, 26, 8)  # of three texts, read in parts that a window does not divide
PARTS = ((7, 9, 1), (1, 0, 1), (1, 1, 1), (6, 12, 2), (1, 1, 1), (1, 1, 0), (1, 1, 1), (1, 1, 1))


def windowed(q, k, v, sinks, sees):
    """Attention of one text in float64, head by head; `sees(p)` are the positions that p sees."""
    out = np.zeros(q.shape)
    for p, head in itertools.product(range(len(q)), range(q.shape[1])):
        group = head * k.shape[1] // q.shape[1]
        seen = [j for j in sees(p) if j >= 0]
        scores = k[seen, group] @ q[p, head] / math.sqrt(q.shape[-1])
        top = max(scores.max(), -np.inf if sinks is None else sinks[head])
        weight = np.exp(scores - top)
        total = weight.sum() + (0 if sinks is None else np.exp(sinks[head] - top))
        out[p, head] = weight @ v[seen, group] / total
    return out


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("name", "size"), [("window", 5), ("window", 1), ("chunk", 4)])
def test_a_ring_keeps_what_a_window_sees(name, size, sinks):
    """Of three texts read in parts, also parts that are longer than the ring, with padding."""
    config = models.Attention(4, 2, 8, None, **{name: size}, sinks=sinks)
    layer = models._attention.Attention(
        config, 16, norm_eps=1e-6, out_init=nnx.initializers.zeros, implementation=None,
        dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    scores = rng.normal(size=4).astype(np.float32) if sinks else None
    if sinks:
        layer.sinks[...] = jnp.asarray(scores)
    texts = [
        tuple(rng.normal(size=(n, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
        for n in LENGTHS
    ]
    ring = layer.init_cache(2, len(texts), max(LENGTHS), jnp.float32)
    assert isinstance(ring, RingCache)
    assert ring.arrays[0].shape == (2, 3, 2, size + sinks, 8)
    whole = (jnp.zeros((2, 3, 2, max(LENGTHS) + sinks, 8)),) * 2
    caches = [ring, SlotCache(whole, int(sinks))]
    got = [[[] for _ in texts] for _ in caches]
    attend = jax.jit(layer._attend)
    read = np.zeros(len(texts), np.int32)
    for counts in PARTS:
        width = max(counts)
        place = Place(read[:, None] + np.arange(width, dtype=np.int32), np.array(counts, np.int32))
        parts = [np.full((len(texts), width, heads, 8), 9.0, np.float32) for heads in (4, 2, 2)]
        for row, count in enumerate(counts):
            for part, text in zip(parts, texts[row], strict=True):
                part[row, :count] = text[read[row] : read[row] + count]
        for number, cache in enumerate(caches):
            out, caches[number] = attend(*parts, place, cache, 1)
            for row, count in enumerate(counts):
                got[number][row].append(np.asarray(out)[row, :count])
        read += counts
    assert read.tolist() == list(LENGTHS)
    assert not np.any(caches[0].arrays[0][0])  # the other layer's

    def sees(p):
        return range(p - size + 1, p + 1) if name == "window" else range(p // size * size, p + 1)

    for row, text in enumerate(texts):
        expected = windowed(*(a.astype(np.float64) for a in text), scores, sees)
        for rows in got:
            np.testing.assert_allclose(np.concatenate(rows[row]), expected, rtol=2e-6, atol=2e-6)


def test_a_ring_is_for_windows_shorter_than_the_text():
    config = models.Attention(4, 2, 8, None, window=16)
    layer = nnx.eval_shape(
        lambda: models._attention.Attention(
            config, 16, norm_eps=1e-6, out_init=nnx.initializers.zeros, implementation=None,
            dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    assert isinstance(layer.init_cache(1, 1, 16, jnp.float32), SlotCache)
    assert isinstance(layer.init_cache(1, 1, 17, jnp.float32), RingCache)


# --- sampling ------------------------------------------------------------------------------------

LOGITS = jnp.log(jnp.array([[0.05, 0.4, 0.15, 0.3, 0.1]]))


def kept(sampling):
    return np.flatnonzero(np.isfinite(_sampling.filter_logits(LOGITS, sampling)[0])).tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0, 1, 2, 3, 4]),
        (Sampling(top_k=1), [1]),
        (Sampling(top_k=3), [1, 2, 3]),
        (Sampling(top_k=99), [0, 1, 2, 3, 4]),
        (Sampling(top_p=0.01), [1]),
        (Sampling(top_p=0.39), [1]),
        (Sampling(top_p=0.41), [1, 3]),
        (Sampling(top_p=0.8), [1, 2, 3]),
        (Sampling(top_p=1.0), [0, 1, 2, 3, 4]),
        # top_p counts what top_k left: 0.4 / 0.7 of it is token 1.
        (Sampling(top_k=2, top_p=0.5), [1]),
        (Sampling(top_k=2, top_p=0.6), [1, 3]),
    ],
)
def test_filters(sampling, expected):
    assert kept(sampling) == expected


def test_samples_follow_the_distribution():
    keys = jax.random.split(jax.random.key(0), 20000)
    draw = jax.jit(
        jax.vmap(lambda key: models.sample(LOGITS, key, Sampling(temperature=0.5, top_k=4))[0])
    )
    frequency = np.bincount(draw(keys), minlength=5) / 20000
    p = np.array([0, 0.4, 0.15, 0.3, 0.1]) ** 2
    # Four standard deviations of a share near one half.
    np.testing.assert_allclose(frequency, p / p.sum(), atol=4 * 0.5 / math.sqrt(20000))
    assert frequency[0] == 0


def test_temperature_zero_takes_the_likeliest():
    ids = models.sample(LOGITS, jax.random.key(0), Sampling(temperature=0))
    np.testing.assert_array_equal(ids, [1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature must be finite and >= 0, got -1"),
        ({"temperature": math.nan}, "temperature must be finite"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
    ],
)
def test_sampling_refuses_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


# --- generation ----------------------------------------------------------------------------------

GREEDY = Sampling(temperature=0.0)


def write(model, prompt, **options):
    options = {"stop": None, "stride": 4, **options}
    return b"".join(models.generate(model, prompt, **options))


@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_greedy_text_is_the_argmax_of_the_whole_text(model, length):
    """Neither the cache, nor the padding of the prompt, nor the stride changes what is written."""
    prompt = bytes(np.random.default_rng(length).integers(1, 256, length, dtype=np.uint8))
    text = prompt + write(model, prompt, max_new_tokens=6, sampling=GREEDY)
    assert len(text) == length + 6
    ids = jnp.asarray(np.frombuffer(text, np.uint8).astype(np.int32))[None]
    expected = np.argmax(logits_of(model, ids)[0], axis=-1)[length - 1 : -1]
    np.testing.assert_array_equal(np.frombuffer(text[length:], np.uint8), expected)


def test_seed_decides(model):
    a, b, c = (write(model, "x", max_new_tokens=20, seed=seed) for seed in (1, 1, 2))
    assert a == b != c


def test_text_fills_the_context_and_no_more(model):
    assert len(write(model, "abc")) == CONFIG.max_length - 3
    with pytest.raises(ValueError, match=r"must fit into 96 bytes, got 3 \+ 94"):
        models.generate(model, "abc", max_new_tokens=94)
    with pytest.raises(ValueError, match="shorten the prompt"):
        models.generate(model, "a" * 96)


def test_stop_ends_the_text(model):
    text = write(model, "x", max_new_tokens=40, seed=3)
    for stop in {text[0], text[5], text[21]}:
        assert write(model, "x", max_new_tokens=40, seed=3, stop=stop) == text[: text.find(stop)]


def test_characters_across_parts_are_whole(model, monkeypatch):
    parts = ["é".encode()[:1], "é".encode()[1:] + b"a", b"\xff", "€".encode()[:2]]
    monkeypatch.setattr(_generation, "generate", lambda *_, **__: iter(parts))
    assert list(models.generate_text(model, "")) == ["éa", "�", "�"]


def test_text_does_not_depend_on_the_stride(model):
    a, b = (write(model, "abc", max_new_tokens=24, stride=stride) for stride in (4, 12))
    assert a == b


def test_cache_is_donated(model):
    structure, arrays = split(model)
    empty, logits = _generation._start(structure, arrays, 1, 96)
    cache, logits = _generation._read(
        structure, arrays, empty, logits, np.zeros((1, 64), np.int32), np.int32([5])
    )
    assert cache.length.tolist() == [5]
    new, _, _ = _generation._draw(structure, GREEDY, 4, arrays, cache, logits, np.uint32(0))
    for old in (empty, cache):
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert new.length.tolist() == [9]


def test_a_known_module_is_split_as_it_is_now():
    def make(seed):
        return nnx.Sequential(
            nnx.Linear(2, 3, rngs=nnx.Rngs(seed)), nnx.Linear(3, 3, rngs=nnx.Rngs(seed + 1))
        )

    def agrees():
        structure, arrays = split_known(module)
        expected = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(module))]
        for one, other in zip(arrays, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        again = structure.module(arrays)
        x = jnp.ones((1, 2))
        np.testing.assert_array_equal(again(x), module(x))
        return structure

    module = make(0)
    before = agrees()
    assert agrees() is before  # nothing has changed
    module.layers[0].kernel[...] = jnp.full((2, 3), 5.0)
    assert agrees() is before  # the same structure with another array
    module.layers[1] = nnx.Linear(3, 4, rngs=nnx.Rngs(7))
    after = agrees()
    assert after != before
    module.layers[1].dtype = jnp.bfloat16
    assert agrees() != after
    assert split(make(0))[0] == before == split_known(make(0))[0]


def test_models_of_one_structure_share_their_programs(model, unquantized):
    first, arrays = split(model)
    second, again = split(copied(model))
    assert first is not second
    assert (first, hash(first)) == (second, hash(second))
    assert all(a is b for a, b in zip(arrays, again, strict=True))
    assert first != split(filled(CONFIG, seed=1).layers[0])[0]
    assert first != 0
    _generation._start(first, arrays, 1, 64)
    compiled = _generation._start._cache_size()
    _generation._start(second, again, 1, 64)
    assert _generation._start._cache_size() == compiled


def test_only_byte_level_models_write():
    config = DecoderConfig.from_dict({**CONFIG.to_dict(), "vocab_size": 300})
    model = nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="byte-level"):
        models.generate(model, "x")


# --- storage -------------------------------------------------------------------------------------


def test_folder_has_the_shared_part_once(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "decoder.safetensors",
        "experts-bf16.safetensors",
        "experts-mxfp4.safetensors",
        "experts-nvfp4.safetensors",
    ]
    assert models.available_formats(folder) == ("nvfp4", "mxfp4", "bf16")
    names = checkpoint.load(folder / "decoder.safetensors").keys()
    assert not any("gate_up" in name or "down" in name for name in names)
    assert {"embed.embedding", "layers.0.moe.router", "layers.1.attention.out.weight"} <= names


def test_saving_again_writes_the_same_bytes(folder, tmp_path):
    for weight_format in models.available_formats(folder):
        models.save(models.load(folder, weight_format), tmp_path)
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


@pytest.mark.parametrize("weight_format", ["nvfp4", "mxfp4"])
def test_loaded_model_is_the_quantised_one(folder, weight_format):
    quantized = moe_nn.quantize(models.load(folder, "bf16"), weight_format)
    loaded = models.load(folder, weight_format)
    assert loaded.layers[0].moe.weight_format == weight_format
    expected, got = nnx.to_flat_state(nnx.state(quantized)), nnx.to_flat_state(nnx.state(loaded))
    assert [path for path, _ in got] == [path for path, _ in expected]
    leaves = [jax.tree_util.tree_leaves_with_path(side) for side in (expected, got)]
    for (path, a), (_, b) in zip(*leaves, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


def test_loaded_model_computes_what_the_quantised_one_does(folder):
    quantized = moe_nn.prepare(moe_nn.quantize(models.load(folder, "bf16"), "nvfp4"))
    ids = tokens(1, 16)
    expected = logits_of(quantized, ids)
    loaded = moe_nn.prepare(models.load(folder, "nvfp4"))
    np.testing.assert_array_equal(logits_of(loaded, ids), expected)
    exact = logits_of(models.load(folder, "bf16"), ids)
    assert 0.005 < np.linalg.norm(expected - exact) / np.linalg.norm(exact) < 0.5


def test_bf16_files_hold_the_rounded_weights(unquantized, folder):
    stored = checkpoint.load(folder / "experts-bf16.safetensors")
    for i in range(CONFIG.num_layers):
        expected = unquantized.layers[i].moe.down[...].astype(jnp.bfloat16)
        np.testing.assert_array_equal(
            np.float32(stored[f"layers.{i}.moe.down"]), np.float32(expected)
        )


def test_default_format_is_fp4(folder):
    assert models.load(folder).layers[0].moe.weight_format == "nvfp4"


def test_experts_may_lie_in_another_folder(folder, tmp_path):
    name = "experts-bf16.safetensors"
    (tmp_path / name).write_bytes((folder / name).read_bytes())
    ids = tokens(1, 4)
    np.testing.assert_array_equal(
        logits_of(models.load(folder, "bf16", experts=tmp_path), ids),
        logits_of(models.load(folder, "bf16"), ids),
    )


@pytest.fixture
def copy(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_truncated_experts_are_named(copy):
    path = copy / "experts-nvfp4.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(checkpoint.CheckpointError, match=r"experts-nvfp4\.safetensors: truncated"):
        models.load(copy, "nvfp4")


def test_files_that_do_not_belong_together_are_named(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(checkpoint.CheckpointError, match=r"'layers\.0\.moe\.\w+' must be"):
        models.load(copy, "nvfp4")
    (copy / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(checkpoint.CheckpointError, match=r"lacks tensor 'layers\.2\."):
        models.load(copy, "nvfp4")
    (copy / "config.json").write_text(json.dumps({**config, "num_layers": 1}))
    with pytest.raises(checkpoint.CheckpointError, match=r"'layers\.1\.\S+' is not part of"):
        models.load(copy, "nvfp4")


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama"}', '{"hidden_size": 4}'])
def test_other_configs_are_refused(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(checkpoint.CheckpointError, match=r"config\.json: not the config"):
        models.load(copy)


def test_missing_files_are_named(copy):
    (copy / "experts-mxfp4.safetensors").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="missing; the folder has nvfp4, bf16"):
        models.load(copy, "mxfp4")
    (copy / "config.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"config\.json: cannot be opened"):
        models.load(copy)


def test_prepared_weights_are_not_saved(folder, tmp_path):
    prepared = moe_nn.prepare(models.load(folder, "nvfp4"), "cpu_portable")
    with pytest.raises(ValueError, match="must have canonical weights"):
        models.save(prepared, tmp_path / "new")
    assert not (tmp_path / "new").exists()
