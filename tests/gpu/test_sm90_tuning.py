"""The autotuner on a GPU: it measures every tactic, and what it records is what runs."""

import jax
import numpy as np
import pytest

import jaxmoe
from jaxmoe import kernels, tuning
from jaxmoe.benchmark import Layer
from jaxmoe.benchmark.data import random_experts, random_tokens
from jaxmoe.kernels import GPU_FAMILIES
from jaxmoe.tuning import tables

sm90 = GPU_FAMILIES["sm90"]
WHY_NOT = sm90.library()[1] or (
    "" if sm90.device() is not None else "needs an NVIDIA GPU of SM 90 (H100, H200, GH200)"
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "runs here")]

LAYER = Layer("small", 512, 256, 16, 4)


@pytest.mark.parametrize("weight_format", ["nvfp4", "mxfp4"])
def test_what_is_tuned_is_what_runs(tmp_path, monkeypatch, weight_format):
    monkeypatch.setenv("JAXMOE_TUNING_CACHE", str(tmp_path / "tuning.json"))
    found = tuning.tune(LAYER, weight_format, [1, 100], budget=0.02, margin=-1.0)
    assert [r.key.tokens for r in found] == [1, 128]
    for r in found:
        assert {"", *kernels.tactics(r.key.variant)} == {*r.seconds, *r.refused}
        assert all(0 < seconds < 0.1 for seconds in r.seconds.values())
        assert r.seconds[r.tactic] == min(r.seconds.values())
        assert tuning.lookup(
            r.key, list(kernels.tactics(r.key.variant)), kernels.build_id(r.key.variant)
        ).why.startswith(f"tuned by {tmp_path}")
        x, ids, weights = random_tokens(LAYER, r.key.tokens, "bfloat16", 0)
        experts = random_experts(LAYER, weight_format, "sm90_fragment", 0)
        layer = jax.jit(lambda x, e, i=ids, w=weights: jaxmoe.moe_mlp(x, e, i, w))
        assert f'tactic = "{r.tactic}"' in layer.lower(x, experts).as_text()
        with tuning.override(""):
            own = np.asarray(layer(x, experts), np.float32)
        got = np.asarray(layer(x, experts), np.float32)
        assert np.linalg.norm(got - own) <= 1e-2 * np.linalg.norm(own)
    assert len(tables.read(tuning.cache_path())) == 2
