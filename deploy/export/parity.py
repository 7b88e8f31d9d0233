"""Does the exported graph compute what the checkpoint computes in torch? Measured on real prompts, in the runtime.

Two questions, two figures. *Is the graph right?* Its copy with fp32 arithmetic must give torch's logits to rounding
(`exact`). *What does the shipped arithmetic cost?* With activations rounded to 8 bits the logits move; reported as
the largest difference and the share of equal most likely tokens (`shipped`). Every prompt is read at once by a copy
of the graph that gives all positions, and the ends of a few (`CACHED_ROWS`) once more by the very graph that ships,
token by token through its KV cache. Torch's logits lie in scratch files, since those of all prompts may take more
memory than the model. A miss raises ParityError.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import ParityError
from compress.model.checkpoint import TorchRuntime, load_model
from compress.progress import Progress
from deploy.export.onnx import MODEL_FILE
from deploy.runners import GenaiRunner
from deploy.variants import accuracy_copy
from evaluators.agreement import compare

CACHED_ROWS = 4  # prompts whose last tokens go through the KV cache one at a time
CACHED_STEPS = 4  # tokens of each
Logits = np.ndarray[Any, np.dtype[np.float32]]  # (T, vocabulary)


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
    progress: Progress | None = None,
) -> Parity:
    """Compare the ONNX model in ``folder`` with ``checkpoint`` on ``prompts`` (token ids); ``work`` is scratch space.

    Raises:
        ParityError: a logit of the fp32 graph is off by more than ``tolerance`` of the largest, or the
            shipped graph diverges by more than ``max_kl`` nats per token.
    """
    shown = progress or Progress(quiet=True)
    with tempfile.TemporaryDirectory(prefix="exact-", dir=work) as temporary:
        copy, stored = Path(temporary) / "copy", Path(temporary) / "torch"
        copy.mkdir()
        stored.mkdir()
        count = len(prompts)
        for index, logits in enumerate(shown.track(torch_logits(checkpoint, prompts), "prompts read in torch", count)):
            np.save(stored / f"{index}.npy", logits, allow_pickle=False)

        def measured(where: Path, what: str) -> Difference:
            expected = (np.load(stored / f"{index}.npy", allow_pickle=False) for index in range(count))
            told = f"prompts compared, {what}"
            return difference(where, prompts, shown.track(expected, told, count), threads=threads)

        if accuracy_copy(folder, copy, 1):
            exact = measured(copy, "in fp32")
            _refuse_wrong(exact, folder, tolerance)
            shipped = measured(folder, "as shipped")
        else:
            exact = shipped = measured(folder, "as shipped")
            _refuse_wrong(exact, folder, tolerance)
    if not shipped.kl <= max_kl:
        raise ParityError(
            str(folder / MODEL_FILE),
            f"with activations in 8 bits it diverges from torch by {shipped.kl:.3g} nats per token",
            f"at most {max_kl:g} (max_kl)",
            "Set accuracy_level: 1, which does not round activations, or raise max_kl",
        )
    return Parity(exact, shipped)


def _refuse_wrong(exact: Difference, folder: Path, tolerance: float) -> None:
    if not exact.relative <= tolerance:
        raise ParityError(
            str(folder / MODEL_FILE),
            f"its logits differ from torch's by {exact.max_abs:.3g}, {exact.relative:.2g} of the largest",
            f"at most {tolerance:g} (parity_tolerance)",
            "This is a fault of the export: nothing was written. Please report it with the model's config.json",
        )


def torch_logits(checkpoint: Path, prompts: Sequence[Sequence[int]]) -> Iterator[Logits]:
    """Yield the logits (T, vocabulary) of each prompt by the checkpoint in torch, in fp32."""
    runtime = TorchRuntime(load_model(checkpoint))
    for ids in prompts:
        yield runtime.logits(ids)


def difference(
    folder: Path, prompts: Sequence[Sequence[int]], expected: Iterable[Logits], *, threads: int
) -> Difference:
    """Return how far the logits of the ONNX model in ``folder`` lie from the ``expected`` ones, one per prompt."""
    runner = GenaiRunner(folder, threads=threads, verify=False)
    cached = _cached(prompts)
    largest = max_abs = 0.0
    agreeing: list[np.ndarray[Any, Any]] = []
    divergences: list[np.ndarray[Any, Any]] = []
    for index, (ids, wanted) in enumerate(zip(prompts, expected, strict=True)):
        found = runner.logits(ids)
        pairs = [(found, wanted)]
        if index in cached:
            pairs.append((runner.cached_logits(ids, cached[index]), wanted[cached[index] - 1 :]))
        for one, other in pairs:
            if not np.isfinite(one).all():
                raise ParityError(str(folder / MODEL_FILE), "NaN or infinite logits", "finite ones, as torch gives")
            max_abs = max(max_abs, float(np.abs(one - other).max()))
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


def _cached(prompts: Sequence[Sequence[int]]) -> dict[int, int]:
    """Return which prompts go through the cache too, and how many of their tokens are read at once before.

    The longest and the shortest ones, so that the cache is proven near its beginning and far from it.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    picked = dict.fromkeys([*order[: CACHED_ROWS // 2], *order[-(CACHED_ROWS // 2) :]])
    return {index: max(1, len(prompts[index]) - CACHED_STEPS) for index in picked}
