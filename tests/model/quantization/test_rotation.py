"""Rotation: Hadamard matrices, the same outputs in another basis, what happens to tied heads, outliers, resuming."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.model.checkpoint import check_folder, load_model, read_config
from compress.model.quantization import rotation
from compress.model.quantization.packing import dequantize
from compress.model.quantization.rotation import hadamard, orthogonal, rotate_checkpoint
from compress.model.quantization.rtn import round_to_nearest
from tests.reference.quantization import rotated_linears
from tests.tiny import ARCHITECTURES, tiny_checkpoint

SHARED = Path(__file__).parents[4] / "shared"
STORIES = SHARED / "models" / "stories260k"


def relative_change(before: Path, after: Path, *, vocab: int) -> float:
    ids = torch.randint(5, vocab, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, got = (load_model(folder)(ids).logits for folder in (before, after))
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 48, 60, 64, 96, 128, 576, 896, 960, 1536])
def test_hadamard_matrices_are_of_ones_and_orthogonal(size: int) -> None:
    matrix = hadamard(size)
    assert matrix is not None
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [3, 6, 10, 18, 22, 90, 92])
def test_where_there_is_no_hadamard_matrix_a_random_one_does_it(size: int) -> None:
    assert hadamard(size) is None  # 92 has one, but neither Sylvester nor Paley gives it
    for of in (size, 48):
        first, again, other = (orthogonal(of, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert torch.allclose(first @ first.T, torch.eye(of, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mode", ["heads", "full"])
@pytest.mark.parametrize("shape", [{}, {"hidden": 36, "heads": 6, "head_dim": 6}], ids=["hadamard", "random"])
def test_the_rotated_model_computes_the_same(
    arch: str, tied: bool, mode: Any, shape: dict[str, int], tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path / "model", arch, tied=tied, **shape)
    config = read_config(source)
    found = rotate_checkpoint(source, config, tmp_path / "out", mode=mode, seed=3)
    check_folder(found.folder)
    assert relative_change(source, found.folder, vocab=320) < 1e-5
    before, after = load_model(source), load_model(found.folder)
    assert after.config.tie_word_embeddings == (tied and mode == "heads")
    assert found.untied == (320 * config["hidden_size"] if tied and mode == "full" else 0)
    for name, tensor in after.named_parameters():
        plain = dict(before.named_parameters()).get(name)
        within = name.endswith(("v_proj.weight", "v_proj.bias", "o_proj.weight"))
        if "_norm" in name or (mode == "heads" and not within):
            assert torch.equal(tensor, plain), name
        elif "norm" in name:
            assert tensor.eq(1).all(), name
        elif plain is not None and "q_proj.bias" not in name and "k_proj.bias" not in name:
            assert not torch.allclose(tensor, plain, atol=1e-2), name


def test_the_linears_are_those_of_the_slow_reference(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", "qwen2", tied=False)
    found = rotate_checkpoint(source, read_config(source), tmp_path / "out", mode="full", seed=9)
    generator = torch.Generator().manual_seed(9)
    head, stream = orthogonal(8, generator), orthogonal(32, generator)
    before, after = (
        {name: tensor.detach().double().numpy() for name, tensor in load_model(folder).named_parameters()}
        for folder in (source, found.folder)
    )
    for index in range(2):
        prefix = f"model.layers.{index}."
        state = {name.removeprefix(prefix): array for name, array in before.items() if name.startswith(prefix)}
        for name, array in rotated_linears(state, head.numpy(), stream.numpy(), kv_heads=2, heads=4).items():
            assert np.allclose(after[prefix + name], array, atol=1e-6), name
    gain = before["model.norm.weight"]
    assert np.allclose(after["lm_head.weight"], before["lm_head.weight"] * gain @ stream.numpy(), atol=1e-6)


def test_a_constant_final_gain_leaves_the_head_tied(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 1.7)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found = rotate_checkpoint(source, read_config(source), tmp_path / "out", mode="full", seed=1)
    assert found.untied == 0
    assert load_model(found.folder).config.tie_word_embeddings
    assert relative_change(source, found.folder, vocab=320) < 1e-5


def planted(folder: Path, seed: int) -> Path:
    """A model with a few channels of the residual stream far larger than the rest."""
    source = tiny_checkpoint(folder, seed=seed, tied=False)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            tensor[:, [3, 17]] *= 12
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize("seed", range(3))
def test_outliers_are_spread_out_and_rounding_loses_less(seed: int, tmp_path: Path) -> None:
    source = planted(tmp_path / "model", seed)
    found = rotate_checkpoint(source, read_config(source), tmp_path / "out", mode="full", seed=seed)
    assert found.kurtosis_before > 5
    assert found.kurtosis_after < 0.6 * found.kurtosis_before

    def lost(folder: Path) -> float:
        weights = [weight.data for name, weight in load_model(folder).named_parameters() if "gate_proj" in name]
        errors = [(dequantize(*round_to_nearest(w, bits=4, group_size=32)) - w).square().sum() for w in weights]
        return float(sum(errors) / sum(w.square().sum() for w in weights))

    assert lost(found.folder) < 0.6 * lost(source)


def test_no_gain_without_outliers(tmp_path: Path) -> None:
    """The negative control: normal weights stay normal in any basis."""
    source = tiny_checkpoint(tmp_path / "model", tied=False)
    found = rotate_checkpoint(source, read_config(source), tmp_path / "out", mode="full", seed=2)
    assert found.kurtosis_after == pytest.approx(found.kurtosis_before, rel=0.1)


def test_a_kill_between_blocks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=3)
    config = read_config(source)
    whole = rotate_checkpoint(source, config, tmp_path / "whole", mode="full", seed=4)
    saved, save = [], rotation.save_tensors

    def save_then_die(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if len(saved) == 2:
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        saved.append(path)
        save(tensors, path)

    monkeypatch.setattr(rotation, "save_tensors", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        rotate_checkpoint(source, config, tmp_path / "killed", mode="full", seed=4)
    assert not (tmp_path / "killed" / rotation.INDEX).exists()
    monkeypatch.undo()
    stamps = [path.stat().st_mtime_ns for path in saved]
    resumed = rotate_checkpoint(source, config, tmp_path / "killed", mode="full", seed=4)
    assert [path.stat().st_mtime_ns for path in saved] == stamps
    assert (resumed.kurtosis_before, resumed.kurtosis_after) == (whole.kurtosis_before, whole.kurtosis_after)
    names = sorted(path.name for path in whole.folder.iterdir())
    assert names == sorted(path.name for path in resumed.folder.iterdir())
    for name in names:
        assert (whole.folder / name).read_bytes() == (resumed.folder / name).read_bytes(), name


def test_one_block_at_a_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=6)
    alive: list[Any] = []
    counts: list[int] = []
    read = rotation.read_tensor

    def counted(path: Path, name: str) -> torch.Tensor:
        tensor = read(path, name)
        counts.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(rotation, "read_tensor", counted)
    rotate_checkpoint(source, read_config(source), tmp_path / "out", mode="heads", seed=0)
    assert len(counts) > 6 * 9
    assert max(counts) <= 2 * 9  # a block's tensors, and those of the one just finished while the next is read


def test_a_real_model_computes_the_same(tmp_path: Path) -> None:
    if not STORIES.is_dir():
        pytest.skip("the stories model is not beside the repository")
    for mode in ("heads", "full"):
        found = rotate_checkpoint(STORIES, read_config(STORIES), tmp_path / mode, mode=mode, seed=0)  # type: ignore[arg-type]
        assert relative_change(STORIES, found.folder, vocab=512) < 1e-4
        assert found.untied == (512 * 64 if mode == "full" else 0)
    # the weights of this model are nearly normal as they are (3.03 against 2.95); its residual stream is not
    assert found.kurtosis_after < found.kurtosis_before
    with torch.no_grad():
        ids = torch.randint(5, 512, (4, 100), generator=torch.Generator().manual_seed(0))
        states = [
            load_model(folder)(ids, output_hidden_states=True).hidden_states for folder in (STORIES, found.folder)
        ]
    for before, after in zip(*(each[-3:] for each in states), strict=True):  # measured: 5.6, 9.5, 11.2 to 2.8, 2.7, 2.4
        kurtoses = [float((x.pow(4).mean(-1) / x.square().mean(-1).square()).mean()) for x in (before, after)]
        assert kurtoses[1] < 0.6 * kurtoses[0]
