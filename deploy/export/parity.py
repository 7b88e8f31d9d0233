"""Does the exported graph compute what the checkpoint computes in torch? Measured on real prompts, in the runtime.

Two questions, two figures. *Is the graph right?* Its copy with fp32 arithmetic must give torch's logits to rounding
(`exact`). *What does the shipped arithmetic cost?* With activations rounded to 8 bits the logits move; reported as
the largest difference and the share of equal most likely tokens (`shipped`). Half of every prompt is read at once,
the other half token by token, so that both of the runtime's paths are checked; where the graph that ships gives the
last position alone, that one is checked too. A miss raises ParityError.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import ParityError
from compress.model.checkpoint import TorchRuntime, load_model
from deploy.export.onnx import MODEL_FILE
from deploy.runners import GenaiRunner
from deploy.variants import accuracy_copy
from evaluators.agreement import compare


@dataclass(frozen=True)
class Difference:
    """Logits of a graph against torch's, over all positions of all prompts."""

    max_abs: float  # largest difference of a logit
    relative: float  # the same over the largest logit
    top1: float  # share of positions with the same most likely token
    kl: float  # mean divergence from torch's distribution, nats per token
    positions: int


@dataclass(frozen=True)
class Parity:
    """The graph with fp32 arithmetic, and as shipped."""

    exact: Difference
    shipped: Difference

    def facts(self) -> dict[str, Any]:
        """The figures, six digits each, for records."""
        rounded: dict[str, Any] = {}
        for part, values in asdict(self).items():
            figures = {name: float(f"{value:.6g}") for name, value in values.items()}
            rounded[part] = figures | {"positions": int(values["positions"])}
        return rounded


def check(
    folder: Path,
    checkpoint: Path,
    prompts: Sequence[Sequence[int]],
    *,
    tolerance: float,
    max_kl: float,
    threads: int,
    work: Path,
) -> Parity:
    """Compare the ONNX model in ``folder`` with ``checkpoint`` on ``prompts`` (token ids); ``work`` is scratch space.

    Raises:
        ParityError: a logit of the fp32 graph is off by more than ``tolerance`` of the largest, or the
            shipped graph diverges by more than ``max_kl`` nats per token.
    """
    expected = torch_logits(checkpoint, prompts)
    shipped = difference(folder, prompts, expected, threads=threads)
    with tempfile.TemporaryDirectory(prefix="exact-", dir=work) as temporary:
        changed = accuracy_copy(folder, Path(temporary), 1)
        exact = difference(Path(temporary), prompts, expected, threads=threads) if changed else shipped
    where = str(folder / MODEL_FILE)
    if not exact.relative <= tolerance:
        raise ParityError(
            where,
            f"its logits differ from torch's by {exact.max_abs:.3g}, {exact.relative:.2g} of the largest",
            f"at most {tolerance:g} (parity_tolerance)",
            "This is a fault of the export: nothing was written. Please report it with the model's config.json",
        )
    if not shipped.kl <= max_kl:
        raise ParityError(
            where,
            f"with activations in 8 bits it diverges from torch by {shipped.kl:.3g} nats per token",
            f"at most {max_kl:g} (max_kl)",
            "Set accuracy_level: 1, which does not round activations, or raise max_kl",
        )
    return Parity(exact, shipped)


def torch_logits(checkpoint: Path, prompts: Sequence[Sequence[int]]) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """Return the logits (T, vocabulary) of each prompt by the checkpoint in torch, in fp32."""
    runtime = TorchRuntime(load_model(checkpoint))
    return [runtime.logits(ids) for ids in prompts]


def difference(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[np.ndarray[Any, np.dtype[np.float32]]],
    *,
    threads: int,
) -> Difference:
    """Return how far the logits of the ONNX model in ``folder`` lie from the ``expected`` ones."""
    runner = GenaiRunner(folder, threads=threads, verify=False)
    largest = max_abs = 0.0
    agreeing: list[np.ndarray[Any, Any]] = []
    divergences: list[np.ndarray[Any, Any]] = []
    for ids, wanted in zip(prompts, expected, strict=True):
        found = runner.logits(ids, prefill=max(1, len(ids) // 2))
        if not np.isfinite(found).all():
            raise ParityError(str(folder / MODEL_FILE), "NaN or infinite logits", "finite ones, as torch gives")
        max_abs = max(max_abs, float(np.abs(found - wanted).max()))
        max_abs = max(max_abs, float(np.abs(runner.next_logits(ids) - wanted[-1]).max()))  # the very graph that ships
        largest = max(largest, float(np.abs(wanted).max()))
        agreement = compare(wanted, found)
        divergences.append(agreement.kl)
        agreeing.append(agreement.top1)
    top1 = np.concatenate(agreeing)
    return Difference(
        max_abs=max_abs,
        relative=max_abs / largest if largest else max_abs,
        top1=float(top1.mean()),
        kl=float(np.concatenate(divergences).mean()),
        positions=len(top1),
    )
