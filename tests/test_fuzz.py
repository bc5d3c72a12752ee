"""Random problems against the oracle: 300 in the default run, 5,000 with `-m fuzz`.

The default run draws what is compiled for (sizes, dtype, activation, ...) from a fixed pool, since
a new compilation takes a second, and the rest (routing, offset, scales, values) freely; `-m fuzz`
draws all of it freely. A failure prints the Spec, which rebuilds every bit, and hypothesis' blob.
"""

import dataclasses
import functools
import os

import jax
import numpy as np
import problems
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from problems import ACTIVATIONS, ROUTINGS, Spec
from suite import IMPLEMENTATIONS, TOLERANCE, assert_exact, assert_matches, refusal, run

import jaxmoe

replace = dataclasses.replace
POOL_SIZE = 24
SCALES = ("normal", "normal", "normal", "wide", "zero_blocks", "huge", "tiny")
# A huge hidden value would vanish in these clamps, and `down` would then make nothing of the rest.
CLAMPED = {"swiglu_step", "situ"}
TOKENS = (0, 1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64, 65, 100, 127, 129, 200)
EXPERTS = (1, 2, 3, 4, 7, 8, 16, 31, 32, 64)

fuzz_settings = functools.partial(
    settings,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@functools.cache
def runnable(dtype: str) -> tuple[str, ...]:
    """The implementations that run here with activations of this dtype, `xla` first."""
    return tuple(i for i in IMPLEMENTATIONS if refusal(i, dtype) is None)


def at_most(num_experts: int, hidden_size: int, intermediate_size: int) -> int:
    """Fewer experts where each is large: the oracle decodes all of them to float64."""
    return max(1, min(num_experts, 2**20 // (hidden_size * intermediate_size)))


@functools.cache
def static_specs() -> tuple[Spec, ...]:
    """The pool: every activation twice, sizes and the rest from a fixed random sequence."""
    rng = np.random.default_rng(2024)

    def one(index):
        hidden, inner = (32 * int(n) for n in rng.integers(1, 9, 2))
        activation = ACTIVATIONS[index % len(ACTIVATIONS)]
        on_input = index % 8 == 7
        return Spec(
            tokens=int(TOKENS[index % len(TOKENS)]),
            num_experts=at_most(int(rng.choice(EXPERTS)), hidden, inner),
            top_k=1 if on_input else int(rng.integers(1, 9)),
            hidden_size=hidden,
            intermediate_size=inner,
            weight_format=("nvfp4", "mxfp4")[index % 2],
            dtype=("float32", "bfloat16")[index // 2 % 2],
            activation_name=activation,
            bias=bool(rng.integers(2)),
            weight_on_input=on_input,
            packed=bool(rng.integers(4)),
            params="per_expert" if index % 3 else "uniform",
        )

    return tuple(one(index) for index in range(POOL_SIZE))


@st.composite
def free_static_spec(draw) -> Spec:
    on_input = draw(st.booleans()) and draw(st.booleans())
    hidden, inner = 32 * draw(st.integers(1, 12)), 32 * draw(st.integers(1, 12))
    return Spec(
        tokens=draw(st.integers(0, 200)),
        num_experts=at_most(draw(st.integers(1, 64)), hidden, inner),
        top_k=1 if on_input else draw(st.integers(1, 8)),
        hidden_size=hidden,
        intermediate_size=inner,
        weight_format=draw(st.sampled_from(("nvfp4", "mxfp4"))),
        dtype=draw(st.sampled_from(("float32", "bfloat16"))),
        activation_name=draw(st.sampled_from(ACTIVATIONS)),
        bias=draw(st.booleans()),
        weight_on_input=on_input,
        packed=draw(st.integers(0, 3)) > 0,
        params=draw(st.sampled_from(("default", "uniform", "per_expert"))),
    )


@st.composite
def specs(draw, static) -> Spec:
    spec = draw(static)
    offset = draw(st.sampled_from((0, 0, 0, 1, 5, spec.num_experts, 1000, -2)))
    total = spec.num_experts
    if offset > 0 and draw(st.integers(0, 3)):
        total = spec.num_experts + min(offset, 64) + draw(st.integers(0, 8))
    scales = draw(st.sampled_from(SCALES))
    if spec.activation_name in CLAMPED and scales in ("huge", "tiny"):
        scales = "normal"
    return replace(
        spec,
        routing=draw(st.sampled_from(ROUTINGS)),
        expert_offset=offset,
        num_total=total,
        scales=scales,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def check(data, static) -> None:
    spec = data.draw(specs(static), label="spec")
    implementation = data.draw(st.sampled_from(runnable(spec.dtype)), label="implementation")
    exact = data.draw(st.integers(0, 4), label="exact when 0") == 0
    note(
        f"suite.run(problems.{'exact' if exact else 'random'}_problem({spec}), {implementation!r})"
    )
    if exact:
        spec = replace(spec, scales="normal")
        problem = problems.exact_problem(spec)
        assert_exact(run(problem, implementation), problem.expected())
    else:
        problem = problems.random_problem(spec)
        assert_matches(run(problem, implementation), problem.pairs(), TOLERANCE[spec.dtype])


@fuzz_settings(max_examples=300)
@given(st.data())
def test_random_problems(data):
    check(data, st.sampled_from(static_specs()))


drawn = 0


@pytest.mark.fuzz
@fuzz_settings(max_examples=int(os.environ.get("JAXMOE_FUZZ_EXAMPLES", "5000")))
@given(st.data())
def test_random_problems_at_length(data):
    global drawn
    drawn += 1
    if drawn % 100 == 0:  # thousands of executables would fill the memory
        jax.clear_caches()
    check(data, free_static_spec())


@pytest.mark.parametrize("name", jaxmoe.routing.ROUTERS)
def test_every_router_feeds_every_implementation(name):
    """ids and weights as each preset gives them, through one CPU path and xla."""
    top_k = {"llama4": 1, "sparse_mixer": 2}.get(name, 4)
    router = jaxmoe.routing.get_router(name, top_k=top_k)
    logits = np.random.default_rng(4).standard_normal((21, 16)).astype(np.float32)
    bias = np.linspace(-1, 1, 16, dtype=np.float32) if router.selection_bias else None
    ids, weights = router(logits, selection_bias=bias)
    spec = Spec(tokens=21, num_experts=16, top_k=top_k, weight_on_input=name == "llama4")
    problem = replace(
        problems.random_problem(spec), expert_ids=np.asarray(ids), weights=np.asarray(weights)
    )
    for implementation in runnable("float32"):
        assert_matches(run(problem, implementation), problem.pairs(), TOLERANCE["float32"])
