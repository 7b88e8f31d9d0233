"""A model with rounded weights that can be trained, from finished codes, and its codes again.

`Start` is where one linear starts from: its latent weight and its grid. `train_blocks` improves starts layer by layer,
each towards its own outputs (EfficientQAT, Chen et al. 2024, section 3.2), `build` puts starts into a whole model,
`parts_of` takes the codes out of it. Knows nothing of losses on tokens or of the training of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from compress.model.calibration import Batch
from compress.model.checkpoint import load_model
from compress.model.layers import (
    ATTENTION,
    attention,
    decoder_layers,
    embedding,
    linear_path,
    linears,
    mlp,
    output_head,
)
from compress.model.quantization.blocks import EMBEDDING, HEAD, BlockStream
from compress.model.quantization.halves import halved
from compress.model.quantization.hessians import position_weights
from compress.model.quantization.layout import PLAIN
from compress.model.quantization.packing import QuantizedLinear
from compress.model.quantization.params import QatParams
from compress.model.quantization.quantizers import FakeQuantLinear, cell_weights
from compress.model.quantization.streaming import Job, outer_values
from compress.model.quantization.writing import PARTS, Parts, save_tensors


class Start(NamedTuple):
    """Where a linear starts from."""

    latent: torch.Tensor  # (out, in) fp32, rounds to the codes of the grid
    grid: QuantizedLinear


def starts_of(layer: nn.Module, codes: Mapping[str, QuantizedLinear], index: int, job: Job) -> dict[str, Start]:
    """Return the starts of a plain ``layer`` whose linears are to round to ``codes``."""
    found = {}
    for name, grid in codes.items():
        weight, spec = linears(layer)[name].weight.data, job.layout.linears[linear_path(index, name)]
        rule = _params(job).rule_of(spec.bits, sym=spec.sym)
        latent = weight if rule in ("elastic", "ternary") else cell_weights(weight, grid, bits=spec.bits)
        found[name] = Start(latent, grid)
    return found


def _params(job: Job) -> QatParams:
    return cast(QatParams, job.params)


def put_starts(
    layer: nn.Module, starts: Mapping[str, Start], index: int, job: Job, *, train_zero: bool = False
) -> dict[str, FakeQuantLinear]:
    """Replace the linears of ``layer`` that have a start; linears left alone become the fp16 that is stored."""
    params, put = _params(job), {}
    for name, linear in linears(layer).items():
        spec = job.layout.linears[linear_path(index, name)]
        if spec.bits == PLAIN:
            linear.weight.data = halved(linear.weight.data, linear_path(index, name))
            continue
        latent, grid = starts[name]
        rule = params.rule_of(spec.bits, sym=spec.sym)
        moves = train_zero and rule == "affine" and not spec.sym
        put[name] = FakeQuantLinear(latent, grid, bits=spec.bits, rule=rule, bias=linear.bias, train_zero=moves)
        setattr(attention(layer) if name in ATTENTION else mlp(layer), name, put[name])
    return put


def build(job: Job, parts: Parts, blocks: Path | None) -> PreTrainedModel:
    """Return the model of the job, fp32 in eval mode, with rounded linears, embedding and head.

    ``parts`` holds codes, ``blocks`` what `train_blocks` left (None: nothing). Trainable are latent weights and
    steps, and norms and biases where ``train_norms`` says so; embedding and head keep the values of their codes.
    """
    stream, params = job.stream, _params(job)
    model = load_model(stream.folder)
    model.config.intermediate_size = stream.ffn
    outer, _ = parts.load_outer()
    table = outer_values(outer[EMBEDDING], stream.tensor(EMBEDDING))
    embedding(model).weight = nn.Parameter(table)
    output_head(model).weight = embedding(model).weight
    if not job.layout.tied:
        output_head(model).weight = nn.Parameter(outer_values(outer[HEAD], stream.tensor(HEAD)))
    model.requires_grad_(False)
    for index in range(stream.count):
        layer = stream.layer(index)
        saved = None if blocks is None else _block_path(blocks, index)
        starts = starts_of(layer, parts.codes(index), index, job) if saved is None else _load_starts(saved)
        put_starts(layer, starts, index, job)
        for name, parameter in layer.named_parameters():
            own = name.endswith((".latent", ".log_step"))
            other = params.train_norms and ("norm" in name or name.endswith(".bias"))
            parameter.requires_grad_(own or other)
        cast(Any, model).model.layers[index] = layer
    cast(Any, model).model.norm.requires_grad_(params.train_norms)
    return model.eval()


def parts_of(job: Job, model: PreTrainedModel, start: Parts, name: str) -> Parts:
    """Write the codes of a trained model as the pass ``name``; embedding and head are those of the pass ``start``."""
    parts = job.parts(name)
    for index, trained in enumerate(decoder_layers(model)):
        plain = job.stream.layer(index)
        done = {n: m.coded() for n, m in linears(trained).items() if isinstance(m, FakeQuantLinear)}
        others = {n: p.data.cpu() for n, p in trained.named_parameters() if "norm" in n or n.endswith(".bias")}
        plain.load_state_dict(others, strict=False)
        parts.save(index, plain, done, start.reports(index))
    parts.save_outer(*start.load_outer())
    return parts


def train_blocks(job: Job, parts: Parts, drawn: Sequence[Batch], folder: Path) -> list[tuple[float, float]]:
    """Train the layers one after the other on the calibration rows ``drawn``; the starts go into ``folder``.

    A layer sees what the trained layers before it put out, and is to put out what the plain layer does behind plain
    ones. Returns the mean squared error of each before and after. Layers that ``folder`` holds are not done again.
    """
    stream = job.stream
    outer, _ = parts.load_outer()
    plain = stream.tensor(EMBEDDING)
    table = outer_values(outer[EMBEDDING], plain)
    hidden = [nn.functional.embedding(batch.input_ids, table) for batch in drawn]
    wanted = [nn.functional.embedding(batch.input_ids, plain) for batch in drawn]
    weights = [position_weights(batch, prompt_weight=_params(job).prompt_weight) for batch in drawn]
    errors: list[tuple[float, float]] = []
    folder.mkdir(parents=True, exist_ok=True)
    for index in job.ctx.progress.track(range(stream.count), "layers trained alone", stream.count):
        layer, path = stream.layer(index), _block_path(folder, index)
        wanted = [stream.run(layer, values) for values in wanted]
        known = path.is_file()
        starts = _load_starts(path) if known else starts_of(layer, parts.codes(index), index, job)
        put = put_starts(layer, starts, index, job, train_zero=_params(job).train_zero and not known)
        if known:
            with safe_open(str(path), framework="pt") as file:
                before, after = (float(value) for value in file.metadata()["edgestill"].split())
                errors.append((before, after))
        else:
            errors.append(_train_block(stream, layer, put, (hidden, wanted, weights), _params(job)))
            _save_starts(path, put, errors[-1])
            put_starts(layer, _load_starts(path), index, job)  # what a resumed run goes on with
        hidden = [stream.run(layer, values) for values in hidden]
    return errors


def _train_block(
    stream: BlockStream,
    layer: nn.Module,
    put: Mapping[str, FakeQuantLinear],
    data: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]],
    params: QatParams,
) -> tuple[float, float]:
    """Train one layer; returns the mean squared error before and after. Steps go through the batches in turn."""
    trained = [parameter for module in put.values() for parameter in (module.latent, module.log_step)]
    trained += [module.zero_shift for module in put.values() if module.zero_shift is not None]
    for parameter in trained:
        parameter.requires_grad_(True)
    batches = list(zip(*data, strict=True))

    def error(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        given, target, weight = batch
        squares = (stream.forward(layer, given) - target).square().mean(dim=-1)  # (B, T)
        return (squares * weight).sum() / weight.sum().clamp_min(1e-12)

    def mean() -> float:
        with torch.no_grad():
            return sum(float(error(batch)) for batch in batches) / len(batches)

    before, best = mean(), [parameter.detach().clone() for parameter in trained]
    if not put:  # every linear of the layer is left alone
        return before, before
    optimizer = torch.optim.AdamW(trained, lr=params.block_learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(params.block_steps):
        rate = 0.5 * (1 + math.cos(math.pi * step / params.block_steps))
        optimizer.param_groups[0]["lr"] = params.block_learning_rate * rate
        error(batches[step % len(batches)]).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, params.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    after = mean()
    if after < before:
        return before, after
    with torch.no_grad():  # worse, or not a number: what was there stays
        for parameter, value in zip(trained, best, strict=True):
            parameter.copy_(value)
    return before, before


def _block_path(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:04d}.safetensors"


def _save_starts(path: Path, put: Mapping[str, FakeQuantLinear], errors: tuple[float, float]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, module in put.items():
        tensors |= {f"{name}.{part}": value for part, value in zip(PARTS, module.coded(), strict=True)}
        tensors[f"{name}.latent"] = module.latent.data
    save_tensors(tensors, path, note=" ".join(repr(value) for value in errors))


def _load_starts(path: Path) -> dict[str, Start]:
    with safe_open(str(path), framework="pt") as file:
        names = sorted({key.rpartition(".")[0] for key in file.keys()})  # noqa: SIM118 - a file, not a mapping
        return {
            name: Start(
                file.get_tensor(f"{name}.latent"),
                QuantizedLinear(*(file.get_tensor(f"{name}.{part}") for part in PARTS)),
            )
            for name in names
        }
