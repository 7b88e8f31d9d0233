"""How much each part of a model suffers from each way to quantize it: divergence with that part alone quantized.

A part is what must share its bits: q, k and v of a layer (the runtime multiplies them as one), gate and up, o, down.
`measure` quantizes each part in each way by the solver that will do it in the end, takes calibration rows through the
rest of the plain model, and gives nats per token. One layer is in memory at a time. Knows nothing of budgets.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from compress.model.calibration import Batch
from compress.model.layers import linear_path, linears
from compress.model.quantization.blocks import EMBEDDING, HEAD, BlockStream
from compress.model.quantization.hessians import position_weights, second_moment
from compress.model.quantization.layout import LinearSpec
from compress.model.quantization.measuring import mean_divergence
from compress.model.quantization.packing import dequantize
from compress.model.quantization.streaming import Job, Solver, Step
from compress.model.quantization.writing import save_json

PARTS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
Hidden = list[torch.Tensor]


def part_name(index: int, part: str) -> str:
    """Return the name of a part, such as ``3.qkv``."""
    return f"{index}.{part}"


def part_paths(name: str) -> list[str]:
    """Return the linears of a part by path."""
    index, part = name.split(".")
    return [linear_path(int(index), linear) for linear in PARTS[part]]


def measure(
    job: Job,
    solver: Solver,
    drawn: Sequence[Batch],
    check: Sequence[Batch],
    options: Mapping[str, Mapping[str, LinearSpec]],
    *,
    prompt_weight: float,
) -> dict[str, dict[str, float]]:
    """Return the divergence of each part under each option, nats per target token of ``check``.

    ``options`` has those of each kind of part (a key of `PARTS`), by name. Second moments are those of ``drawn`` in
    the plain model. Finished layers lie in ``ctx.work`` and are taken over.
    """
    stream, found = job.stream, dict[str, dict[str, float]]()
    embedding = stream.tensor(EMBEDDING)
    hidden = [nn.functional.embedding(batch.input_ids, embedding) for batch in drawn]
    seen = [nn.functional.embedding(batch.input_ids, embedding) for batch in check]
    weights = [position_weights(batch, prompt_weight=prompt_weight) for batch in drawn]
    final = _through(stream, seen, 0)
    with job.ctx.progress.bar("layers measured", stream.count) as bar:
        for index in range(stream.count):
            path = job.ctx.work / f"sensitivity-{index:04d}.json"
            layer = stream.layer(index)
            if not path.is_file():
                steps = [(names, second_moment(given, weights)) for names, given in stream.walk(layer, list(hidden))]
                head = embedding if job.layout.tied else stream.tensor(HEAD)
                costs: dict[str, float] = {}
                for part, kinds in options.items():  # the variants of one part are in memory, not of all
                    variants = dict(_variants(stream, solver, (index, layer), steps, seen, part=(part, kinds)))
                    for key, after in _all_through(stream, variants, index + 1).items():
                        costs[key] = mean_divergence(stream.final_norm(), check, final, after, head)
                save_json(costs, path)
            for key, cost in json.loads(path.read_text(encoding="utf-8")).items():
                part, _, option = key.partition("/")
                found.setdefault(part, {})[option] = cost
            for states in (hidden, seen):
                states[:] = [stream.run(layer, values) for values in states]
            bar.advance()
    return found


def _variants(
    stream: BlockStream,
    solver: Solver,
    at: tuple[int, nn.Module],
    steps: Sequence[tuple[Sequence[str], torch.Tensor]],
    seen: Hidden,
    *,
    part: tuple[str, Mapping[str, LinearSpec]],
) -> Iterator[tuple[str, Hidden]]:
    """Yield (part/option, the check rows behind the layer with that part quantized so).

    ``at`` is the layer with its number, ``steps`` the second moment of what each group of its linears is given,
    ``part`` the kind of part with its options.
    """
    (index, layer), (kind, options) = at, part
    names = PARTS[kind]
    moment = next(moment for together, moment in steps if names[0] in together)
    plain = {name: linears(layer)[name].weight.data for name in names}
    for option, spec in options.items():
        given = {linear_path(index, name): weight for name, weight in plain.items()}
        solved = solver(Step(given, dict.fromkeys(given, spec), moment))
        for name in names:
            linears(layer)[name].weight.data = dequantize(*solved[linear_path(index, name)].layer)
        yield f"{part_name(index, kind)}/{option}", [stream.run(layer, values) for values in seen]
    for name, weight in plain.items():
        linears(layer)[name].weight.data = weight


def _all_through(stream: BlockStream, variants: Mapping[str, Hidden], start: int) -> dict[str, Hidden]:
    """Take every variant through the layers from ``start`` on; each layer is read once."""
    ended = {key: list(values) for key, values in variants.items()}
    for index in range(start, stream.count):
        layer = stream.layer(index)
        for states in ended.values():
            states[:] = [stream.run(layer, values) for values in states]
    return ended


def _through(stream: BlockStream, states: Hidden, start: int) -> Hidden:
    return _all_through(stream, {"": states}, start)[""]
