"""The routing methods in NumPy f64, one token at a time, each written from its definition alone.

A route is a list of (expert, weight) in the order of selection. Nothing here is shared with jaxmoe.
"""

from __future__ import annotations

import math

import numpy as np


def softmax(x):
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def sigmoid(v):
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def softplus(v):
    return max(v, 0) + math.log1p(math.exp(-abs(v)))


def best(values, k):
    """The k indices of the largest values; the lower index first among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def default(x, k):
    p = softmax(x)
    return [(e, p[e]) for e in best(p, k)]


def renormalize(x, k):
    chosen = best(x, k)
    return list(zip(chosen, softmax([x[e] for e in chosen]), strict=True))


def renormalize_naive(x, k):
    route = default(x, k)
    total = sum(w for _, w in route)
    return [(e, w / total) for e, w in route]


def top_k(x, k):
    return [(e, x[e]) for e in best(x, k)]


def sigmoid_routing(x, k):
    return [(e, sigmoid(x[e])) for e in best(x, k)]


def sigmoid_renorm(x, k):
    route = sigmoid_routing(x, k)
    total = sum(w for _, w in route) + 1e-20
    return [(e, w / total) for e, w in route]


def llama4(x, k=1):
    assert k == 1
    e = best(x, 1)[0]
    return [(e, sigmoid(x[e]))]


def deepseek_v3(x, k, bias, num_groups=1, topk_group=1, scale=1.0):
    size = len(x) // num_groups
    s = [sigmoid(v) for v in x]
    b = [v + c for v, c in zip(s, bias, strict=True)]
    group_scores = [sum(sorted(b[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
    kept = best(group_scores, topk_group)
    candidates = [e for e in range(len(x)) if e // size in kept]
    chosen = [candidates[i] for i in best([b[e] for e in candidates], k)]
    total = sum(s[e] for e in chosen) + 1e-20
    return [(e, s[e] / total * scale) for e in chosen]


def minimax2(x, k, bias):
    s = [sigmoid(v) for v in x]
    chosen = best([v + c for v, c in zip(s, bias, strict=True)], k)
    total = sum(s[e] for e in chosen) + 1e-20
    return [(e, s[e] / total) for e in chosen]


def sparse_mixer(x, k, jitter_eps=0.01):
    route, taken = [], set()
    for _ in range(k):
        rest = [e for e in range(len(x)) if e not in taken]
        m = max(x[e] for e in rest)
        chosen = min(e for e in rest if x[e] == m)
        near = [e for e in rest if not (m - x[e]) > 2 * jitter_eps * max(abs(x[e]), m)]
        route.append((chosen, 1 / sum(math.exp(x[e] - m) for e in near)))
        taken.add(chosen)
    return route


def deepseek_v4(x, k, bias, scale=1.0):
    s = [math.sqrt(softplus(v)) for v in x]
    chosen = best([v + c for v, c in zip(s, bias, strict=True)], k)
    total = sum(s[e] for e in chosen) + 1e-20
    return [(e, s[e] / total * scale) for e in chosen]


def decoupled(
    x, k, *, score_fn, after, bias, num_groups, topk_group, group_score, renormalize, eps, scale
):
    """Any combination of the choices, in the order of `Router`'s description."""
    score = {
        "softmax": softmax,
        "sigmoid": lambda v: [sigmoid(a) for a in v],
        "sqrt_softplus": lambda v: [math.sqrt(softplus(a)) for a in v],
        "identity": list,
    }[score_fn]
    s = list(x) if after else score(x)
    b = s if bias is None else [v + c for v, c in zip(s, bias, strict=True)]
    size = len(x) // num_groups
    groups = [sorted(b[g * size : (g + 1) * size], reverse=True) for g in range(num_groups)]
    kept = best([g[0] if group_score == "max" else sum(g[:2]) for g in groups], topk_group)
    candidates = [e for e in range(len(x)) if e // size in kept]
    chosen = [candidates[i] for i in best([b[e] for e in candidates], k)]
    w = [s[e] for e in chosen]
    w = score(w) if after else w
    w = [v / (sum(w) + eps) for v in w] if renormalize else w
    return [(e, v * scale) for e, v in zip(chosen, w, strict=True)]


PRESETS = {
    "default": default,
    "renormalize": renormalize,
    "renormalize_naive": renormalize_naive,
    "top_k": top_k,
    "sigmoid": sigmoid_routing,
    "sigmoid_renorm": sigmoid_renorm,
    "llama4": llama4,
    "deepseek_v3": deepseek_v3,
    "minimax2": minimax2,
    "sparse_mixer": sparse_mixer,
    "deepseek_v4": deepseek_v4,
}


def route(method, logits, *args, **kwargs):
    """ids int [T, k] and weights f64 [T, k] of logits [T, E]."""
    routes = [method([float(v) for v in x], *args, **kwargs) for x in np.asarray(logits, float)]
    return (
        np.array([[e for e, _ in r] for r in routes]),
        np.array([[w for _, w in r] for r in routes]),
    )


def losses(logits, ids, score="softmax"):
    """Load-balance loss, z-loss, counts."""
    t, e = logits.shape
    counts = [int((ids == i).sum()) for i in range(e)]
    p = np.zeros(e)
    z = 0.0
    for x in np.asarray(logits, float):
        s = {
            "softmax": softmax,
            "sigmoid": lambda v: [sigmoid(a) for a in v],
            "sqrt_softplus": lambda v: [math.sqrt(softplus(a)) for a in v],
        }[score](list(x))
        p += np.array(s) / sum(s) / t
        z += (max(x) + math.log(sum(math.exp(v - max(x)) for v in x))) ** 2 / t
    f = np.array(counts) / ids.size
    return e * float(f @ p), z, counts
