"""GPTQ, rounding grids and the GPTQ packing in plain loops and float64.

`gptq` recomputes the inverse of the remaining Hessian for every column (optimal brain surgeon as printed, Frantar
et al. arXiv:2210.17323, eq. 2), so that no Cholesky trick of the fast version is trusted. `pack_column` writes the
bit stream as text.
"""

from __future__ import annotations

import math
import statistics

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]


def half_up(value: float) -> float:
    """Return the smallest fp16 number that is at least ``value``; 1 for 0."""
    if value == 0:
        return 1.0
    near = np.float16(value)
    return float(near if float(near) >= value else np.nextafter(near, np.float16(np.inf)))


def grid(values: Array, *, bits: int, sym: bool) -> tuple[float, int]:
    """Return scale and zero point that span ``values`` (n,) and zero."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    top = 2**bits - 1
    if sym:
        return half_up(2 * max(-low, high) / top), 2 ** (bits - 1)
    if low == high == 0:
        return 1.0, 2 ** (bits - 1)
    scale = half_up((high - low) / top)
    zero_point = min(top, round(-low / scale))
    if zero_point < 1:
        return half_up(high / (top - 1)), 1
    return scale, zero_point


def code(value: float, scale: float, zero_point: int, bits: int) -> int:
    """Return the nearest code; Python rounds halves to even, as torch does."""
    return min(2**bits - 1, max(0, round(value / scale) + zero_point))


def order(diagonal: Array, *, group_size: int, act_order: bool, keep_groups: bool) -> tuple[list[int], list[int]]:
    """Return the inputs in the order of processing, and the group of each in that order."""
    n = len(diagonal)
    size = n if group_size == -1 else group_size
    if not act_order:
        return list(range(n)), [i // size for i in range(n)]
    if not keep_groups:
        return sorted(range(n), key=lambda i: -diagonal[i]), [i // size for i in range(n)]
    members = [list(range(at, min(at + size, n))) for at in range(0, n, size)]
    members.sort(key=lambda group: -sum(diagonal[i] for i in group) / len(group))
    flat = [i for group in members for i in sorted(group, key=lambda i: -diagonal[i])]
    return flat, [i // size for i in flat]


def gptq(
    weight: Array,
    hessian: Array,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    act_order: bool = False,
    keep_groups: bool = True,
    damp_frac: float = 0.01,
) -> tuple[Codes, Array, Codes, list[int]]:
    """Return codes (out, in), scales (out, groups), zero_points (out, groups) and the group of each input."""
    moments = hessian.copy()
    diagonal = np.diag(hessian).copy()
    mean = diagonal.mean()
    for i in range(len(diagonal)):
        moments[i, i] = (mean if diagonal[i] == 0 else diagonal[i]) + damp_frac * mean
    sequence, groups = order(diagonal, group_size=group_size, act_order=act_order, keep_groups=keep_groups)
    work = weight.copy()
    rows, count = weight.shape[0], max(groups) + 1
    codes = np.zeros(weight.shape, np.int64)
    scales, zero_points = np.zeros((rows, count)), np.zeros((rows, count), np.int64)
    fitted: set[int] = set()
    for position, (column, group) in enumerate(zip(sequence, groups, strict=True)):
        left = sequence[position:]
        if group not in fitted:
            fitted.add(group)
            members = [i for i, g in zip(left, groups[position:], strict=True) if g == group]
            for row in range(rows):
                scales[row, group], zero_points[row, group] = grid(work[row, members], bits=bits, sym=sym)
        inverse = np.linalg.inv(moments[np.ix_(left, left)])
        for row in range(rows):
            scale, zero = scales[row, group], int(zero_points[row, group])
            codes[row, column] = code(work[row, column], scale, zero, bits)
            error = work[row, column] - (codes[row, column] - zero) * scale
            for j, other in enumerate(left):
                work[row, other] -= error / inverse[0, 0] * inverse[0, j]
    index = [0] * len(sequence)
    for column, group in zip(sequence, groups, strict=True):
        index[column] = group
    return codes, scales, zero_points, index


def pack_column(values: list[int], bits: int) -> list[int]:
    """Return the signed 32-bit words of one column: values one after the other, lowest bit first."""
    stream = "".join(format(value, f"0{bits}b")[::-1] for value in values)
    stream = stream.ljust(math.ceil(len(stream) / 32) * 32, "0")
    words = [int(stream[at : at + 32][::-1], 2) for at in range(0, len(stream), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def normal_float(bits: int) -> Array:
    """Return the levels of NormalFloat, ascending within [-1, 1] (QLoRA, arXiv:2305.14314, appendix E).

    Quantiles of a normal distribution, evenly spaced in probability on each side of an exact zero, one more above
    zero than below. At 3 bits these are the levels of BitDistiller.
    """
    half = 2 ** (bits - 1)
    offset = 1 - 0.5 * (1 / (4 * half) + 1 / (4 * half - 2))
    quantile = statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(offset, 0.5, half + 1)[:-1]]
    below = [-quantile(p) for p in np.linspace(offset, 0.5, half)[:-1]]
    levels = np.array(sorted([*below, 0.0, *above]))
    return levels / levels.max()


def round_to_levels(values: Array, levels: Array, shares: list[float]) -> Array:
    """Round each row of ``values`` (n, group) to ``levels`` times its scale; the best share of the range per row.

    A row of zeros stays zero: its scale is never divided by.
    """
    best, least = np.zeros_like(values), np.full(len(values), np.inf)
    for share in shares:
        low, high = np.minimum(values.min(1), 0), np.maximum(values.max(1), 0)
        scale = share * np.maximum(low / levels[0], high / levels[-1])
        scale[scale == 0] = 1.0
        units = values / scale[:, None]
        nearest = levels[np.abs(units[:, :, None] - levels).argmin(2)] * scale[:, None]
        error = np.square(nearest - values).sum(1)
        best[error < least] = nearest[error < least]
        least = np.minimum(least, error)
    return best


def round_group_wise(weight: Array, *, bits: int, group_size: int, sym: bool) -> Array:
    """Return ``weight`` (out, in) rounded to nearest on the full range of each group."""
    rounded = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        for at in range(0, weight.shape[1], group_size):
            part = slice(at, at + group_size)
            scale, zero = grid(weight[row, part], bits=bits, sym=sym)
            rounded[row, part] = [(code(v, scale, zero, bits) - zero) * scale for v in weight[row, part]]
    return rounded


def awq_errors(
    weights: list[Array], inputs: Array, *, bits: int, group_size: int, sym: bool, points: int
) -> list[float]:
    """Return the mean squared change of the outputs for each exponent 0, 1/n, ..., measured on ``inputs`` (n, in)."""
    size = np.abs(inputs).mean(0)
    errors = []
    for point in range(points):
        scales = size ** (point / points)
        scales = scales / math.sqrt(scales.max() * scales.min())
        total = 0.0
        for weight in weights:
            rounded = round_group_wise(weight * scales, bits=bits, group_size=group_size, sym=sym) / scales
            total += float(np.square(inputs @ (rounded - weight).T).sum(1).mean())
        errors.append(total)
    return errors


def rotated_linears(
    state: dict[str, Array], head: Array, stream: Array, *, kv_heads: int, heads: int
) -> dict[str, Array]:
    """Return weights and biases of one decoder layer in the basis ``stream``, its heads in the basis ``head``.

    One whole matrix per side of each linear, y = B' W D A x for the bases A before and B behind and the gain D.
    """
    identity = np.eye(len(stream))
    values, queries = np.kron(np.eye(kv_heads), head), np.kron(np.eye(heads), head)
    into, over = np.diag(state["input_layernorm.weight"]), np.diag(state["post_attention_layernorm.weight"])
    ffn = np.eye(state["mlp.down_proj.weight"].shape[1])
    plain = {name: np.eye(state[f"self_attn.{name}.weight"].shape[0]) for name in ("q_proj", "k_proj")}
    sides = {
        "self_attn.q_proj": (plain["q_proj"], into @ stream),
        "self_attn.k_proj": (plain["k_proj"], into @ stream),
        "self_attn.v_proj": (values, into @ stream),
        "self_attn.o_proj": (stream, queries),
        "mlp.gate_proj": (ffn, over @ stream),
        "mlp.up_proj": (ffn, over @ stream),
        "mlp.down_proj": (stream, ffn),
    }
    found = {f"{name}.weight": behind.T @ state[f"{name}.weight"] @ before for name, (behind, before) in sides.items()}
    biases = {f"{name}.bias": behind.T @ state[f"{name}.bias"] for name, (behind, _) in sides.items()
              if f"{name}.bias" in state}  # fmt: skip
    assert np.allclose(stream @ stream.T, identity), "the basis must be orthogonal"
    return found | biases


def trained_level(weight: float, step: float, zero: int, *, bits: int, rule: str) -> float:
    """Return the level of one weight: the nearest of the rule's levels, as far as the rule's clip lets it be."""
    ratio = weight / step
    if rule == "elastic":  # cells of two steps, the levels in their middles
        return float(min((-3, -1, 1, 3), key=lambda level: abs(level - ratio)))
    if rule == "ternary":
        return float(min((-1, 0, 1), key=lambda level: abs(level - ratio)))
    return float(min(range(-zero, 2**bits - zero), key=lambda level: abs(level - ratio)))


def surrogate(
    weight: float, step: float, zero: float, held: tuple[float, float, float], *, bits: int, rule: str
) -> float:
    """Return what a rounded weight is taken for when it is differentiated, near the point ``held``.

    The rounding error at ``held`` (weight, step, zero point) is kept, and with it on which side of the clip it lay.
    """
    at_weight, at_step, at_zero = held
    ratio, level = at_weight / at_step, trained_level(at_weight, at_step, round(at_zero), bits=bits, rule=rule)
    top = 2**bits - 1
    if rule in ("elastic", "ternary"):
        inside = abs(ratio) <= 0.99 * {"elastic": 4.0, "ternary": 1.5}[rule]
    elif rule == "lsq":
        inside = -at_zero <= ratio <= top - at_zero
    else:
        inside = -at_zero <= round(ratio) <= top - at_zero
    if inside:
        return (weight / step + (level - ratio)) * step
    if rule in ("elastic", "ternary"):
        return level * step
    return (-zero if ratio < 0 else top - zero) * step


def row_error(weight: Array, rounded: Array, moment: Array) -> Array:
    """Return the output error e' H e of each row (out,)."""
    return np.array([float(e @ moment @ e) for e in rounded - weight])
