"""Tactics: how they are chosen, kept in files, found while tracing, and forced."""

import dataclasses
import json
import logging
import re
import signal
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe import _processor, benchmark, capability, kernels, tuning
from jaxmoe.benchmark import TINY
from jaxmoe.tuning import BUCKETS, Entry, Key, TuningError, bucket, measurement, tables, tuner

DEVICE = "NVIDIA H100 80GB HBM3"
VARIANT = "sm90_w4a16"
sm90 = kernels.GPU_FAMILIES["sm90"]
TACTICS = {"decode": 1000, "wgmma64": 2000, "huge": 10**6}
BUILD = "0123456789ab"

KEY = Key(
    device=DEVICE, variant=VARIANT, compute="w4a16", op="moe_mlp", weight_format="nvfp4",
    activation_dtype="bfloat16", hidden_size=256, intermediate_size=128, num_experts=8, top_k=2,
    gated=True, tokens=8,
)  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty user's cache, and a package without tables."""
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("JAXMOE_TUNING_CACHE", str(path))
    monkeypatch.setattr(tables, "_SHIPPED", tmp_path / "shipped")
    return path


@pytest.fixture
def hopper(monkeypatch, cache):
    """A stand-in for an H100 with its library, for everything short of running a kernel."""
    module = types.SimpleNamespace(
        manifest=lambda: {"build": BUILD, "variants": {VARIANT: {"tactics": TACTICS}}},
        registrations=dict,
        workspace_bytes=lambda *args, **kwargs: 512,
    )
    device = types.SimpleNamespace(platform="gpu", device_kind=DEVICE, compute_capability="9.0")
    monkeypatch.setattr(sm90, "library", lambda: (module, ""))
    monkeypatch.setattr(sm90, "self_test", lambda variant: "")  # also where a Hopper GPU is
    monkeypatch.setattr(capability.context, "_default_device", lambda: device)
    caches = (kernels._libraries, sm90._native)
    for each in caches:
        each.cache_clear()
    jax.clear_caches()
    yield module
    for each in caches:
        each.cache_clear()
    jax.clear_caches()


@pytest.fixture
def timed(monkeypatch):
    """Sets what a measurement finds: seconds and refusals by tactic."""

    def put(seconds, refused=()):
        asked = []

        class Bench:
            def __init__(self, *args):
                asked.append(args)

            def measure(self, tokens, tactics, budget):
                asked.append((tokens, list(tactics)))
                return dict(seconds), dict(refused)

        monkeypatch.setattr(measurement, "Bench", Bench)
        return asked

    return put


def entry(tactic="wgmma64", build=BUILD, **key):
    return Entry(
        key=dataclasses.replace(KEY, **key), build=build, tactic=tactic, us=10.0, default_us=12.0
    )


def look(key=KEY, tactics=TACTICS, build=BUILD):
    return tuning.lookup(key, tactics, build)


def ship(entries):
    tables.store(tables.shipped_path(DEVICE), entries)


def problem(tokens=5, **changes):
    return jaxmoe.Problem(
        **{
            "weight_format": "nvfp4", "hidden_size": 256, "intermediate_size": 128,
            "num_experts": 8, "top_k": 2, "tokens": tokens, **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def experts():
    return benchmark.data.random_experts(TINY, "nvfp4", "canonical", 0)


def lowered(function, tokens, *rest):
    x, ids, weights = benchmark.data.random_tokens(TINY, tokens, "bfloat16", 0)
    traced = jax.jit(function).trace(x, ids, weights, *rest)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def tactic_in(text):
    (found,) = re.findall(r'tactic = "(\w*)"', text)
    return found


# --- buckets, keys, selection ---------------------------------------------------------------------


def test_tokens_are_rounded_up_to_their_bucket():
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert [bucket(t) for t in (0, 1, 2, 3, 64, 65, 16384)] == [1, 1, 2, 4, 64, 128, 16384]
    assert bucket(BUCKETS[-1] + 1) == BUCKETS[-1]
    for b in BUCKETS:
        assert bucket(b) == b


def test_the_key_holds_what_matters_and_nothing_else():
    def key(**changes):
        target = capability.Target("cuda", 90, DEVICE, built=frozenset({VARIANT}))
        return Key.of(capability.resolve(problem(**changes), target))

    assert key() == KEY
    assert key(activation="geglu", bias=True, tokens=8) == KEY
    for change in (
        {"activation": "relu2"}, {"top_k": 1}, {"num_experts": 4}, {"hidden_size": 512},
        {"tokens": 9}, {"weight_format": "mxfp4"}, {"activation_dtype": "float16"},
    ):  # fmt: skip
        assert key(**change) != KEY
    assert key(tokens=None).tokens == 0
    assert key(tokens=None).at(5) == KEY
    grouped = key(op="grouped_matmul")
    assert (grouped.top_k, grouped.gated) == (1, False)


@pytest.mark.parametrize(
    ("seconds", "winner"),
    [
        ({"": 1.0}, ""),
        ({"": 1.0, "a": 1.0}, ""),
        ({"": 1.0, "a": 0.981}, ""),  # within the margin
        ({"": 1.0, "a": 0.979}, "a"),
        ({"": 1.0, "a": 0.9, "b": 0.89}, "b"),
        ({"": 1.0, "a": 2.0}, ""),
    ],
)
def test_a_challenger_must_beat_the_librarys_choice_by_the_margin(seconds, winner):
    assert tuner.fastest(seconds) == winner


# --- tune -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hopper")
def test_tune_records_the_winners_and_the_next_trace_uses_them(cache, timed, experts):
    asked = timed({"": 10e-6, "decode": 9e-6, "wgmma64": 11e-6}, {"huge": "never asked"})
    reported = []
    found = tuning.tune(TINY, "nvfp4", [5, 64, 7], report=reported.append)
    assert [call for call in asked if len(call) == 2] == [
        (8, ["decode", "wgmma64"]), (64, ["decode", "wgmma64"]),
    ]  # fmt: skip
    assert found == reported
    assert [(r.key.tokens, r.tactic) for r in found] == [(8, "decode"), (64, "decode")]
    assert found[0].key == KEY
    assert json.loads(cache.read_text())["entries"][0] == {
        **dataclasses.asdict(KEY),
        "build": BUILD,
        "tactic": "decode",
        "us": 9.0,
        "default_us": 10.0,
    }

    def layer(x, ids, weights, e):
        return jaxmoe.moe_mlp(x, e, ids, weights)

    assert tactic_in(lowered(layer, 5, experts)) == "decode"
    assert tactic_in(lowered(layer, 4, experts)) == ""  # another bucket
    resolution = jaxmoe.explain(problem())
    assert resolution.tactic == "decode"
    assert f"tuned by {cache} (9 µs at 8 tokens" in resolution.tactic_by
    assert "tactic    decode: tuned by" in str(resolution)
    assert jaxmoe.Resolution.from_json(resolution.to_json()) == resolution


@pytest.mark.usefixtures("hopper")
def test_a_tactic_too_large_for_the_device_is_no_candidate(cache, timed):
    timed({"": 10e-6}, {"decode": "rows must be ..."})
    (found,) = tuning.tune(TINY, "nvfp4", [1])
    assert found.refused["huge"] == (
        f"takes 1000000 bytes of shared memory; sm_90 ({DEVICE}) has 232448"
    )
    assert found.refused["decode"] == "rows must be ..."


@pytest.mark.usefixtures("hopper", "cache")
def test_a_batch_is_looked_up_by_all_its_tokens(experts):
    tables.store(tuning.cache_path(), [entry("decode", tokens=16), entry("wgmma64", tokens=8)])
    x, ids, weights = benchmark.data.random_tokens(TINY, 5, "bfloat16", 0)
    batch = [jnp.stack([a] * 3) for a in (x, ids, weights)]
    f = jax.vmap(lambda x, ids, weights: jaxmoe.moe_mlp(x, experts, ids, weights))
    text = jax.jit(f).trace(*batch).lower(lowering_platforms=("cuda",)).as_text()
    assert tactic_in(text) == "decode"


@pytest.mark.usefixtures("hopper", "cache")
def test_grouped_matmul_has_keys_of_its_own(experts):
    grouped = entry(
        op="grouped_matmul", hidden_size=128, intermediate_size=256, top_k=1, gated=False
    )
    tables.store(tuning.cache_path(), [grouped])
    sizes = jnp.array([5, 0, 0, 0, 0, 0, 0, 0], jnp.int32)

    def product(x, ids, weights, w):
        return jaxmoe.grouped_matmul(x[:, :128], w, sizes)

    assert tactic_in(lowered(product, 5, experts.down)) == "wgmma64"


@pytest.mark.usefixtures("hopper")
def test_a_measured_default_keeps_the_packages_tactic_out(cache, timed):
    ship([entry("wgmma64")])
    assert look().tactic == "wgmma64"
    timed({"": 10e-6, "wgmma64": 9.9e-6})
    tuning.tune(TINY, "nvfp4", [8])
    assert look().tactic == ""
    assert "tuned by" in look().why


@pytest.mark.usefixtures("hopper")
def test_nothing_is_measured_for_a_file_that_cannot_take_entries(cache, timed):
    asked = timed({"": 1.0})
    cache.parent.mkdir()
    cache.write_text("not JSON")
    with pytest.raises(ValueError, match=r"is not a tuning table.*move it away"):
        tuning.tune(TINY, "nvfp4", [1])
    assert asked == []
    assert cache.read_text() == "not JSON"


def test_a_variant_without_tactics_is_told_so(cache):
    with pytest.raises(TuningError, match=r"xla, which runs nvfp4 weights on cpu, has no tactics"):
        tuning.tune(TINY, "nvfp4", [1], implementation="xla")
    with (
        pytest.raises(TuningError, match=r"forces the target h100; call tune outside"),
        jaxmoe.override(target="h100"),
    ):
        tuning.tune(TINY, "nvfp4", [1])
    with pytest.raises(ValueError, match=r"tokens must be numbers of at least 1, got \[4, 0\]"):
        tuning.tune(TINY, "nvfp4", [4, 0])
    assert not cache.parent.exists()


def test_the_bench_times_what_works_and_refuses_the_rest(monkeypatch):
    """On the CPU: the forced tactic is what tells the stand-in how to misbehave."""

    def moe_mlp(*args, **kwargs):
        tactic = tuning.choice._override.value
        if tactic == "refuses":
            raise ValueError("tokens must be few\nand more")
        with tuning.override(None):
            return jaxmoe.moe_mlp(*args, **kwargs) * (1.1 if tactic == "wrong" else 1)

    resolution = kernels.select(problem(tokens=None), "cpu")
    bench = measurement.Bench(TINY, resolution, 3, 2**30)
    with pytest.raises(benchmark.MemoryLimitError, match=r"GiB are allowed"):
        measurement.Bench(TINY, resolution, 3, 1000)
    seconds, refused = bench.measure(3, ["unknown"], 0.01)
    assert list(seconds) == [""]
    assert re.match(
        r"tactic must be one that cpu_\w+ has for w4a16 \(.*stream, tiles\)", refused["unknown"]
    )
    monkeypatch.setattr(measurement, "moe_mlp", moe_mlp)
    seconds, refused = bench.measure(3, ["right", "wrong", "refuses"], 0.01)
    assert set(seconds) == {"", "right"}
    assert 0 < min(seconds.values()) <= max(seconds.values()) < 10
    assert refused["refuses"] == "tokens must be few"
    assert re.match(r"its numbers are 1\.0e-01 off", refused["wrong"])


def test_layers_of_a_measured_program_wait_for_each_other():
    resolution = kernels.select(problem(tokens=None), "cpu")
    bench = measurement.Bench(TINY, resolution, 3, 2**30)
    inputs = [benchmark.data.random_tokens(TINY, 3, "bfloat16", s) for s in range(2)]
    y = measurement._program(resolution, 2, bench._sets[:1], inputs)
    x, ids, weights = inputs[1]
    want = jaxmoe.moe_mlp(x, bench._sets[0], ids, weights, implementation="cpu")
    np.testing.assert_array_equal(y, want)


# --- on this machine's CPU ------------------------------------------------------------------------


def test_a_cpu_is_known_by_its_processor():
    key = Key.of(jaxmoe.explain(problem(), "cpu"))
    assert key.device == benchmark.device_name() != "cpu"
    assert re.search(r", \d+ cores$", key.device)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "AMD EPYC family 25 model 17",
            ["cpu family\t: 25", "model\t\t: 17", "model name\t: AMD EPYC", "stepping\t: 1"],
        ),
        ("AMD EPYC family 26 model 2", ["cpu family\t: 26", "model : 2", "model name : AMD EPYC "]),
        ("cpu implementer 0x41 part 0xd40", ["CPU implementer\t: 0x41", "CPU part\t: 0xd40"]),
        ("cpu", ["model\t\t:", "flags\t\t: fpu vme"]),
        ("cpu", []),
    ],
)  # fmt: skip
def test_processors_of_one_name_are_told_apart(monkeypatch, name, said):
    monkeypatch.setattr(_processor.platform, "processor", lambda: "cpu")
    other = [line.replace("AMD", "Other") for line in said]
    assert _processor.model("\n".join(["processor\t: 0", *other, "", *said, ""])) == name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tuning_a_cpu_measures_every_tactic_and_explain_tells(cache, dtype):
    own = jaxmoe.explain(problem(activation_dtype=dtype), "cpu")
    assert own.tactic_by == "the library's own choice"
    found = tuning.tune(TINY, "nvfp4", [3, 16], dtype=dtype, implementation="cpu", budget=0.01)
    assert [r.key.tokens for r in found] == [4, 16]
    tactics = set(kernels.tactics(own.variant, own.compute))
    refused = {"integer"} & tactics if dtype == "float32" else set()
    for result in found:
        assert set(result.refused) == refused
        assert set(result.seconds) == {"", *tactics} - refused
        for reason in result.refused.values():
            assert "tactic 'integer' keeps 16 bits of x and needs bf16 x and results" in reason
    assert {key.device for key, _ in tables.read(cache)} == {benchmark.device_name()}
    told = jaxmoe.explain(problem(activation_dtype=dtype, tokens=4), "cpu")
    assert told.tactic == found[0].tactic
    assert told.tactic_by.startswith(f"tuned by {cache} (")


def test_a_table_names_the_kernels_that_a_cpu_runs(cache, experts):
    x, ids, weights = benchmark.data.random_tokens(TINY, 5, "bfloat16", 0)

    def layer(x):
        return jaxmoe.moe_mlp(x, experts, ids, weights, implementation="cpu")

    def text():
        return jax.jit(lambda x: layer(x)).lower(x).as_text()

    key = Key.of(jaxmoe.explain(problem(tokens=5), "cpu"))
    assert tactic_in(text()) == ""
    build = kernels.build_id(key.variant)
    tables.store(cache, [Entry(key=key, build=build, tactic="tiles", us=1.0, default_us=2.0)])
    jax.clear_caches()
    assert tactic_in(text()) == "tiles"
    tuned = layer(x)
    with tuning.override("stream"):
        assert tactic_in(text()) == "stream"
        streamed = layer(x)
    np.testing.assert_allclose(
        *(np.asarray(y, np.float32) for y in (streamed, tuned)), rtol=0.02, atol=0.02
    )


# --- files ----------------------------------------------------------------------------------------


def test_entries_survive_a_file(cache):
    first, second = entry("decode"), entry("", tokens=16)
    tables.store(cache, [first, second])
    tables.store(cache, [entry("wgmma64"), entry("decode", build="another")])
    assert list(tables.read(cache).values()) == [
        entry("wgmma64"), entry("decode", build="another"), second,
    ]  # fmt: skip
    assert [p.name for p in cache.parent.iterdir() if p.suffix == ".tmp"] == []


def test_the_cache_stands_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXMOE_TUNING_CACHE", str(tmp_path / "mine.json"))
    assert tuning.cache_path() == tmp_path / "mine.json"
    monkeypatch.delenv("JAXMOE_TUNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_path() == tmp_path / "jaxmoe" / "tuning.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(tuning.cache_path()) == "/home/someone/.cache/jaxmoe/tuning.json"


ENTRY = json.dumps(tables._fields(entry()))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xfe", b"[]", b"{}", b'{"schema": "jaxmoe-tuning-0", "entries": []}',
        b'{"schema": "jaxmoe-tuning-1"}', b'{"schema": "jaxmoe-tuning-1", "entries": [{}]}',
        b'{"schema": "jaxmoe-tuning-1", "entries": [1]}',
        ENTRY[: len(ENTRY) // 2].encode(),
    ],
)  # fmt: skip
def test_a_corrupt_or_foreign_cache_is_ignored_with_one_warning(cache, caplog, content):
    cache.parent.mkdir()
    cache.write_bytes(content)
    with caplog.at_level(logging.WARNING, "jaxmoe"):
        for tokens in (8, 8, 16):
            choice = look(KEY.at(tokens))
            assert choice == ("", "the library's own choice")
    (record,) = caplog.records
    assert f"tuning table ignored: {cache} is not a tuning table" in record.getMessage()
    assert "move it away, or name another file in JAXMOE_TUNING_CACHE" in record.getMessage()
    with pytest.raises(ValueError, match=r"is not a tuning table"):
        tables.store(cache, [entry()])
    assert cache.read_bytes() == content


def test_a_cache_that_cannot_be_read_is_ignored_with_one_warning(cache, caplog):
    cache.mkdir(parents=True)
    with caplog.at_level(logging.WARNING, "jaxmoe"):
        assert look().tactic == look().tactic == ""
    (record,) = caplog.records
    assert str(cache) in record.getMessage()


def test_entries_of_another_device_or_build_do_not_count(cache):
    tables.store(cache, [entry(device="NVIDIA H200"), entry(build="ba9876543210")])
    choice = look()
    assert choice.tactic == ""
    assert f"{cache} was tuned with another build of it: run `jaxmoe tune` again" in choice.why
    assert look(dataclasses.replace(KEY, device="NVIDIA H20")).why == "the library's own choice"


def test_the_users_cache_wins_over_the_package_which_wins_over_the_library(cache):
    assert look() == ("", "the library's own choice")
    ship([entry("decode", build="any")])
    assert look().tactic == "decode"
    assert "nvidia-h100-80gb-hbm3.json" in look().why
    assert look(dataclasses.replace(KEY, device="NVIDIA H200")).tactic == ""
    tables.store(cache, [entry("wgmma64", build="of another build")])
    assert look().tactic == "decode"
    tables.store(cache, [entry("wgmma64")])
    assert look().tactic == "wgmma64"


@pytest.mark.parametrize("where", ["user", "package"])
def test_a_tactic_that_the_library_lacks_is_ignored_with_one_warning(cache, caplog, where):
    path = cache if where == "user" else tables.shipped_path(DEVICE)
    tables.store(path, [entry("gone")])
    with caplog.at_level(logging.WARNING, "jaxmoe"):
        assert look().tactic == look().tactic == ""
    (record,) = caplog.records
    assert f"{path} names the tactic 'gone' for sm90_w4a16" in record.getMessage()
    assert "it has decode, wgmma64, huge" in record.getMessage()


def test_tables_of_this_package_can_be_read_and_name_tactics_that_exist():
    for path in (tables._SHIPPED).glob("*.json"):
        entries = tables.read(path)
        assert {key for key, _ in entries}
        assert len({key for key, _ in entries}) == len(entries)  # one build for each key
        for key, _ in entries:
            assert tables.shipped_path(key.device) == path
        for e in entries.values():
            have = kernels.tactics(e.key.variant, e.key.compute)
            assert not have or e.tactic in ("", *have)


STORE = """
import dataclasses, os, signal, sys
from pathlib import Path
from jaxmoe.tuning import tables
path, who, kill = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "kill"
(first, *_) = tables.read(path).values()
if kill:
    os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
for n in range(20):
    key = dataclasses.replace(first.key, hidden_size=1000 * who + n)
    tables.store(path, [dataclasses.replace(first, key=key)])
"""


def writer(path, who, kill=""):
    return subprocess.Popen([sys.executable, "-c", STORE, str(path), str(who), kill])


def test_concurrent_writers_lose_nothing(cache):
    tables.store(cache, [entry()])
    writers = [writer(cache, who) for who in (1, 2, 3)]
    assert [w.wait() for w in writers] == [0, 0, 0]
    sizes = {key.hidden_size for key, _ in tables.read(cache)}
    assert sizes == {256} | {1000 * who + n for who in (1, 2, 3) for n in range(20)}


def test_a_writer_that_is_killed_leaves_the_old_table(cache):
    tables.store(cache, [entry()])
    before = cache.read_bytes()
    assert writer(cache, 1, "kill").wait() == -signal.SIGKILL
    assert cache.read_bytes() == before
    assert any(path.suffix == ".tmp" for path in cache.parent.iterdir())
    tables.store(cache, [entry("decode", tokens=16)])  # nor is it left locked
    assert len(tables.read(cache)) == 2


@pytest.mark.usefixtures("hopper")
def test_looking_up_writes_nothing(cache, experts):
    lowered(lambda x, ids, weights, e: jaxmoe.moe_mlp(x, e, ids, weights), 5, experts)
    jaxmoe.explain(problem())
    assert not cache.parent.exists()


# --- override -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hopper")
def test_override_is_part_of_the_jit_key(cache, experts):
    tables.store(cache, [entry("decode")])
    x, ids, weights = benchmark.data.random_tokens(TINY, 5, "bfloat16", 0)
    layer = jax.jit(lambda x, e: jaxmoe.moe_mlp(x, e, ids, weights))

    def now():
        return tactic_in(layer.trace(x, experts).lower(lowering_platforms=("cuda",)).as_text())

    assert now() == "decode"
    with tuning.override("wgmma64"):
        assert now() == "wgmma64"
        assert jaxmoe.explain(problem()).tactic_by == "forced by jaxmoe.tuning.override"
        with tuning.override(""):
            assert now() == ""
        with tuning.override(None):
            assert now() == "decode"
        assert now() == "wgmma64"
    assert now() == "decode"


def test_override_traces_again_and_only_then(experts):
    traces = []
    x, ids, weights = benchmark.data.random_tokens(TINY, 5, "bfloat16", 0)

    @jax.jit
    def layer(x):
        traces.append(1)
        return jaxmoe.moe_mlp(x, experts, ids, weights, implementation="xla")

    y = layer(x)
    with tuning.override(""):
        np.testing.assert_array_equal(layer(x), y)
        layer(x)
    layer(x)
    assert len(traces) == 2


@pytest.mark.usefixtures("hopper")
def test_a_forced_tactic_that_the_variant_lacks_is_an_error(experts):
    x, ids, weights = benchmark.data.random_tokens(TINY, 5, "bfloat16", 0)
    for implementation, has in ((VARIANT, "decode, wgmma64, huge"), ("xla", "none")):
        with (
            tuning.override("fastest"),
            pytest.raises(
                ValueError, match=rf"{implementation} has for w4a16 \({has}\), got 'fastest' from"
            ),
        ):
            jax.eval_shape(
                lambda x, which=implementation: jaxmoe.moe_mlp(
                    x, experts, ids, weights, implementation=which
                ),
                x,
            )
    with (
        pytest.raises(ValueError, match=r"tactic must be a string or None, got 64"),
        tuning.override(64),
    ):
        pass
