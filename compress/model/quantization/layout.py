"""What is quantized how: bits and group size of every linear, zero-padding of the feed-forward width.

`choose` reads a config and the parameters and gives a `Layout`; `quantization_config` is what it writes into the
checkpoint. Works on the dict of ``config.json``; knows nothing of weights and imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from compress.errors import ModelError
from compress.json_reader import required
from compress.model.quantization.params import GROUP_SIZES, AwqParams, GptqParams, QatParams, RtnParams
from compress.model.shapes import head_size, linear_shapes

PLAIN = 16  # bits of a linear that is left alone
# Milliseconds of one row times (2048, 1024) by MatMulNBits, onnxruntime 1.32, one thread of an AVX512-VNNI server, with
# other work beside it, least of 12; with zero points alike. Without a kernel the operator unpacks weights each time.
#   accuracy level 4, blocks of 16 / 32 / 64 / 128 / 256     accuracy level 1 (fp32)
#   2 bits   8.9  / 0.11 / 0.10 / 0.09 / 5.1                 7.8  / 6.2  / 5.9  / 9.2  / 8.7
#   4 bits   0.17 / 0.12 / 0.11 / 0.12 / 0.08                0.39 / 0.38 / 0.38 / 0.45 / 0.33
#   8 bits   0.11 / 0.10 / 0.09 / 0.09 / 0.08                8.8  / 7.2  / 6.8  / 4.1  / 3.6
_KERNELS: Mapping[int, Mapping[int, tuple[int, ...]]] = {  # whether rounded to 8 bits (level 4) -> bits -> blocks
    4: {2: (32, 64, 128), 4: (16, 32, 64, 128, 256), 8: (16, 32, 64, 128, 256)},
    1: {4: (16, 32, 64, 128, 256)},
}


@dataclass(frozen=True)
class LinearSpec:
    """How one linear is quantized: ``bits`` of its grid (16: not at all), ``group_size`` (-1: a row), ``sym``.

    ``nf3``: the eight levels of 3 bits lie as a normal distribution's quantiles instead of evenly. ``elastic``: the
    four levels of 2 bits lie between the codes that 2 bits can store. ``scale_bits`` are significant bits of a scale.
    """

    bits: int
    group_size: int
    sym: bool
    nf3: bool = False
    elastic: bool = False
    scale_bits: int = 11  # of fp16

    @property
    def stored_bits(self) -> int:
        """Bits of a code in the checkpoint: 4 for 3, which no runtime has an operator for, and for ``elastic``."""
        return 4 if self.bits == 3 or (self.bits == 2 and self.elastic) else self.bits


@dataclass(frozen=True)
class Layout:
    """How one model is quantized.

    Attributes:
        bits: of the grid of the linears.
        stored_bits: of the container in the checkpoint; 4 for 3 bits, which no runtime has an operator for.
        group_size: after falling to a divisor; -1 is one group per row.
        ffn: feed-forward width after zero-padding.
        embedding_bits: 16 means fp16, not quantized.
        lm_head_bits: the same; equal to ``embedding_bits`` when tied.
        tied: whether the head is the embedding.
        linears: the specification of each linear by its path, such as ``model.layers.0.mlp.up_proj``.
        notes: what gave way, for the user.
    """

    bits: int
    stored_bits: int
    group_size: int
    ffn: int
    embedding_bits: int
    lm_head_bits: int
    tied: bool
    linears: Mapping[str, LinearSpec]
    notes: list[str] = field(default_factory=list)


def choose(config: Mapping[str, Any], params: RtnParams, *, where: str) -> Layout:
    """Return the layout for a model; ModelError when a tied head is to get other bits than the embedding."""
    tied = bool(config.get("tie_word_embeddings", False))
    head_bits = params.embedding_bits if params.lm_head_bits is None else params.lm_head_bits
    if tied and head_bits != params.embedding_bits:
        raise ModelError(
            f"{where}.lm_head_bits",
            f"{head_bits} beside embedding_bits {params.embedding_bits}",
            "one value: in this model the head is the embedding (tie_word_embeddings)",
            "Leave lm_head_bits out",
        )
    group_size, ffn, notes = fit_group_size(config, params.group_size)
    elastic = isinstance(params, QatParams) and params.rule == "elastic"
    common = LinearSpec(params.bits, group_size, params.sym, elastic=elastic)
    linears, more = _specs(dict(config) | {"intermediate_size": ffn}, params, common, where=where)
    notes += more
    if params.grid == "nf3":
        linears = _with_nf3(linears, params, where=where)
    if any(spec.bits == 3 for spec in linears.values()):
        notes.append("3-bit codes are stored in 4 bits: no runtime here has a 3-bit operator, so no bytes are saved")
    if params.grid == "nf3":
        notes.append("nf3 uses 8 of the 16 levels of those 4 bits: 3 bits of information in the bytes of 4")
    if elastic:
        notes.append("codes of rule elastic are stored in 4 bits: its levels -3, -1, 1, 3 lie between those of 2 bits")
    layout = Layout(
        bits=params.bits,
        stored_bits=common.stored_bits,
        group_size=group_size,
        ffn=ffn,
        embedding_bits=params.embedding_bits,
        lm_head_bits=head_bits,
        tied=tied,
        linears=linears,
        notes=notes,
    )
    slow = slow_note(layout)
    if slow is not None:
        layout.notes.append(slow)
    return layout


def has_kernel(bits: int, block: int, *, accuracy_level: int = 4) -> bool:
    """Whether the runtime multiplies codes of ``bits`` in blocks of ``block`` without unpacking them each time."""
    return block in _KERNELS[4 if accuracy_level == 4 else 1].get(bits, ())


def slow_note(layout: Layout) -> str | None:
    """Return what the user must know where the runtime has no kernel for a pair of bits and group; else None."""
    slow = [
        path
        for path, spec in layout.linears.items()
        if spec.stored_bits in _KERNELS[4] and spec.group_size != -1
        if not has_kernel(spec.stored_bits, spec.group_size)
    ]
    if not slow:
        return None
    spec = layout.linears[slow[0]]
    return (
        f"{len(slow)} linears have {spec.stored_bits} bits in groups of {spec.group_size}, for which onnxruntime has "
        f"no int8 kernel: they decode 50 to 100 times slower than in groups of 32. Take group_size 32 or more, or "
        f"bits 4 in groups of {spec.group_size}; where the widths allow no larger group, bits 4"
    )


def _with_nf3(linears: Mapping[str, LinearSpec], params: RtnParams, *, where: str) -> dict[str, LinearSpec]:
    """Give the 3-bit linears the levels of NF3; ModelError where there are none, or the grid is not symmetric."""
    if not params.sym:
        raise ModelError(f"{where}.grid", "nf3 beside sym false", "nf3 with sym true: its zero point is fixed")
    if all(spec.bits != 3 for spec in linears.values()):
        raise ModelError(f"{where}.grid", f"nf3 with bits {params.bits}", "nf3 with bits 3", "NF3 is a 3-bit grid")
    return {path: replace(spec, nf3=spec.bits == 3) for path, spec in linears.items()}


def untied_by(config: Mapping[str, Any], params: RtnParams) -> dict[str, Any]:
    """Return ``config`` as a rotation leaves it, as far as can be told without weights: `full` unties the head."""
    return dict(config) | ({"tie_word_embeddings": False} if params.rotate == "full" else {})


def _specs(
    config: Mapping[str, Any], params: RtnParams, common: LinearSpec, *, where: str
) -> tuple[dict[str, LinearSpec], list[str]]:
    """Return the specification of every linear, and notes; ModelError for a pattern that fits none."""
    shapes = {
        f"model.layers.{index}.{name}": shape
        for index in range(int(config["num_hidden_layers"]))
        for name, shape in linear_shapes(config).items()
    }
    patterns = [("ignore", text) for text in params.ignore] + [("overrides", o.pattern) for o in params.overrides]
    for key, text in patterns:
        if not any(fnmatchcase(path, text) for path in shapes):
            raise ModelError(
                f"{where}.{key}",
                f"the pattern {text!r} fits no linear",
                "a pattern of paths",
                f"Like {next(iter(shapes))}",
            )
    specs: dict[str, LinearSpec] = {}
    fallen: set[tuple[str, int, int]] = set()
    for path, (_, inputs) in shapes.items():
        if any(fnmatchcase(path, text) for text in params.ignore):
            specs[path] = replace(common, bits=PLAIN)
            continue
        found = next((o for o in params.overrides if fnmatchcase(path, o.pattern)), None)
        spec = common if found is None or found.bits is None else replace(common, bits=found.bits)
        if found is not None and found.group_size is not None:
            size = fitting_group(inputs, found.group_size)
            spec = replace(spec, group_size=common.group_size if size is None else size)
            if spec.group_size != found.group_size:
                fallen.add((found.pattern, found.group_size, spec.group_size))
        specs[path] = spec
    notes = [
        f"group_size {wanted} of {text} does not divide all inputs there; where it does not, {used} is used"
        for text, wanted, used in sorted(fallen)
    ]
    return specs, notes


def fitting_group(inputs: int, wanted: int) -> int | None:
    """Return the largest group size up to ``wanted`` that divides ``inputs``; None where there is none."""
    if wanted == -1:
        return -1
    return next((size for size in GROUP_SIZES if size <= wanted and inputs % size == 0), None)


def fit_group_size(config: Mapping[str, Any], wanted: int) -> tuple[int, int, list[str]]:
    """Return the group size, the feed-forward width to pad to, and notes for the user.

    The largest size up to ``wanted`` that divides the inputs of every linear wins. If none does because of the
    feed-forward width alone, that width is padded with zeros, which changes no output (dependencies: gate, up and
    down of zeros multiply to zero) and which every reader of the format takes, unlike a shorter last group.
    """
    hidden, ffn = int(config["hidden_size"]), int(config["intermediate_size"])
    attention = int(config["num_attention_heads"]) * head_size(config)
    if wanted == -1:
        return -1, ffn, []
    allowed = [size for size in GROUP_SIZES if size <= wanted]
    whole = [size for size in allowed if not (hidden % size or attention % size or ffn % size)]
    if whole:
        notes = [] if whole[0] == wanted else [_fallen(wanted, whole[0], hidden, attention, ffn)]
        return whole[0], ffn, notes
    but_ffn = [size for size in allowed if not (hidden % size or attention % size)]
    if but_ffn:
        size = but_ffn[0]
        padded = -(-ffn // size) * size
        notes = [] if size == wanted else [_fallen(wanted, size, hidden, attention, padded)]
        notes.append(
            f"feed-forward width {ffn} padded with zeros to {padded}, a multiple of group_size {size}: no group size "
            f"from {GROUP_SIZES[-1]} up divides it. The outputs stay the same"
        )
        return size, padded, notes
    return (
        wanted,
        ffn,
        [
            f"no group size from {GROUP_SIZES[-1]} up divides the inputs (hidden {hidden}, heads x head size "
            f"{attention}): the last group of a row is shorter than {wanted}. "
            "The ONNX builder refuses such a checkpoint"
        ],
    )


def _fallen(wanted: int, size: int, hidden: int, attention: int, ffn: int) -> str:
    return (
        f"group_size {wanted} fell to {size}, the largest that divides the inputs of every linear "
        f"(hidden {hidden}, heads x head size {attention}, feed-forward {ffn})"
    )


def quantization_config(layout: Layout, params: RtnParams) -> dict[str, Any]:
    """Return the ``quantization_config`` of a "gptq" checkpoint, with the names that AutoGPTQ gave them."""
    nearest = isinstance(params, AwqParams) and params.rounding == "nearest"
    nearest |= isinstance(params, QatParams) and params.start != "gptq"
    gptq = params if isinstance(params, GptqParams) and not nearest else None
    dynamic = _dynamic(layout)
    free_order = gptq is not None and gptq.act_order and not gptq.keep_groups
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",  # stored zero = zero point - 1; "gptq_v2" is silently misread by some readers
        "bits": layout.stored_bits,
        "group_size": layout.group_size,
        "sym": params.sym,
        "desc_act": free_order,
        **({"damp_percent": gptq.damp_frac} if gptq is not None and gptq.damp_frac else {}),  # readers refuse 0
        "true_sequential": gptq.true_sequential if gptq is not None else False,
        "static_groups": False,
        "lm_head": False,
    } | ({"dynamic": dynamic} if dynamic else {})


def _dynamic(layout: Layout) -> dict[str, dict[str, Any]]:
    """Return GPTQModel's ``dynamic``: what differs from the common settings, by exact expressions of paths."""
    classes: dict[tuple[int, int], list[str]] = {}
    for path, spec in layout.linears.items():
        if (spec.stored_bits, spec.group_size) != (layout.stored_bits, layout.group_size):
            classes.setdefault((spec.stored_bits, spec.group_size), []).append(path)
    entries: dict[str, dict[str, Any]] = {}
    for (bits, group_size), paths in sorted(classes.items()):
        exact = f"^(?:{_alternatives(paths)})$"
        changed = {"bits": bits, "group_size": group_size}
        entries[f"-:{exact}" if bits == PLAIN else f"+:{exact}"] = {} if bits == PLAIN else changed
    return entries


def _alternatives(paths: Sequence[str]) -> str:
    """Return an expression for exactly these paths: layers of the same parts are written together."""
    parts: dict[str, list[str]] = {}
    for path in paths:
        _, _, layer, part = path.split(".", 3)
        parts.setdefault(layer, []).append(part)
    layers: dict[tuple[str, ...], list[str]] = {}
    for layer, found in parts.items():
        layers.setdefault(tuple(found), []).append(layer)
    return "|".join(
        rf"model\.layers\.(?:{'|'.join(which)})\.(?:{'|'.join(re.escape(part) for part in found)})"
        for found, which in layers.items()
    )


def stored_as(config: Mapping[str, Any], path: str) -> tuple[int, int]:
    """Return bits and group size of the linear ``path`` as a ``quantization_config`` says; 16 bits: not quantized.

    The first exception of ``dynamic`` whose expression fits counts, as in GPTQModel.
    """
    where = "config.json: quantization_config"
    bits = required(config, "bits", int, where, ModelError, least=1, most=32)
    group_size = -1 if config.get("group_size") is None else int(config["group_size"])
    for text, entry in (config.get("dynamic") or {}).items():
        if re.match(text.removeprefix("+:").removeprefix("-:"), path):
            if text.startswith("-:"):
                return PLAIN, group_size
            return int(entry.get("bits", bits)), int(entry.get("group_size", group_size))
    return bits, group_size
