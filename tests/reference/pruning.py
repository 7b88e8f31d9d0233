"""Minitron's activation importances (arXiv:2407.14679, section 2.2) in plain loops and float64.

Works on recorded activations, one list entry per calibration row, padding already taken off. The forward pass
is written out too, so that no hook of the fast version is trusted: `run_row` computes every activation of a
Llama-family model from its weights.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def channel_scores(rows: list[Array]) -> Array:
    """Return per channel: mean over a row's tokens of the absolute value, then L2 over rows. A row is (T, C)."""
    scores = []
    for channel in range(rows[0].shape[1]):
        total = 0.0
        for row in rows:
            mean = 0.0
            for value in row[:, channel]:
                mean += abs(float(value))
            total += (mean / len(row)) ** 2
        scores.append(math.sqrt(total))
    return np.array(scores)


def head_scores(rows: list[Array], size: int) -> Array:
    """Return per head: mean over a row's tokens of the norm of the head's output, then L2 over rows."""
    norms = []
    for row in rows:
        heads = row.shape[1] // size
        table = np.zeros((len(row), heads))
        for t in range(len(row)):
            for head in range(heads):
                table[t, head] = math.sqrt(sum(float(x) ** 2 for x in row[t, head * size : (head + 1) * size]))
        norms.append(table)
    return channel_scores(norms)


def block_score(before: list[Array], after: list[Array]) -> float:
    """Return 1 - mean over all tokens of the cosine between a block's input and output, rows of (T, D)."""
    cosines = []
    for ins, outs in zip(before, after, strict=True):
        for x, y in zip(ins, outs, strict=True):
            cosines.append(float(x @ y) / (math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))))
    return 1.0 - sum(cosines) / len(cosines)


def run_row(model: Any, ids: list[int]) -> dict[str, Array]:
    """Return the activations of one row by name: ``ffn.i`` ``heads.i`` ``in.i`` ``out.i`` and ``norm.NAME``."""
    config = model.config
    weights = {name: value.detach().double().numpy() for name, value in model.state_dict().items()}
    seen: dict[str, Array] = {}
    stream = np.stack([weights["model.embed_tokens.weight"][token] for token in ids])
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
        seen[f"in.{index}"] = stream
        normed = _rms(stream, layer["input_layernorm.weight"], config.rms_norm_eps)
        seen[f"norm.{prefix}input_layernorm"] = normed
        heads = _attention(normed, layer, config, model.model.layers[index].self_attn.head_dim)
        seen[f"heads.{index}"] = heads
        stream = stream + _linear(heads, layer, "self_attn.o_proj")
        normed = _rms(stream, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        seen[f"norm.{prefix}post_attention_layernorm"] = normed
        gate = _linear(normed, layer, "mlp.gate_proj")
        inner = gate / (1 + np.exp(-gate)) * _linear(normed, layer, "mlp.up_proj")
        seen[f"ffn.{index}"] = inner
        stream = stream + _linear(inner, layer, "mlp.down_proj")
        seen[f"out.{index}"] = stream
    seen["norm.model.norm"] = _rms(stream, weights["model.norm.weight"], config.rms_norm_eps)
    return seen


def _linear(x: Array, layer: dict[str, Array], name: str) -> Array:
    y = x @ layer[f"{name}.weight"].T
    return np.asarray(y + layer[f"{name}.bias"] if f"{name}.bias" in layer else y)


def _rms(x: Array, gain: Array, eps: float) -> Array:
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * gain)


def _attention(x: Array, layer: dict[str, Array], config: Any, size: int) -> Array:
    """Return the heads' outputs side by side (T, H * size), before o_proj."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]
    parts = {name: _linear(x, layer, f"self_attn.{name}_proj") for name in "qkv"}
    result = np.zeros((len(x), heads * size))
    for head in range(heads):
        group = head // (heads // groups)
        query = parts["q"][:, head * size : (head + 1) * size]
        key, value = (parts[name][:, group * size : (group + 1) * size] for name in "kv")
        if "self_attn.q_norm.weight" in layer:
            query = _rms(query, layer["self_attn.q_norm.weight"], config.rms_norm_eps)
            key = _rms(key, layer["self_attn.k_norm.weight"], config.rms_norm_eps)
        query, key = _rotated(query, theta), _rotated(key, theta)
        for t in range(len(x)):
            scores = [float(query[t] @ key[s]) / math.sqrt(size) for s in range(t + 1)]
            weights = [math.exp(score - max(scores)) for score in scores]
            for s in range(t + 1):
                result[t, head * size : (head + 1) * size] += weights[s] / sum(weights) * value[s]
    return result


def _rotated(x: Array, theta: float) -> Array:
    size = x.shape[1]
    result = np.zeros_like(x)
    for t in range(len(x)):
        for i in range(size // 2):
            angle = t * theta ** (-2 * i / size)
            a, b = x[t, i], x[t, i + size // 2]
            result[t, i] = a * math.cos(angle) - b * math.sin(angle)
            result[t, i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
    return result
