"""Routers: pure f32 functions from router logits to the experts of each token and their weights.

One `Router` holds what the published routing methods differ in, as separate fields; each method is
a function here that fills them in (`deepseek_v3(top_k=8, num_groups=8, ...)`), listed in `ROUTERS`.

What holds for all of them:

- Logits of any float dtype are computed in f32; weights are f32, expert ids int32.
- Experts come in order of falling selection score; of equal scores the lower id comes first.
- A logit of -inf excludes its expert. If that leaves fewer than `top_k`, excluded experts fill the
  remaining places with weight 0. Finite logits of any size give finite weights and gradients. NaN
  or +inf logits may give NaN weights; the ids are in range and distinct even then.
- Differentiable with respect to the logits through the weights; the choice of experts is piecewise
  constant, and so a selection bias has gradient zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "ROUTERS",
    "Router",
    "RouterAux",
    "Routing",
    "ScoreFn",
    "aux",
    "deepseek_v3",
    "deepseek_v4",
    "default",
    "get_router",
    "llama4",
    "minimax2",
    "renormalize",
    "renormalize_naive",
    "sigmoid",
    "sigmoid_renorm",
    "sparse_mixer",
    "top_k",
]

ScoreFn: TypeAlias = Literal["softmax", "sigmoid", "sqrt_softplus", "identity"]
GroupScore: TypeAlias = Literal["top2_sum", "max"]


class Routing(NamedTuple):
    """The experts of each token: `expert_ids` int32 [..., k] and `weights` f32 [..., k]."""

    expert_ids: jax.Array
    weights: jax.Array


class RouterAux(NamedTuple):
    """Training losses and statistics of one routing: two f32 scalars and int32 [E]."""

    load_balance_loss: jax.Array
    router_z_loss: jax.Array
    expert_counts: jax.Array


def _safe_exp(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(logits - m) and m, the largest logit of each row (0 where all are -inf)."""
    largest = lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    largest = jnp.where(jnp.isneginf(largest), 0.0, largest)
    return jnp.exp(logits - largest), largest


def _one_if_zero(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 1.0, x)


def _softmax(logits: jax.Array) -> jax.Array:
    exp, _ = _safe_exp(logits)
    return exp / _one_if_zero(exp.sum(-1, keepdims=True))


def _sqrt_softplus(logits: jax.Array) -> jax.Array:
    # Below -20, log(1 + e^x) is e^x to within f32 rounding. Written out, neither the value nor the
    # derivative (0/0 where softplus underflows) loses anything.
    small = jnp.exp(jnp.minimum(logits, -20.0) / 2)
    return jnp.where(logits < -20.0, small, jnp.sqrt(jax.nn.softplus(jnp.maximum(logits, -20.0))))


_SCORE_FNS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": _softmax,
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": _sqrt_softplus,
    "identity": lambda logits: logits,
}


def _normalize(weights: jax.Array, eps: float) -> jax.Array:
    """weights / (their sum + eps); zeros stay zeros where eps is 0."""
    total = weights.sum(-1, keepdims=True) + eps
    total = jnp.where(total < jnp.finfo(jnp.float32).tiny, 1.0, total)
    # Division's derivative squares the total, and 1e-20 squared underflows: bring it to 1 first.
    inverse = lax.stop_gradient(1.0 / total)
    return (weights * inverse) / (total * inverse)


def _choose(keys: jax.Array, k: int) -> jax.Array:
    # lax.top_k orders -0 below +0; equal scores must tie.
    return lax.top_k(jnp.where(keys == 0, 0.0, keys), k)[1]


@dataclasses.dataclass(frozen=True)
class Router:
    """How tokens choose their experts: score, select, weigh.

    >>> import jax.numpy as jnp
    >>> router = Router(top_k=2, renormalize=True)
    >>> ids, weights = router(jnp.log(jnp.array([[1.0, 6.0, 2.0, 0.0]])))
    >>> ids.tolist(), weights.round(4).tolist()
    ([[1, 2]], [[0.75, 0.25]])

    In order: score = `score_fn(logits)`; selection score = score + selection bias; all but the
    `topk_group` best of `num_groups` groups drop out; the `top_k` largest selection scores choose
    the experts; weight = score without bias, over the chosen ones' sum + `eps` where
    `renormalize`, times `scale`.

    Args:
        top_k: k, experts per token; 1 to E.
        score_fn: "softmax" (over the experts), "sigmoid", "sqrt_softplus" (√log(1 + eˣ)) or
            "identity" (raw logits).
        score_after_top_k: select by logits, then apply `score_fn` to the chosen ones alone. It
            matters for softmax, which then normalises over these.
        selection_bias: the call takes a bias f32[E] that is added for selection, not for weights.
        num_groups: G, the number of equal, contiguous groups that the experts form; divides E.
        topk_group: groups that a token may choose from, 1 to G; `topk_group·E/G` >= k.
        group_score: a group's score: "top2_sum", the sum of its two largest selection scores, or
            "max", its largest.
        renormalize: divide the weights by their sum + `eps`.
        eps: that constant, >= 0; 1e-20 in the published sigmoid routers.
        scale: factor on the final weights (`routed_scaling_factor`).
        sparse_mixer_eps: if not None, select by SparseMixer with this `jitter_eps` instead of
            top-k (see `sparse_mixer`).
        weight_on_input: the method multiplies an expert's input, not its output, by the weight
            (Llama 4; needs top_k 1). A fact for the layer; ids and weights do not depend on it.

    Raises:
        ValueError: an argument is out of its range, or two contradict each other.

    Source: each preset function of this module names its own.
    """

    top_k: int
    score_fn: ScoreFn = "softmax"
    score_after_top_k: bool = False
    selection_bias: bool = False
    num_groups: int = 1
    topk_group: int = 1
    group_score: GroupScore = "top2_sum"
    renormalize: bool = False
    eps: float = 0.0
    scale: float = 1.0
    sparse_mixer_eps: float | None = None
    weight_on_input: bool = False

    def __post_init__(self) -> None:
        def require(name: str, ok: bool, required: str) -> None:
            if not ok:
                raise ValueError(f"Router: {name} must be {required}; got {getattr(self, name)!r}")

        for name in ("top_k", "num_groups", "topk_group"):
            value = getattr(self, name)
            is_int = isinstance(value, int) and not isinstance(value, bool)
            require(name, is_int and value >= 1, "an int >= 1")
        require(
            "topk_group", self.topk_group <= self.num_groups, f"<= num_groups={self.num_groups}"
        )
        for name, options in (
            ("score_fn", get_args(ScoreFn)),
            ("group_score", get_args(GroupScore)),
        ):
            require(name, getattr(self, name) in options, f"one of {', '.join(options)}")
        require("eps", _is_finite(self.eps) and self.eps >= 0, "finite and >= 0")
        require("scale", _is_finite(self.scale), "finite")
        if self.score_fn == "identity":
            require("renormalize", not self.renormalize, "False for raw logits, whose sum may be 0")
        if self.weight_on_input:
            require("top_k", self.top_k == 1, "1 with weight_on_input")
        if self.sparse_mixer_eps is not None:
            why = "with sparse_mixer_eps, which is a selection rule of its own"
            ok = _is_finite(self.sparse_mixer_eps) and self.sparse_mixer_eps >= 0
            require("sparse_mixer_eps", ok, "None, or finite and >= 0")
            require("score_fn", self.score_fn == "softmax", f"softmax {why}")
            require("score_after_top_k", not self.score_after_top_k, f"False {why}")
            require("selection_bias", not self.selection_bias, f"False {why}")
            require("num_groups", self.num_groups == 1, f"1 {why}")

    def __call__(self, logits: jax.Array, *, selection_bias: Any = None) -> Routing:
        """Choose `top_k` experts for each token.

        Args:
            logits: router logits [T, E] of any float dtype; any leading axes, T = 0 too.
            selection_bias: float [E], required if the router has `selection_bias`, else None.

        Returns:
            `Routing(expert_ids=int32[T, k], weights=f32[T, k])`.

        Raises:
            ValueError: dtype or shape of an argument is wrong, or E does not fit the router.
        """
        logits, bias = self._check(logits, selection_bias)
        if self.sparse_mixer_eps is not None:
            ids, weights = self._sparse_mixer(logits, self.sparse_mixer_eps)
        else:
            ids, weights = self._top_k(logits, bias)
        if self.renormalize:
            weights = _normalize(weights, self.eps)
        return Routing(ids.astype(jnp.int32), weights * self.scale)

    def _check(self, logits: jax.Array, bias: Any) -> tuple[jax.Array, jax.Array | None]:
        logits = jnp.asarray(logits)
        if not jnp.issubdtype(logits.dtype, jnp.floating) or logits.ndim == 0:
            raise ValueError(
                f"logits must be a float array [..., num_experts]; got {logits.dtype}{logits.shape}"
            )
        num_experts = logits.shape[-1]
        if self.top_k > num_experts:
            raise ValueError(
                f"logits must cover at least top_k={self.top_k} experts; got shape {logits.shape}"
            )
        if num_experts % self.num_groups:
            raise ValueError(
                f"logits [..., num_experts]: num_experts must be a multiple of "
                f"num_groups={self.num_groups}; got {num_experts}"
            )
        eligible = num_experts // self.num_groups * self.topk_group
        if self.top_k > eligible:
            raise ValueError(
                f"top_k must be <= {eligible}, the experts in topk_group={self.topk_group} of "
                f"num_groups={self.num_groups} groups; got {self.top_k}: raise topk_group"
            )
        if (bias is not None) != self.selection_bias:
            required, got = ("a float array [num_experts]", "None")
            if not self.selection_bias:
                required, got = ("None for a Router with selection_bias=False", "an array")
            raise ValueError(f"selection_bias must be {required}; got {got}")
        if bias is not None:
            bias = jnp.asarray(bias)
            if not jnp.issubdtype(bias.dtype, jnp.floating) or bias.shape != (num_experts,):
                raise ValueError(
                    f"selection_bias must be a float array [num_experts={num_experts}]; "
                    f"got {bias.dtype}{bias.shape}"
                )
            bias = bias.astype(jnp.float32)
        return logits.astype(jnp.float32), bias

    def _top_k(self, logits: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        score_fn = _SCORE_FNS[self.score_fn]
        scores = logits if self.score_after_top_k else score_fn(logits)
        # Every score function is increasing, so without bias and groups the logits select the same
        # experts, without the ties that come where a score saturates or underflows.
        keys = scores if bias is not None or self.num_groups > 1 else logits
        keys = lax.stop_gradient(keys if bias is None else keys + bias)
        keys = self._mask_groups(jnp.where(jnp.isneginf(logits), -jnp.inf, keys))
        ids = _choose(keys, self.top_k)
        weights = jnp.take_along_axis(scores, ids, -1)
        excluded = jnp.isneginf(jnp.take_along_axis(keys, ids, -1))
        if self.score_after_top_k:
            weights = score_fn(jnp.where(excluded, -jnp.inf, weights))
        return ids, jnp.where(excluded, 0.0, weights)

    def _mask_groups(self, keys: jax.Array) -> jax.Array:
        if self.num_groups == 1:
            return keys
        size = keys.shape[-1] // self.num_groups
        grouped = keys.reshape(*keys.shape[:-1], self.num_groups, size)
        best = lax.top_k(grouped, min(2, grouped.shape[-1]))[0]
        group_scores = best[..., 0]
        if self.group_score == "top2_sum":
            # A second expert that is excluded adds nothing, and does not exclude the first.
            second = jnp.where(jnp.isneginf(best), 0.0, best)[..., 1:]
            group_scores = group_scores + second.sum(-1)
        chosen = _choose(group_scores, self.topk_group)
        kept = jax.nn.one_hot(chosen, self.num_groups, dtype=jnp.bool_).any(-2)
        # -inf, not 0: with a negative bias, 0 would beat the chosen groups' own scores.
        return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(keys.shape)

    def _sparse_mixer(self, logits: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
        magnitude = lax.stop_gradient(jnp.abs(logits))
        # Finite keys for all that are not chosen yet, -inf logits too, keep the ids distinct.
        keys = lax.stop_gradient(jnp.maximum(logits, jnp.finfo(jnp.float32).min))
        remaining, ids, weights = logits, [], []
        for _ in range(self.top_k):
            largest = lax.stop_gradient(jnp.max(remaining, -1, keepdims=True))
            # (largest - x) / max(|x|, largest) > 2·eps without the division, which may be 0/0.
            far = largest - logits > 2 * eps * jnp.maximum(magnitude, largest)
            scores = _softmax(jnp.where(far, -jnp.inf, remaining))
            chosen = _choose(keys, 1)
            ids.append(chosen)
            weights.append(jnp.take_along_axis(scores, chosen, -1))
            taken = jax.nn.one_hot(chosen[..., 0], logits.shape[-1], dtype=jnp.bool_)
            keys = jnp.where(taken, -jnp.inf, keys)
            remaining = jnp.where(taken, -jnp.inf, remaining)
        return jnp.concatenate(ids, -1), jnp.concatenate(weights, -1)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def default(top_k: int) -> Router:
    """Softmax over all experts, then top-k; the weights do not sum to 1.

    Source: Shazeer et al., arXiv:1701.06538; DeepSeekMoE, arXiv:2401.06066; Qwen1.5-MoE.
    """
    return Router(top_k)


def renormalize(top_k: int) -> Router:
    """Top-k of the logits, then softmax over these; the weights sum to 1.

    Source: Mixtral, arXiv:2401.04088, section 2.1; gpt-oss, arXiv:2508.10925.
    """
    return Router(top_k, score_after_top_k=True)


def renormalize_naive(top_k: int) -> Router:
    """Softmax over all experts, top-k, division by their sum: in exact arithmetic `renormalize`.

    Source: Qwen3-MoE with `norm_topk_prob`, arXiv:2505.09388.
    """
    return Router(top_k, renormalize=True)


def top_k(top_k: int) -> Router:
    """Top-k of the logits, which are the weights themselves.

    Source: the `TopK` routing method of TensorRT-LLM's and FlashInfer's fused MoE.
    """
    return Router(top_k, score_fn="identity")


def sigmoid(top_k: int) -> Router:
    """Top-k of the sigmoid of the logits, not renormalised.

    Source: the `Sigmoid` routing method of FlashInfer's and vLLM's fused MoE.
    """
    return Router(top_k, score_fn="sigmoid")


def sigmoid_renorm(top_k: int, *, eps: float = 1e-20) -> Router:
    """Top-k of the sigmoid of the logits, divided by their sum + `eps`.

    Source: the `SigmoidRenorm` routing method of FlashInfer's and vLLM's fused MoE.
    """
    return Router(top_k, score_fn="sigmoid", renormalize=True, eps=eps)


def llama4(top_k: int = 1) -> Router:
    """The one largest logit, with its sigmoid as weight on the expert's input.

    Source: Llama 4's published model code (`Llama4TextMoe`).
    """
    return Router(top_k, score_fn="sigmoid", score_after_top_k=True, weight_on_input=True)


def deepseek_v3(
    top_k: int,
    *,
    num_groups: int = 1,
    topk_group: int = 1,
    scale: float = 1.0,
    eps: float = 1e-20,
) -> Router:
    """Sigmoid scores, selected with a bias among the best groups, renormalised without it, scaled.

    >>> import jax.numpy as jnp
    >>> router = deepseek_v3(top_k=4, num_groups=2, topk_group=1)
    >>> bias = jnp.array([2.5, 1.5, 0.5, -1.5, 0.0, -0.1, -0.2, -0.3])
    >>> router(jnp.zeros((1, 8)), selection_bias=bias).expert_ids.tolist()
    [[0, 1, 2, 3]]

    DeepSeek-V3 itself is `deepseek_v3(top_k=8, num_groups=8, topk_group=4, scale=2.5)`.

    Source: DeepSeek-V3, arXiv:2412.19437, equations 12-16 and section 2.1.2, and its published
    model code (`noaux_tc`).
    """
    return Router(
        top_k,
        score_fn="sigmoid",
        selection_bias=True,
        num_groups=num_groups,
        topk_group=topk_group,
        renormalize=True,
        eps=eps,
        scale=scale,
    )


def minimax2(top_k: int, *, eps: float = 1e-20) -> Router:
    """Sigmoid scores, selected with a bias, renormalised without it: DeepSeek-V3 without groups.

    Source: MiniMax-M2's published model code.
    """
    return Router(top_k, score_fn="sigmoid", selection_bias=True, renormalize=True, eps=eps)


def sparse_mixer(top_k: int = 2, *, jitter_eps: float = 0.01) -> Router:
    """The largest logit again and again, each weighted by a softmax over the logits near it.

    For each place: m = the largest logit not chosen yet; logits x with
    `(m - x) / max(|x|, m) > 2·jitter_eps` drop out; the weight is m's share in the softmax over
    the others that are not chosen yet. This is the deterministic (inference) rule; the gradient is
    that of the weights, not SparseMixer's estimator of the choice.

    Source: GRIN, arXiv:2409.12136; Phi-3.5-MoE's published model code.
    """
    return Router(top_k, sparse_mixer_eps=jitter_eps)


def deepseek_v4(top_k: int, *, scale: float = 1.0, eps: float = 1e-20) -> Router:
    """√softplus scores, selected with a bias, renormalised without it, scaled.

    DeepSeek-V4-Flash is `deepseek_v4(top_k=6, scale=1.5)`.

    Source: DeepSeek-V4's published model code (`sqrtsoftplus`).
    """
    return Router(
        top_k,
        score_fn="sqrt_softplus",
        selection_bias=True,
        renormalize=True,
        eps=eps,
        scale=scale,
    )


ROUTERS: Mapping[str, Callable[..., Router]] = MappingProxyType(
    {
        preset.__name__: preset
        for preset in (
            default,
            renormalize,
            renormalize_naive,
            top_k,
            sigmoid,
            sigmoid_renorm,
            llama4,
            deepseek_v3,
            minimax2,
            sparse_mixer,
            deepseek_v4,
        )
    }
)


def get_router(router: str | Router, /, **settings: Any) -> Router:
    """A preset from its name and settings; a `Router` is returned as it is.

    >>> get_router("renormalize", top_k=8) == renormalize(8)
    True

    Args:
        router: a key of `ROUTERS`, or a `Router`.
        settings: the preset's arguments; for a `Router`, values that its fields must have.

    Raises:
        ValueError: no preset has that name, it has no such setting, or a `Router` differs from one.
    """
    if isinstance(router, Router):
        for name, value in settings.items():
            if getattr(router, name, None) != value:
                raise ValueError(f"router must have {name}={value!r}, as asked for; got {router}")
        return router
    if router not in ROUTERS:
        raise ValueError(f"router must be a Router or one of {', '.join(ROUTERS)}; got {router!r}")
    try:
        return ROUTERS[router](**settings)
    except TypeError as error:
        raise ValueError(f"router {router!r}: {error}") from error


def aux(logits: jax.Array, routing: Routing, *, score_fn: ScoreFn = "softmax") -> RouterAux:
    """Load-balance loss, router z-loss and expert counts of one routing.

    >>> import jax.numpy as jnp
    >>> logits = 9 * jnp.eye(4)  # each token wants an expert of its own
    >>> losses = aux(logits, default(1)(logits))
    >>> losses.load_balance_loss.round(4).item(), losses.expert_counts.tolist()
    (1.0, [1, 1, 1, 1])

    - load balance: `E·Σₑ fₑ·Pₑ`, with fₑ the share of the T·k assignments that go to expert e (no
      gradient) and Pₑ the mean over the tokens of e's share in the token's scores. 1 when
      balanced, up to E when not.
    - z-loss: the mean over the tokens of `(log Σₑ exp(logit))²`. A token with no finite logit
      counts 0.

    Args:
        logits: the router's input, float [T, E]; leading axes are all tokens.
        routing: the router's output; ids outside 0..E-1 are assigned nowhere and count for f's T·k.
        score_fn: what turns logits into the scores of P, as `Router.score_fn`. Raw logits
            ("identity") are no distribution; for them it is softmax.

    Returns:
        `RouterAux`: f32 scalars (0 for T = 0) and int32[E].

    Raises:
        ValueError: the shapes of `logits` and `routing` do not match, or `score_fn` is unknown.

    Source: Switch Transformer, arXiv:2101.03961, equations 4-6 (k = 1); DeepSeek-V3,
    arXiv:2412.19437, equations 17-20 (any k and score); ST-MoE, arXiv:2202.08906, equation 5
    (z-loss).
    """
    if score_fn not in _SCORE_FNS:
        raise ValueError(f"score_fn must be one of {', '.join(_SCORE_FNS)}; got {score_fn!r}")
    expert_ids = routing.expert_ids
    if logits.ndim == 0 or logits.shape[:-1] != expert_ids.shape[:-1]:
        raise ValueError(
            f"logits [..., E] and routing.expert_ids [..., k] must have equal leading axes; got "
            f"{logits.shape} and {expert_ids.shape}"
        )
    num_experts = logits.shape[-1]
    logits = logits.reshape(-1, num_experts).astype(jnp.float32)
    ids = expert_ids.reshape(-1)
    # mode="drop" drops only ids past the end: negative ones would count from it.
    ids = jnp.where(ids < 0, num_experts, ids)
    counts = jnp.zeros(num_experts, jnp.int32).at[ids].add(1, mode="drop")
    tokens = max(logits.shape[0], 1)

    scores = _SCORE_FNS["softmax" if score_fn == "identity" else score_fn](logits)
    shares = scores / _one_if_zero(scores.sum(-1, keepdims=True))
    load_balance_loss = num_experts * jnp.vdot(
        counts / max(ids.size, 1), shares.sum(0) / tokens, precision=lax.Precision.HIGHEST
    )
    exp, largest = _safe_exp(logits)
    log_z = jnp.log(_one_if_zero(exp.sum(-1))) + largest[:, 0]
    return RouterAux(load_balance_loss, jnp.square(log_z).sum() / tokens, counts)
