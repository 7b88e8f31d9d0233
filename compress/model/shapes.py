"""Sizes of decoder models from their config alone: tensor shapes, parameter counts, the shapes a student may have.

`tensor_shapes` lists every stored tensor, `parameter_count` adds them up, `with_shape` writes a student's config,
`nearest_shape` and `shape_for_ratio` choose sizes that transformers can save and open and that weight groups fit.
Works on the plain dict of ``config.json``; knows nothing of weights and imports no torch, so that a plan is quick.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.errors import ModelError
from compress.json_reader import required, shown
from compress.patterns import slow_pattern

SUPPORTED = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_BY_TYPE = {"llama": SUPPORTED[0], "qwen2": SUPPORTED[1], "qwen3": SUPPORTED[2]}
AXES = ("heads", "ffn", "hidden", "layers")
_TYPES = {name: kind for kind, name in _BY_TYPE.items()}
_MOST = {
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 13,
    "max_position_embeddings": 1 << 27,
}
_MAY_MISS = ("num_key_value_heads", "head_dim", "max_position_embeddings")  # null is as if left out
_KINDS: dict[str, type] = {
    "layer_types": list,
    "quantization_config": dict,
    "rope_parameters": dict,
    "rope_scaling": dict,
    "tie_word_embeddings": bool,
    "attention_bias": bool,
    "mlp_bias": bool,
    "hidden_act": str,
    "dtype": str,
    "torch_dtype": str,
}
_MOST_SHAPES = 1_000_000  # that are tried for a ratio; each takes some 50 microseconds
_OVER_REACH = 0.02  # a ratio this far (share of the whole) beyond what the axes can give is refused


@dataclass(frozen=True, slots=True)
class StudentShape:
    """Sizes of a student; ``hidden=None`` keeps the teacher's. The head size is always the teacher's."""

    layers: int
    heads: int
    kv_heads: int
    ffn: int
    hidden: int | None = None

    def text(self) -> str:
        """Return the shape in words, for notes and errors."""
        width = "" if self.hidden is None else f", hidden {self.hidden}"
        return f"{self.layers} layers, {self.heads}/{self.kv_heads} heads, ffn {self.ffn}{width}"


def architecture(config: Mapping[str, Any], *, where: str = "config.json") -> str:
    """Return the architecture's class name; ModelError names the supported ones for any other."""
    kind, listed = config.get("model_type"), config.get("architectures")
    known = _BY_TYPE.get(kind) if isinstance(kind, str) else None
    name = listed[0] if isinstance(listed, list) and listed else listed or known or kind
    if not isinstance(name, str) or name not in SUPPORTED:
        got = name if isinstance(name, str) else shown(name)
        raise ModelError(where, f"architecture {got[:80]}", f"one of {', '.join(SUPPORTED)}")
    if kind is not None and known != name:  # transformers would build what model_type says
        raise ModelError(where, f"architecture {name} with model_type {shown(kind)}", f"model_type {_TYPES[name]!r}")
    return name


def check_config(config: Mapping[str, Any], *, where: str = "config.json") -> None:
    """Raise ModelError unless ``config`` is a supported architecture with whole positive sizes that fit together.

    Each size has an upper bound far above every model in use: what stands in a file must not decide how much memory
    is asked for, or how long a plan takes.
    """
    name = architecture(config, where=where)
    for key, most in _MOST.items():
        if key not in _MAY_MISS or config.get(key) is not None:
            required(config, key, int, where, ModelError, least=1, most=most)
    for key, kind in _KINDS.items():
        if config.get(key) is not None:
            required(config, key, kind, where, ModelError)
    heads, kv = config["num_attention_heads"], kv_head_count(config)
    if kv < 1 or heads % kv:
        raise ModelError(where, f"{heads} attention heads over {kv} key-value heads", "a whole number of heads each")
    if name == SUPPORTED[0] and config["hidden_size"] % heads:
        raise ModelError(where, f"hidden_size {config['hidden_size']} with {heads} heads", "a multiple of the heads")
    if head_size(config) < 1:
        raise ModelError(where, f"hidden_size {config['hidden_size']} with {heads} heads", "a head of one or more")
    layer_types = config.get("layer_types")
    if layer_types is not None and len(layer_types) != config["num_hidden_layers"]:
        raise ModelError(where, f"{len(layer_types)} layer_types", f"{config['num_hidden_layers']}, one per layer")
    if not all(isinstance(kind, str) for kind in layer_types or ()):
        raise ModelError(where, "layer_types holds what is no text", "a name per layer")
    if config.get("quantization_config") is not None:
        _check_quantization(config["quantization_config"], f"{where}: quantization_config")


def check_context(config: Mapping[str, Any], *, where: str = "config.json") -> None:
    """Raise ModelError unless the model's context, where ``config`` tells it, is a size."""
    key = "max_position_embeddings"
    if config.get(key) is not None:
        required(config, key, int, where, ModelError, least=1, most=_MOST[key])


def _check_quantization(settings: Mapping[str, Any], where: str) -> None:
    """Types of what `compress.model.quantization` reads; its exceptions are regular expressions over paths."""
    for key, least, most in (("bits", 1, 32), ("group_size", -1, 1 << 20)):
        if settings.get(key) is not None:
            required(settings, key, int, where, ModelError, least=least, most=most)
    dynamic = settings.get("dynamic")
    if dynamic is None:
        return
    for text, entry in required(settings, "dynamic", dict, where, ModelError).items():
        reason = slow_pattern(text.removeprefix("+:").removeprefix("-:"), repeats=3)
        if reason or len(dynamic) > 1000:
            raise ModelError(where, f"dynamic: {shown(text)} {reason or 'is one of too many'}", "expressions of paths")
        if not isinstance(entry, dict):
            raise ModelError(where, f"dynamic: {shown(text)} is {shown(entry)}", "an object")
        _check_quantization({key: entry[key] for key in ("bits", "group_size") if key in entry}, where)


def kv_head_count(config: Mapping[str, Any]) -> int:
    """Return the number of key-value heads; left out means one per attention head."""
    value = config.get("num_key_value_heads")
    return int(config["num_attention_heads"] if value is None else value)


def head_size(config: Mapping[str, Any]) -> int:
    """Return the size of one attention head, with each architecture's own default when ``head_dim`` is left out."""
    value = config.get("head_dim")
    if value is not None:
        return int(value)
    if architecture(config) == SUPPORTED[2] and "head_dim" not in config:
        return 128  # Qwen3Config's class default; the other two divide
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the seven linears of one decoder layer, name within the layer -> (outputs, inputs)."""
    hidden, ffn, size = int(config["hidden_size"]), int(config["intermediate_size"]), head_size(config)
    query, value = int(config["num_attention_heads"]) * size, kv_head_count(config) * size
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (value, hidden),
        "self_attn.v_proj": (value, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }


def layer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of one decoder layer, name within the layer -> shape."""
    name, linears = architecture(config), linear_shapes(config)
    hidden, size = int(config["hidden_size"]), head_size(config)
    shapes: dict[str, tuple[int, ...]] = {f"{key}.weight": shape for key, shape in linears.items()}
    for key, (rows, _) in linears.items():
        if _has_bias(config, name, key):
            shapes[f"{key}.bias"] = (rows,)
    if name == SUPPORTED[2]:
        shapes |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
    return shapes | {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}


def _has_bias(config: Mapping[str, Any], name: str, linear: str) -> bool:
    if name == SUPPORTED[1]:  # Qwen2: fixed in the class, the config has no say
        return linear in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    if linear.startswith("self_attn."):
        return bool(config.get("attention_bias", False))
    return name == SUPPORTED[0] and bool(config.get("mlp_bias", False))


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the checkpoint, name -> shape; a tied head is not stored and not listed."""
    shapes = _outer_shapes(config)
    inner = layer_shapes(config)
    for index in range(int(config["num_hidden_layers"])):
        shapes |= {f"model.layers.{index}.{key}": shape for key, shape in inner.items()}
    return shapes


def _outer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    vocab, hidden = int(config["vocab_size"]), int(config["hidden_size"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def parameter_count(config: Mapping[str, Any]) -> int:
    """Return the number of parameters, tied ones counted once; equals the built model's."""
    inner = sum(math.prod(shape) for shape in layer_shapes(config).values())
    return sum(math.prod(shape) for shape in _outer_shapes(config).values()) + int(config["num_hidden_layers"]) * inner


def weight_bytes(config: Mapping[str, Any], *, bits: float = 32) -> int:
    """Return the bytes of all parameters at ``bits`` each, rounded up."""
    return math.ceil(parameter_count(config) * bits / 8)


def shape_of(config: Mapping[str, Any]) -> StudentShape:
    """Return the shape that ``config`` has."""
    return StudentShape(
        layers=int(config["num_hidden_layers"]),
        heads=int(config["num_attention_heads"]),
        kv_heads=kv_head_count(config),
        ffn=int(config["intermediate_size"]),
        hidden=int(config["hidden_size"]),
    )


def with_shape(config: Mapping[str, Any], shape: StudentShape) -> dict[str, Any]:
    """Return a copy of ``config`` with the sizes of ``shape`` and an explicit ``head_dim``.

    ``layer_types`` keeps its first entries; whoever drops other layers sets it himself.
    """
    new = dict(config)
    new["head_dim"] = head_size(config)  # before the widths change: it is derived from them when absent
    new["num_hidden_layers"], new["intermediate_size"] = shape.layers, shape.ffn
    new["num_attention_heads"], new["num_key_value_heads"] = shape.heads, shape.kv_heads
    new["hidden_size"] = config["hidden_size"] if shape.hidden is None else shape.hidden
    if config.get("layer_types") is not None:
        new["layer_types"] = list(config["layer_types"])[: shape.layers]
    return new


def head_options(config: Mapping[str, Any], *, hidden: int | None = None) -> list[tuple[int, int]]:
    """Return the (heads, kv_heads) pairs that can be cut out of ``config``, largest first.

    A pair keeps some key-value groups and the same number of query heads in each. transformers refuses a Llama
    whose hidden size is no multiple of its heads, even with an explicit head_dim (dependencies: transformers 5).
    """
    width = int(config["hidden_size"]) if hidden is None else hidden
    kv = kv_head_count(config)
    per_group = int(config["num_attention_heads"]) // kv
    must_divide = architecture(config) == SUPPORTED[0]
    pairs = [(k * g, k) for k in range(1, kv + 1) for g in range(1, per_group + 1)]
    return sorted((pair for pair in pairs if not must_divide or width % pair[0] == 0), reverse=True)


def check_shape(config: Mapping[str, Any], shape: StudentShape, *, where: str) -> None:
    """Raise ModelError unless ``shape`` can be cut out of ``config`` and opened again."""
    own = shape_of(config)
    for key in ("layers", "ffn", "hidden"):
        value, most = getattr(shape, key), getattr(own, key)
        if value is not None and not 1 <= value <= most:
            raise ModelError(where, f"{key} {value}", f"1 to {most}, the model's own")
    options = head_options(config, hidden=shape.hidden)
    if (shape.heads, shape.kv_heads) not in options:
        listed = ", ".join(f"{heads}/{kv}" for heads, kv in options) or "none with this hidden size"
        raise ModelError(where, f"heads/kv_heads {shape.heads}/{shape.kv_heads}", f"one of {listed}")


def nearest_shape(
    config: Mapping[str, Any],
    *,
    layers: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    ffn: int | None = None,
    hidden: int | None = None,
    multiple_of: int = 32,
    where: str = "shape",
) -> tuple[StudentShape, list[str]]:
    """Return the largest allowed shape within the wanted sizes (``None`` keeps the model's), and what was rounded.

    ``ffn`` and ``hidden`` are rounded down to a multiple of ``multiple_of``, so that weight groups fit; sizes left
    out or equal to the model's own stay as they are. Raises ModelError when nothing fits.
    """
    own = shape_of(config)
    width = _rounded("hidden", hidden, _own_hidden(own), multiple_of, where)
    options = head_options(config, hidden=width)
    if kv_heads is not None:
        options = [pair for pair in options if pair[1] <= kv_heads]
    if heads is not None:
        options = [pair for pair in options if pair[0] <= heads]
    if not options:
        raise ModelError(where, f"heads {heads}, kv_heads {kv_heads} with hidden {width}", "a larger head count")
    pair = min(options, key=lambda option: _pair_rank(option, own, kv_heads))
    shape = StudentShape(
        layers=own.layers if layers is None else layers,
        heads=pair[0],
        kv_heads=pair[1],
        ffn=_rounded("ffn", ffn, own.ffn, multiple_of, where),
        hidden=width,
    )
    check_shape(config, shape, where=where)
    wanted = {"heads": heads, "kv_heads": kv_heads, "ffn": ffn, "hidden": hidden}
    notes = [
        f"{key} {value} rounded to {getattr(shape, key)}"
        for key, value in wanted.items()
        if value is not None and value != getattr(shape, key)
    ]
    return shape, notes


def _own_hidden(own: StudentShape) -> int:
    assert own.hidden is not None, "shape_of always sets hidden"
    return own.hidden


def _pair_rank(pair: tuple[int, int], own: StudentShape, kv_heads: int | None) -> tuple[int, bool, int]:
    """Most query heads first; among equals the asked kv_heads or else the teacher's group width, then most KV heads."""
    fits = pair[1] == kv_heads if kv_heads is not None else pair[0] * own.kv_heads == pair[1] * own.heads
    return (-pair[0], not fits, -pair[1])


def _rounded(key: str, value: int | None, own: int, multiple_of: int, where: str) -> int:
    if value is None or value == own:
        return own
    if value > own:
        raise ModelError(where, f"{key} {value}", f"at most {own}, the model's own")
    rounded = value // multiple_of * multiple_of
    if rounded < 1:
        raise ModelError(where, f"{key} {value}", f"at least {multiple_of} (multiple_of)")
    return rounded


def shape_for_ratio(
    config: Mapping[str, Any],
    prune_ratio: float,
    *,
    axes: Sequence[str] = ("heads", "ffn"),
    multiple_of: int = 32,
    where: str = "prune_ratio",
) -> StudentShape:
    """Return the allowed shape whose parameter count is nearest to ``1 - prune_ratio`` of the model's.

    Only ``axes`` (of `AXES`) shrink. Among shapes of about the same count, the one that shrinks its axes most
    evenly wins. ``prune_ratio`` 0 gives the model's own shape. Raises ModelError when the axes cannot give so much.
    """
    own = shape_of(config)
    if prune_ratio == 0:
        return own
    total = parameter_count(config)
    wanted = total * (1 - prune_ratio)
    best: tuple[float, StudentShape] | None = None
    fewest = total
    for shape in _candidates(config, wanted, axes, multiple_of):
        count = parameter_count(with_shape(config, shape))
        fewest = min(fewest, count)
        miss = abs(count - wanted) / total
        kept = [getattr(shape, axis) / getattr(own, axis) for axis in axes]
        score = 10 * miss + max(kept) - min(kept)  # 1 % of the parameters weighs as much as 10 % of unevenness
        if best is None or score < best[0]:
            best = (score, shape)
    if best is None or (fewest - wanted) / total > _OVER_REACH:
        most = 1 - fewest / total
        raise ModelError(
            where,
            f"{prune_ratio:g} of the parameters by {', '.join(axes)}",
            f"at most about {most:.2f} here",
            f"Add an axis ({', '.join(axis for axis in AXES if axis not in axes) or 'none left'}) or remove less",
        )
    return best[1]


def _candidates(
    config: Mapping[str, Any], wanted: float, axes: Sequence[str], multiple_of: int
) -> Iterator[StudentShape]:
    """Yield shapes on the allowed grid; the FFN width is solved for instead of enumerated."""
    own, size = shape_of(config), head_size(config)
    hiddens = _steps(_own_hidden(own), multiple_of) if "hidden" in axes else [_own_hidden(own)]
    layer_counts = range(1, own.layers + 1) if "layers" in axes else [own.layers]
    tried = len(hiddens) * len(layer_counts) * (len(head_options(config)) if "heads" in axes else 1)
    if tried > _MOST_SHAPES:
        got = f"{tried} shapes of {own.text()} would have to be tried"
        raise ModelError("prune_ratio", got, f"at most {_MOST_SHAPES}", "Name fewer axes, or the sizes themselves")
    for hidden in hiddens:
        for heads, kv in head_options(config, hidden=hidden):
            if "heads" not in axes and (heads, kv) != (own.heads, own.kv_heads):
                continue
            grouped = heads * own.kv_heads == kv * own.heads or own.kv_heads == 1  # whole KV groups go together
            fits = heads == own.heads or heads * size % multiple_of == 0  # o_proj's inputs fall into weight groups
            if not (grouped and fits):
                continue
            for layers in layer_counts:
                base = StudentShape(layers=layers, heads=heads, kv_heads=kv, ffn=own.ffn, hidden=hidden)
                if "ffn" not in axes:
                    yield base
                    continue
                for ffn in _solved_ffn(config, base, wanted, multiple_of):
                    yield dataclasses.replace(base, ffn=ffn)


def _steps(own: int, multiple_of: int) -> list[int]:
    return sorted({own, *range(multiple_of, own, multiple_of)})


def _solved_ffn(config: Mapping[str, Any], shape: StudentShape, wanted: float, multiple_of: int) -> set[int]:
    """Return the FFN widths on the grid on both sides of the one that would meet ``wanted`` exactly."""
    one = parameter_count(with_shape(config, dataclasses.replace(shape, ffn=1)))
    two = parameter_count(with_shape(config, dataclasses.replace(shape, ffn=2)))
    exact = 1 + (wanted - one) / (two - one)
    below = math.floor(exact / multiple_of) * multiple_of
    top = int(config["intermediate_size"])
    least = min(multiple_of, top)
    return {min(max(width, least), top) for width in (below, below + multiple_of)}
