"""Routers against the f64 reference in reference_routing.py, and what they promise at the edges."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_routing as reference

from jaxmoe import routing
from jaxmoe.routing import ROUTERS, Router, Routing

# name -> (settings, needs a bias, number of experts). E > k throughout.
CASES = {
    "default": ({"top_k": 4}, False, 16),
    "renormalize": ({"top_k": 4}, False, 16),
    "renormalize_naive": ({"top_k": 4}, False, 16),
    "top_k": ({"top_k": 3}, False, 13),
    "sigmoid": ({"top_k": 5}, False, 16),
    "sigmoid_renorm": ({"top_k": 8}, False, 16),
    "llama4": ({}, False, 16),
    "deepseek_v3": (
        {"top_k": 6, "num_groups": 8, "topk_group": 3, "scale": 2.5},
        True,
        32,
    ),
    "minimax2": ({"top_k": 8}, True, 32),
    "sparse_mixer": ({}, False, 16),
    "deepseek_v4": ({"top_k": 6, "scale": 1.5}, True, 32),
}
# Measured: 2.8e-7 over the presets, 3.3e-7 over all combinations.
RTOL = 1e-6


def problem(name, tokens=12, seed=0, scale=2.0):
    settings, needs_bias, num_experts = CASES[name]
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=scale, size=(tokens, num_experts)).astype(np.float32)
    bias = rng.normal(scale=0.3, size=num_experts).astype(np.float32) if needs_bias else None
    return ROUTERS[name](**settings), logits, bias


def expected(name, logits, bias):
    settings = dict(CASES[name][0])
    k = settings.pop("top_k", {"llama4": 1, "sparse_mixer": 2}.get(name))
    args = () if bias is None else (bias.astype(float).tolist(),)
    return reference.route(reference.PRESETS[name], logits, k, *args, **settings)


def test_the_presets_are_these():
    assert set(ROUTERS) == set(CASES) == set(reference.PRESETS)
    assert len(ROUTERS) == 11
    for name, preset in ROUTERS.items():
        assert getattr(routing, name) is preset


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_preset_equals_reference(name, seed):
    # SparseMixer's threshold keeps several experts only where logits lie close together.
    router, logits, bias = problem(name, seed=seed, scale=0.01 if name == "sparse_mixer" else 2.0)
    logits = logits + np.float32(1.0) if name == "sparse_mixer" else logits
    ids, weights = router(logits, selection_bias=bias)
    want_ids, want_weights = expected(name, logits, bias)
    assert ids.dtype == jnp.int32
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=RTOL)


GRID = [
    {
        "score_fn": score_fn,
        "after": after,
        "biased": biased,
        "num_groups": groups,
        "topk_group": topk_group,
        "group_score": group_score,
        "renormalize": renormalize,
        "eps": 1e-3 if renormalize else 0.0,
    }
    for score_fn, after, biased, (
        groups,
        topk_group,
        group_score,
    ), renormalize in itertools.product(
        ["softmax", "sigmoid", "sqrt_softplus", "identity"],
        [False, True],
        [False, True],
        [(1, 1, "top2_sum"), (4, 2, "top2_sum"), (4, 2, "max"), (12, 5, "top2_sum")],
        [False, True],
    )
    if not (score_fn == "identity" and renormalize)
]


@pytest.mark.parametrize("choice", GRID, ids=lambda c: "-".join(map(str, c.values())))
def test_any_combination_equals_reference(choice):
    choice = dict(choice)
    rng = np.random.default_rng(5)
    logits = rng.normal(scale=2, size=(11, 12)).astype(np.float32)
    bias = rng.normal(size=12).astype(np.float32) if choice.pop("biased") else None
    after = choice.pop("after")
    router = Router(
        3, score_after_top_k=after, selection_bias=bias is not None, scale=0.5, **choice
    )
    ids, weights = router(logits, selection_bias=bias)
    bias64 = None if bias is None else bias.astype(float).tolist()
    want = reference.route(
        reference.decoupled, logits, 3, after=after, bias=bias64, scale=0.5, **choice
    )
    np.testing.assert_array_equal(ids, want[0])
    np.testing.assert_allclose(weights, want[1], rtol=RTOL)


def test_deepseek_v3_masks_groups_with_negative_scores():
    """Masking other groups by 0 would let expert 4 (score 0.5) in before expert 3 (score -1.0)."""
    bias = np.array([2.5, 1.5, 0.5, -1.5, 0, -0.1, -0.2, -0.3], np.float32)
    router = routing.deepseek_v3(4, num_groups=2, topk_group=1)
    ids, weights = router(np.zeros((1, 8), np.float32), selection_bias=bias)
    assert ids.tolist() == [[0, 1, 2, 3]]
    assert weights.tolist() == [[0.25] * 4]


def test_deepseek_v3_group_score_is_the_sum_of_two_not_the_largest():
    bias = np.array([1.0, -1.0, 0.6, 0.5], np.float32)
    logits = np.zeros((1, 4), np.float32)
    router = routing.deepseek_v3(1, num_groups=2, topk_group=1)
    assert router(logits, selection_bias=bias).expert_ids.tolist() == [[2]]
    router = dataclasses.replace(router, group_score="max")
    assert router(logits, selection_bias=bias).expert_ids.tolist() == [[0]]


@pytest.mark.parametrize("name", ["deepseek_v3", "minimax2", "deepseek_v4"])
def test_bias_selects_but_does_not_weigh(name):
    router = ROUTERS[name](top_k=2)
    logits = np.array([[0.0, 1.0, 2.0]], np.float32)
    ids, weights = router(logits, selection_bias=np.array([100.0, 0.0, 0.0], np.float32))
    assert ids.tolist() == [[0, 2]]
    assert weights[0, 0] < weights[0, 1]
    assert weights.sum() == pytest.approx(1, rel=1e-6)


def test_sparse_mixer_by_hand():
    # First place: m = 2, limit 2·0.01·2 = 0.04: 1.97 stays, 1.9 drops. Second: m = 1.97, limit
    # 0.0394: none other stays (1.9 is 0.07 below), so its weight is 1.
    logits = np.array([[1.9, 2.0, -5.0, 1.97]], np.float32)
    ids, weights = routing.sparse_mixer()(logits)
    assert ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(weights, [[1 / (1 + np.exp(-0.03)), 1.0]], rtol=1e-6)
    # All negative: the limit scales with |x|, not with m.
    ids, weights = routing.sparse_mixer(jitter_eps=0.1)(np.array([[-1.0, -1.2, -2.0]], np.float32))
    assert ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(weights, [[1 / (1 + np.exp(-0.2)), 1.0]], rtol=1e-6)
    # 0/0 in the definition's quotient counts as near.
    ids, weights = routing.sparse_mixer()(np.zeros((1, 4), np.float32))
    assert ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(weights, [[1 / 4, 1 / 3]], rtol=1e-6)


def test_llama4_puts_the_weight_on_the_input_and_takes_one_expert():
    assert routing.llama4().weight_on_input
    assert not any(ROUTERS[n](**CASES[n][0]).weight_on_input for n in CASES if n != "llama4")
    with pytest.raises(ValueError, match=r"top_k must be 1 with weight_on_input; got 2"):
        routing.llama4(2)


@pytest.mark.parametrize("name", CASES)
def test_ties_go_to_the_lower_id(name):
    router, _, bias = problem(name)
    num_experts = CASES[name][2]
    bias = None if bias is None else np.zeros_like(bias)
    for value in (0.0, 0.7, -3.0):
        logits = np.full((2, num_experts), value, np.float32)
        assert (
            router(logits, selection_bias=bias).expert_ids.tolist()
            == [list(range(router.top_k))] * 2
        )
    logits = np.where(np.arange(num_experts) % 2, 0.0, -0.0).astype(np.float32)[None]
    ids = router(logits, selection_bias=bias).expert_ids
    assert ids.tolist() == [list(range(router.top_k))], "-0 and +0 are equal"


@pytest.mark.parametrize("name", ["default", "renormalize_naive", "sigmoid", "sigmoid_renorm"])
def test_saturated_scores_still_rank_by_logit(name):
    # sigmoid(x) is 1 in f32 from 17 on, and softmax underflows to 0: the logits still differ.
    logits = np.array([[30.0, 20.0, 40.0, 500.0, -200.0, 35.0]], np.float32)
    assert ROUTERS[name](top_k=4)(logits).expert_ids.tolist() == [[3, 2, 5, 0]]


def extreme(logits, magnitude):
    """Rows of ±magnitude: all +, all -, mixed, one + among -."""
    one = np.where(np.arange(logits.shape[1]) == 1, magnitude, -magnitude)
    plus = np.full(logits.shape[1], magnitude)
    return np.array([plus, -plus, np.sign(logits[0]) * magnitude, one], np.float32)


@pytest.mark.parametrize("name", CASES)
def test_large_logits_stay_finite(name):
    router, logits, bias = problem(name)
    magnitudes = [50.0, 100.0, 1e4, 1e20, 3e38]
    logits = np.concatenate([extreme(logits, m) for m in magnitudes])

    def weights_of(x):
        return router(x, selection_bias=bias).weights

    @jax.jit
    def weights_and_gradient(x, cotangent):
        weights, pullback = jax.vjp(weights_of, x)
        return weights, pullback(cotangent)[0]

    cotangent = np.random.default_rng(0).normal(size=(len(logits), router.top_k)).astype("f4")
    weights, gradient = weights_and_gradient(logits, cotangent)
    assert np.isfinite(weights).all()
    assert np.isfinite(gradient).all()


def test_renormalised_weights_of_tiny_scores():
    """Scores far below eps give weights below 1, as defined, and eps² must not underflow."""
    router = routing.sigmoid_renorm(2)
    logits = np.array([[-46.0, -47.0, -90.0]], np.float32)
    want = reference.route(reference.sigmoid_renorm, logits, 2)[1]
    np.testing.assert_allclose(router(logits).weights, want, rtol=RTOL)
    step = 1e-3
    finite = [
        (
            reference.route(reference.sigmoid_renorm, logits + d, 2)[1][0, 0]
            - reference.route(reference.sigmoid_renorm, logits - d, 2)[1][0, 0]
        )
        / (2 * step)
        for d in np.eye(3) * step
    ]
    gradient = jax.grad(lambda x: router(x).weights[0, 0])(jnp.asarray(logits))[0]
    np.testing.assert_allclose(gradient, finite, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_minus_infinity_excludes_an_expert(name):
    router, logits, bias = problem(name)
    kept = np.arange(1, logits.shape[1], 2)
    masked = np.full_like(logits, -np.inf)
    masked[:, kept] = logits[:, kept]
    if bias is not None:  # a masked expert stays out however large its bias
        bias[0] = 50.0
    ids, weights = router(masked, selection_bias=bias)
    assert np.isin(ids, kept).all()
    assert np.isfinite(weights).all()
    if router.num_groups == 1:  # the same as a router that has only these experts
        small_bias = None if bias is None else bias[kept]
        small = router(logits[:, kept], selection_bias=small_bias)
        np.testing.assert_array_equal(ids, kept[small.expert_ids])
        np.testing.assert_allclose(weights, small.weights, rtol=RTOL)


@pytest.mark.parametrize("name", CASES)
def test_fewer_finite_logits_than_top_k(name):
    router, logits, bias = problem(name, tokens=2)
    logits[0, :] = -np.inf
    logits[0, 5] = 1.0
    logits[1, :] = -np.inf

    def weights_of(x):
        return router(x, selection_bias=bias).weights

    ids, weights = router(logits, selection_bias=bias)
    assert ids[0, 0] == 5
    assert weights[0, 0] != 0
    assert (weights[0, 1:] == 0).all()
    assert (weights[1] == 0).all()
    for row in np.asarray(ids):
        assert len(set(row.tolist())) == router.top_k
        assert ((row >= 0) & (row < logits.shape[1])).all()
    gradient = jax.jit(jax.grad(lambda x: weights_of(x).sum()))(logits)
    assert np.isfinite(gradient).all()
    assert (gradient[1] == 0).all()


def test_an_excluded_expert_does_not_exclude_its_group():
    router = routing.deepseek_v3(1, num_groups=2, topk_group=1)
    logits = np.array([[-np.inf, 3.0, -4.0, -4.0]], np.float32)
    bias = np.zeros(4, np.float32)
    assert router(logits, selection_bias=bias).expert_ids.tolist() == [[1]]


@pytest.mark.parametrize("name", CASES)
def test_nan_logits_keep_ids_in_range_and_distinct(name):
    router, logits, bias = problem(name, tokens=3)
    logits[0, 3] = np.nan
    logits[1, :] = np.nan
    ids = np.asarray(router(logits, selection_bias=bias).expert_ids)
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    assert all(len(set(row.tolist())) == router.top_k for row in ids)
    clean = router(logits[2:], selection_bias=bias)
    np.testing.assert_array_equal(ids[2:], clean.expert_ids)


@pytest.mark.parametrize("name", CASES)
def test_gradient_equals_finite_differences_of_the_reference(name):
    router, logits, bias = problem(name, tokens=3, seed=1)
    if name == "sparse_mixer":
        logits = np.float32(1.0) + logits * np.float32(0.005)
    direction = np.random.default_rng(2).normal(size=(3, router.top_k))

    def f64(x):
        ids, weights = expected(name, x, bias)
        np.testing.assert_array_equal(ids, expected(name, logits, bias)[0])
        return (weights * direction).sum()

    step = 1e-6
    finite = np.zeros(logits.shape)
    for index in np.ndindex(*logits.shape):
        d = np.zeros(logits.shape)
        d[index] = step
        finite[index] = (f64(logits + d) - f64(logits - d)) / (2 * step)

    def f32(x, b):
        return (router(x, selection_bias=b).weights * direction.astype("f4")).sum()

    gradient, bias_gradient = jax.jit(jax.grad(f32, (0, 1)))(logits, bias)
    assert np.abs(finite).max() > 1e-3
    np.testing.assert_allclose(gradient, finite, atol=1e-6 * max(1, np.abs(finite).max()))
    if bias is not None:
        assert (bias_gradient == 0).all()


@pytest.mark.parametrize("name", CASES)
def test_jit_vmap_and_leading_axes_agree_with_the_plain_call(name):
    router, logits, bias = problem(name, tokens=12)
    plain = router(logits, selection_bias=bias)

    @jax.jit
    def jitted(x, b):
        return router(x, selection_bias=b)

    batched = logits.reshape(3, 4, -1)
    for got in (
        jitted(logits, bias),
        jax.vmap(lambda x: router(x, selection_bias=bias))(batched),
        router(batched, selection_bias=bias),
    ):
        np.testing.assert_array_equal(got.expert_ids.reshape(12, -1), plain.expert_ids)
        # XLA may fuse differently; the sums have at most top_k or E terms.
        np.testing.assert_allclose(got.weights.reshape(12, -1), plain.weights, rtol=RTOL)


def test_a_router_is_a_static_argument():
    count = 0

    def call(router, x):
        nonlocal count
        count += 1
        return router(x)

    jitted = jax.jit(call, static_argnums=0)
    x = jnp.ones((2, 4))
    jitted(routing.default(2), x)
    jitted(routing.default(2), x)
    assert count == 1
    jitted(routing.sigmoid(2), x)
    assert count == 2
    assert hash(routing.default(2)) == hash(routing.default(2))


@pytest.mark.parametrize("name", CASES)
def test_no_tokens(name):
    router, logits, bias = problem(name, tokens=0)

    @jax.jit
    def route_and_aux(x):
        routed = router(x, selection_bias=bias)
        return routed, routing.aux(x, routed)

    (ids, weights), losses = route_and_aux(logits)
    assert ids.shape == weights.shape == (0, router.top_k)
    assert (losses.load_balance_loss, losses.router_z_loss) == (0, 0)
    assert losses.expert_counts.tolist() == [0] * logits.shape[1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_logits_are_computed_in_f32(dtype):
    router, logits, _ = problem("renormalize")
    narrow = jnp.asarray(logits, dtype)
    got, want = router(narrow), router(narrow.astype(jnp.float32))
    assert got.weights.dtype == jnp.float32
    np.testing.assert_array_equal(got.expert_ids, want.expert_ids)
    np.testing.assert_array_equal(got.weights, want.weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, r"top_k must be an int >= 1; got 0"),
        ({"top_k": 2.0}, r"top_k must be an int >= 1; got 2\.0"),
        ({"top_k": True}, r"top_k must be an int >= 1; got True"),
        ({"score_fn": "tanh"}, r"score_fn must be one of softmax, sigmoid, .*; got 'tanh'"),
        ({"group_score": "mean"}, r"group_score must be one of top2_sum, max; got 'mean'"),
        ({"num_groups": 0}, r"num_groups must be an int >= 1; got 0"),
        ({"num_groups": 2, "topk_group": 3}, r"topk_group must be <= num_groups=2; got 3"),
        ({"eps": -1e-20}, r"eps must be finite and >= 0; got -1e-20"),
        ({"eps": "small"}, r"eps must be finite and >= 0; got 'small'"),
        ({"scale": float("inf")}, r"scale must be finite; got inf"),
        (
            {"score_fn": "identity", "renormalize": True},
            r"renormalize must be False for raw logits",
        ),
        ({"weight_on_input": True}, r"top_k must be 1 with weight_on_input; got 2"),
        (
            {"sparse_mixer_eps": -0.1},
            r"sparse_mixer_eps must be None, or finite and >= 0; got -0.1",
        ),
        ({"sparse_mixer_eps": 0.1, "score_fn": "sigmoid"}, r"score_fn must be softmax with sparse"),
        (
            {"sparse_mixer_eps": 0.1, "selection_bias": True},
            r"selection_bias must be False with sp",
        ),
        ({"sparse_mixer_eps": 0.1, "num_groups": 2}, r"num_groups must be 1 with sparse_mixer_eps"),
        ({"sparse_mixer_eps": 0.1, "score_after_top_k": True}, r"score_after_top_k must be False"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=r"Router: " + message):
        Router(**{"top_k": 2, **settings})


X = np.zeros((3, 8), np.float32)
B = np.zeros(8, np.float32)


@pytest.mark.parametrize(
    ("router", "logits", "bias", "message"),
    [
        (routing.default(2), X.astype(int), None, r"logits must be a float array .*int"),
        (routing.default(1), np.float32(1), None, r"logits must be a float array .*\(\)"),
        (routing.default(9), X, None, r"at least top_k=9 experts; got shape \(3, 8\)"),
        (routing.default(2), X, B, r"selection_bias must be None for a Router"),
        (routing.minimax2(2), X, None, r"selection_bias must be a float array .*; got None"),
        (routing.minimax2(2), X, B[:4], r"\[num_experts=8\]; got float32\(4,\)"),
        (routing.minimax2(2), X, B.astype(np.int32), r"\[num_experts=8\]; got int32\(8,\)"),
        (routing.deepseek_v3(2, num_groups=3), X, B, r"a multiple of num_groups=3; got 8"),
        (routing.deepseek_v3(3, num_groups=4), X, B, r"top_k must be <= 2, .*raise topk_group"),
    ],
)
def test_bad_arguments(router, logits, bias, message):
    with pytest.raises(ValueError, match=message):
        router(logits, selection_bias=bias)


def test_get_router():
    router = routing.get_router("deepseek_v3", top_k=4, num_groups=4, topk_group=2)
    assert router == routing.deepseek_v3(4, num_groups=4, topk_group=2)
    assert routing.get_router(router) is router
    assert routing.get_router(router, top_k=4) is router
    with pytest.raises(ValueError, match=r"must have top_k=8, as asked for; got Router\(top_k=4"):
        routing.get_router(router, top_k=8)
    with pytest.raises(ValueError, match=r"one of default, renormalize, .*; got 'switch'"):
        routing.get_router("switch", top_k=1)
    with pytest.raises(ValueError, match=r"router 'default': .*num_groups"):
        routing.get_router("default", top_k=1, num_groups=2)


aux = jax.jit(routing.aux, static_argnames="score_fn")


@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid", "sqrt_softplus"])
def test_losses_equal_the_reference(score_fn):
    logits = np.random.default_rng(3).normal(scale=3, size=(29, 12)).astype(np.float32)
    routed = Router(3, score_fn=score_fn)(logits)
    got = aux(logits, routed, score_fn=score_fn)
    balance, z, counts = reference.losses(logits, np.asarray(routed.expert_ids), score_fn)
    np.testing.assert_allclose(got.load_balance_loss, balance, rtol=1e-6)
    np.testing.assert_allclose(got.router_z_loss, z, rtol=1e-6)
    assert got.expert_counts.tolist() == counts
    assert got.expert_counts.dtype == jnp.int32
    assert got.expert_counts.sum() == 29 * 3


def test_load_balance_loss_is_1_when_balanced_and_num_experts_when_not():
    logits = 40 * np.eye(8, dtype=np.float32)
    got = aux(logits, routing.default(1)(logits))
    assert got.load_balance_loss == pytest.approx(1, rel=1e-6)
    logits = 40 * np.eye(8, dtype=np.float32)[np.zeros(8, int)]
    got = aux(logits, routing.default(1)(logits))
    assert got.load_balance_loss == pytest.approx(8, rel=1e-6)
    assert got.expert_counts.tolist() == [8, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("index", [0, 1], ids=["balance", "z"])
def test_loss_gradients_equal_finite_differences(score_fn, index):
    logits = np.random.default_rng(4).normal(size=(5, 6)).astype(np.float32)
    routed = Router(2, score_fn=score_fn)(logits)
    ids = np.asarray(routed.expert_ids)
    step = 1e-6
    finite = np.zeros(logits.shape)
    for where in np.ndindex(*logits.shape):
        d = np.zeros(logits.shape)
        d[where] = step
        finite[where] = (
            reference.losses(logits + d, ids, score_fn)[index]
            - reference.losses(logits - d, ids, score_fn)[index]
        ) / (2 * step)
    gradient = jax.grad(lambda x: aux(x, routed, score_fn=score_fn)[index])(logits)
    np.testing.assert_allclose(gradient, finite, atol=2e-7)


def test_losses_with_excluded_experts_and_ids_out_of_range():
    logits = np.array([[0.0, -np.inf, 0.0], [-np.inf] * 3], np.float32)
    ids = np.array([[0, -1], [3, 2]], np.int32)
    routed = Routing(jnp.asarray(ids), jnp.ones((2, 2)))
    got = aux(logits, routed)
    assert got.expert_counts.tolist() == [1, 0, 1]
    assert got.load_balance_loss == pytest.approx(3 * (0.25 * 0.25 + 0.25 * 0.25), rel=1e-6)
    assert got.router_z_loss == pytest.approx(np.log(2) ** 2 / 2, rel=1e-6)
    for index in (0, 1):
        gradient = jax.grad(lambda x, i=index: aux(x, routed)[i])(jnp.asarray(logits))
        assert np.isfinite(gradient).all()


def test_losses_of_raw_logits_use_softmax_and_leading_axes_are_tokens():
    router, logits, _ = problem("top_k")
    routed = router(logits)
    want = aux(logits, routed)
    shaped = Routing(*(r.reshape(3, 4, -1) for r in routed))
    got = aux(logits.reshape(3, 4, -1), shaped, score_fn=router.score_fn)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bad_arguments_of_aux():
    routed = routing.default(2)(X)
    with pytest.raises(ValueError, match=r"equal leading axes; got \(2, 8\) and \(3, 2\)"):
        routing.aux(X[:2], routed)
    with pytest.raises(ValueError, match=r"score_fn must be one of .*; got 'relu'"):
        routing.aux(X, routed, score_fn="relu")
