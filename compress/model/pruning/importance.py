"""How much each part of a decoder matters, from activations alone (Minitron, arXiv:2407.14679, section 2.2).

`measure` runs the calibration batches once and scores FFN channels, attention heads, hidden channels and whole
blocks by forward hooks; only running sums are kept, never activations. `kv_group_scores` adds heads up per
key-value group, `strongest` picks. Padding counts nowhere. Changes nothing in the model; knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.errors import ModelError
from compress.model.calibration import Batch
from compress.model.layers import attention, decoder_layers, linears, residual_norms

Tensor = torch.Tensor


@dataclass(frozen=True)
class Importance:
    """Scores of one model on one calibration set; all float64, larger matters more.

    Attributes:
        ffn: per layer (F,): mean over the sequence of ``|activation into down_proj|``, L2 over rows.
        heads: per layer (H,): mean over the sequence of the L2 norm of a head's output, L2 over rows.
        hidden: (D,): as ``ffn``, on the outputs of the norms of the residual stream, summed over the norms.
        blocks: per layer: 1 - mean cosine between a block's input and output, residual stream included.
        moments: norm name -> (D,): mean square of each channel entering it, to rescale gains when channels go.
        tokens: number of real tokens read.
    """

    ffn: list[Tensor]
    heads: list[Tensor]
    hidden: Tensor
    blocks: list[float]
    moments: dict[str, Tensor]
    tokens: int


class _Sums:
    """Running sums over batches; the current batch's mask is set before each forward pass."""

    def __init__(self) -> None:
        self.mask = torch.empty(0)  # (B, T), 1 where a token is real
        self.squares: dict[str, Tensor] = {}  # sum over rows of (mean over the sequence) ** 2
        self.totals: dict[str, Tensor] = {}  # plain sums over tokens
        self.tokens = 0

    def add_rows(self, key: str, values: Tensor) -> None:
        """Add per-token magnitudes ``values`` (B, T, C): mean over the sequence, squared, summed over rows."""
        mask = self.mask.to(values.device)
        counts = mask.sum(dim=1).clamp(min=1)  # (B,)
        means = (values * mask.unsqueeze(-1)).sum(dim=1) / counts.unsqueeze(-1)  # (B, C)
        self._add(self.squares, key, means.double().square().sum(dim=0))

    def add_tokens(self, key: str, values: Tensor) -> None:
        """Add per-token ``values`` (B, T, C) over all real tokens."""
        mask = self.mask.to(values.device).unsqueeze(-1)
        self._add(self.totals, key, (values * mask).double().sum(dim=(0, 1)))

    @staticmethod
    def _add(sums: dict[str, Tensor], key: str, value: Tensor) -> None:
        sums[key] = sums[key] + value.cpu() if key in sums else value.cpu()

    def scores(self, key: str) -> Tensor:
        """Return the L2 norm over rows that ``add_rows`` summed up under ``key``."""
        return self.squares[key].sqrt()


@torch.no_grad()
def measure(model: PreTrainedModel, batches: Sequence[Batch]) -> Importance:
    """Score every part of ``model`` on ``batches`` in one pass; ModelError when an activation is NaN or infinite."""
    assert batches, "importance needs at least one calibration batch"
    sums = _Sums()
    was_training = model.training
    model.eval()
    with _hooked(model, sums):
        for batch in batches:
            sums.mask = batch.attention_mask
            sums.tokens += int(batch.attention_mask.sum())
            model(
                input_ids=batch.input_ids.to(model.device),
                attention_mask=batch.attention_mask.to(model.device),
                use_cache=False,
                logits_to_keep=1,  # the vocabulary's logits are not needed
            )
    model.train(was_training)
    return _result(model, sums)


def _result(model: PreTrainedModel, sums: _Sums) -> Importance:
    layers = range(len(decoder_layers(model)))
    norms = list(residual_norms(model))
    hidden = torch.stack([sums.scores(name) for name in norms]).sum(dim=0)
    if not bool(torch.isfinite(hidden).all()):
        raise ModelError("calibration", "the model's activations are NaN or infinite", "finite activations")
    return Importance(
        ffn=[sums.scores(f"ffn.{i}") for i in layers],
        heads=[sums.scores(f"heads.{i}") for i in layers],
        hidden=hidden,
        blocks=[1.0 - float(sums.totals[f"cosine.{i}"]) / sums.tokens for i in layers],
        moments={name: sums.totals[f"square.{name}"] / sums.tokens for name in norms},
        tokens=sums.tokens,
    )


@contextmanager
def _hooked(model: PreTrainedModel, sums: _Sums) -> Iterator[None]:
    with ExitStack() as stack:
        for index, layer in enumerate(decoder_layers(model)):
            parts = linears(layer)
            size = int(attention(layer).head_dim)  # type: ignore[arg-type]
            handles = [
                parts["down_proj"].register_forward_pre_hook(_ffn_hook(sums, f"ffn.{index}")),
                parts["o_proj"].register_forward_pre_hook(_head_hook(sums, f"heads.{index}", size)),
                layer.register_forward_hook(_block_hook(sums, f"cosine.{index}"), with_kwargs=True),
            ]
            for handle in handles:
                stack.callback(handle.remove)
        for name, norm in residual_norms(model).items():
            stack.callback(norm.register_forward_hook(_norm_hook(sums, name)).remove)
        yield


def _ffn_hook(sums: _Sums, key: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        sums.add_rows(key, inputs[0].float().abs())

    return hook


def _head_hook(sums: _Sums, key: str, size: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        heads = inputs[0].float().unflatten(-1, (-1, size))  # (B, T, H, head size)
        sums.add_rows(key, heads.norm(dim=-1))

    return hook


def _block_hook(sums: _Sums, key: str) -> Callable[..., None]:
    # The whole block, residual stream included: on the residual branch alone the score means something else.
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1)  # (B, T)
        sums.add_tokens(key, cosine.unsqueeze(-1))

    return hook


def _norm_hook(sums: _Sums, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        sums.add_rows(name, output.float().abs())
        sums.add_tokens(f"square.{name}", inputs[0].float().square())

    return hook


def kv_group_scores(heads: Tensor, kv_heads: int) -> Tensor:
    """Return the score of each key-value group (KV,): the L2 norm of the scores of its query heads (H,)."""
    return heads.reshape(kv_heads, -1).square().sum(dim=1).sqrt()


def strongest(scores: Tensor, count: int) -> list[int]:
    """Return the indices of the ``count`` largest scores, ascending; of equal scores the earlier index stays."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:count].tolist())
