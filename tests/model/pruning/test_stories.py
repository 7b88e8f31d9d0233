"""Pruning a real trained model: importances beat chance, and the loss after trimming is sane. Skipped without it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.encoding import encode_rows, load_tokenizer
from compress.model.calibration import Batch, batches, mean_loss
from compress.model.checkpoint import check_folder, load_model
from compress.model.pruning.importance import Importance, measure
from compress.model.pruning.structured import slice_model
from compress.model.shapes import nearest_shape

REAL = Path(__file__).parents[3] / "../shared"
MODEL, DATA = REAL / "models/stories260k", REAL / "data/tinystories"
pytestmark = pytest.mark.skipif(
    not MODEL.is_dir() or not DATA.is_dir(), reason="the trained story model and its data are not beside the checkout"
)


def stories(name: str, count: int) -> list[Batch]:
    from compress.data.rows import make_row

    texts = (DATA / name).read_text(encoding="utf-8").split("<|endoftext|>")[:count]
    rows = [make_row(text=text.strip()) for text in texts]
    encoded = encode_rows(rows, load_tokenizer(MODEL), max_tokens=128, truncate=True)
    return batches(encoded, tokens=10**6, batch_size=16, seed=0, pad_id=0)


def chance(like: Importance, seed: int) -> Importance:
    generator = torch.Generator().manual_seed(seed)

    def draw(scores: torch.Tensor) -> torch.Tensor:
        return torch.rand(scores.shape, generator=generator, dtype=torch.float64)

    blocks = torch.rand(len(like.blocks), generator=generator).tolist()
    return Importance(
        [draw(s) for s in like.ffn], [draw(s) for s in like.heads], draw(like.hidden), blocks, like.moments, 0
    )


@pytest.fixture(scope="module")
def trained() -> Any:
    check_folder(MODEL)
    model = load_model(MODEL)
    return model, measure(model, stories("train-extra.txt", 48)), stories("valid-stories.txt", 24)


def test_the_whole_model_has_its_known_loss(trained: Any) -> None:
    model, _, held_out = trained
    assert mean_loss(model, held_out) == pytest.approx(1.168, abs=0.005)  # whole stories: 1.32


@pytest.mark.parametrize(
    "wanted", [{"ffn": 128}, {"heads": 4}, {"hidden": 56}, {"ffn": 128, "heads": 4}, {"layers": 4}]
)
def test_importance_beats_chance_and_the_loss_stays_sane(trained: Any, wanted: dict[str, int]) -> None:
    model, importance, held_out = trained
    shape, notes = nearest_shape(model.config.to_dict(), **wanted, multiple_of=8)
    assert notes == []
    losses = []
    for scores in [importance, *(chance(importance, seed) for seed in range(3))]:
        student = copy.deepcopy(model)
        slice_model(student, scores, shape)
        losses.append(mean_loss(student, held_out))
    whole = mean_loss(model, held_out)
    assert whole < losses[0] < 4.0  # knowing nothing costs 6.2 nats
    assert losses[0] < sum(losses[1:]) / 3
