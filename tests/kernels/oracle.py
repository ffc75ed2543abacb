"""What the ops of `kvant.kernels.ops` mean, written a second time: float64, one row at a time, no batching."""

from __future__ import annotations

import math

import numpy as np

from kvant.kernels.ops import AttentionShape

Array = np.ndarray


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return np.stack([row / math.sqrt((row @ row) / len(row) + eps) * weight for row in x.reshape(-1, x.shape[-1])])


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """x [T, heads, D]: elements i and i + R / 2 as one complex number, turned."""
    out, half = x.copy(), cos.shape[-1]
    for token in range(len(x)):
        turn = cos[token] + 1j * sin[token]
        for head in range(x.shape[1]):
            turned = (x[token, head, :half] + 1j * x[token, head, half : 2 * half]) * turn
            out[token, head, : 2 * half] = np.concatenate([turned.real, turned.imag])
    return out


def attend(q: Array, keys: Array, values: Array, position: int, shape: AttentionShape) -> Array:
    """One token's q [H, D] over its sequence's keys and values [G, context, D]: [H, D]."""
    first = 0 if shape.window is None else max(position - shape.window + 1, 0)
    seen = slice(first, position + 1)
    out = np.empty_like(q)
    for head in range(shape.num_heads):
        group = head // (shape.num_heads // shape.num_kv_heads)
        scores = keys[group, seen] @ q[head] * shape.scale
        if shape.softcap is not None:
            scores = shape.softcap * np.tanh(scores / shape.softcap)
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[group, seen] / weights.sum()
    return out


def gated(x: Array, activation: str) -> Array:
    gate, up = np.split(x, 2, axis=-1)
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if activation == "gelu":
        return gate * 0.5 * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) * up
    return gate * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


def draws(
    logits: Array, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float, slack: float
) -> set[int]:
    """The tokens that a draw may give if every comparison is wrong by at most `slack` of probability."""
    if temperature == 0:
        return {int(np.argmax(logits))}
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or len(logits)]
    probs = np.exp((logits[order] - logits[order[0]]) / temperature)
    probs /= probs.sum()
    accepted = set()
    for wrong in (-slack, 0.0, slack):
        kept = [
            i
            for i, p in enumerate(probs)
            if i == 0 or (probs[:i].sum() < top_p + wrong and p >= min_p * probs[0] + wrong)
        ]
        total, reached = probs[kept].sum(), 0.0
        for i in kept:
            if reached - slack <= uniform * total <= reached + probs[i] + slack:
                accepted.add(order[i])
            reached += probs[i]
    return accepted
