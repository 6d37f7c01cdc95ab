"""The nine routers one token at a time, in Python floats: what `route` is compared with.

Written from the methods' definitions (Routing's docstring), with loops and `sorted` where the
package has array operations, and nothing of JAX.
"""

import math

import numpy as np

EPSILON = 1e-20


def route(logits, routing, bias=None, *, masked=-math.inf, biased_weights=False):
    """ids [T, k] and float64 weights [T, k] of `routing` for logits [T, E].

    The last two arguments plant faults for negative controls: `masked`, the score of the experts
    outside the best groups, and `biased_weights`, weights that keep the selection bias.
    """
    rows = np.asarray(logits).astype(np.float64).tolist()
    bias = [0.0] * np.shape(logits)[1] if bias is None else np.asarray(bias, np.float64).tolist()
    routed = [_one_token(row, routing, bias, masked, biased_weights) for row in rows]
    ids = np.array([ids for ids, _ in routed], np.int64).reshape(-1, routing.top_k)
    weights = np.array([weights for _, weights in routed], np.float64).reshape(-1, routing.top_k)
    return ids, weights


def _one_token(logits, routing, bias, masked, biased_weights):
    method, k = routing.method, routing.top_k
    if method in ("renormalize", "topk", "llama4"):
        ids = best(logits, k)
        chosen = [logits[e] for e in ids]
        if method == "renormalize":
            return ids, softmax(chosen)
        return ids, chosen if method == "topk" else [sigmoid(x) for x in chosen]

    if method in ("default", "renormalize_naive"):
        scores = softmax(logits)
        ids = best(scores, k)
        chosen = [scores[e] for e in ids]
        total = sum(chosen) if method == "renormalize_naive" else 1.0
        return ids, [x / total for x in chosen]

    scores = [sigmoid(x) for x in logits]
    if method in ("sigmoid", "sigmoid_renorm"):
        ids = best(scores, k)
        chosen = [scores[e] for e in ids]
        total = max(sum(chosen), EPSILON) if method == "sigmoid_renorm" else 1.0
        return ids, [x / total for x in chosen]

    assert method in ("deepseek_v3", "minimax2"), method
    ranked = [score + b for score, b in zip(scores, bias, strict=True)]
    kept = best_groups(ranked, routing.n_group, routing.topk_group)
    size = len(ranked) // routing.n_group
    ids = best([x if e // size in kept else masked for e, x in enumerate(ranked)], k)
    chosen = [ranked[e] if biased_weights else scores[e] for e in ids]
    total = sum(chosen) + EPSILON
    return ids, [x / total * routing.scaling_factor for x in chosen]


def best(scores, k):
    """Indices of the k largest, best first, equal ones by index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]


def best_groups(ranked, n_group, topk_group):
    """The groups a token may use: those whose two best experts add up to most."""
    size = len(ranked) // n_group
    groups = [sorted(ranked[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
    return best([sum(group[:2]) for group in groups], topk_group)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def softmax(xs):
    top = max(xs)
    exps = [math.exp(x - top) for x in xs]
    return [x / sum(exps) for x in exps]
