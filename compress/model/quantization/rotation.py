"""Rotation: the same model in another basis of its residual stream and its heads, where outliers are spread out.

`rotate_checkpoint` reads a plain checkpoint folder block by block and writes another that computes the same: norm
gains go into the linears behind them, then every matrix that reads or writes the residual stream is multiplied by
one orthogonal matrix, and v_proj and o_proj by one within each head. Source: Ashkboos et al., QuaRot
(arXiv:2404.00456), the parts that need nothing at run time. `orthogonal` gives the matrices.
Knows nothing of codes, rows or stages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from compress.model.checkpoint import copy_tokenizer, write_json
from compress.model.quantization.blocks import EMBEDDING, HEAD, NORM, read_tensor, tensor_files
from compress.model.quantization.writing import save_tensors
from compress.model.shapes import head_size, kv_head_count

Mode = Literal["heads", "full"]
INDEX = "model.safetensors.index.json"
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
VALUE, OUTPUT = "self_attn.v_proj", "self_attn.o_proj"
ROWS = 8192  # of an embedding that are held in fp64 at once


@dataclass(frozen=True)
class Rotated:
    """A rotated checkpoint.

    Attributes:
        folder: where it lies: a plain folder, fp32, one shard per decoder layer.
        kurtosis_before: fourth moment over the squared second of a linear's row, mean over rows and linears; near 3
            for normal weights, more where few inputs have far larger ones than the rest.
        kurtosis_after: the same after the rotation.
        untied: weights of the output head that the model has now beside its embedding; 0 when nothing was untied.
    """

    folder: Path
    kurtosis_before: float
    kurtosis_after: float
    untied: int


def rotate_checkpoint(source: Path, config: Mapping[str, Any], folder: Path, *, mode: Mode, seed: int) -> Rotated:
    """Write the checkpoint ``source`` (its ``config.json`` as ``config``) rotated into ``folder``.

    ``heads`` rotates within the heads alone, ``full`` the residual stream too, which unties a tied head when the
    final norm's gain is not constant: the head takes the gain, the embedding does not. All maths in fp64, stored in
    fp32. One block is in memory at a time. Shards that are there already are kept, so that a killed call goes on;
    the same ``seed`` gives the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = tensor_files(source)
    turn = _Turn(config, mode, seed)
    untie = mode == "full" and bool(config.get("tie_word_embeddings")) and not _constant(files)
    count = int(config["num_hidden_layers"])
    names = [f"model-{at + 1:05d}-of-{count + 1:05d}.safetensors" for at in range(count + 1)]
    before, after = [], []
    for index in range(count):
        kurtoses = _block(files, index, turn, folder / names[index])
        before += kurtoses[0]
        after += kurtoses[1]
    if not (folder / names[count]).is_file():
        save_tensors(dict(_outer(files, config, turn, untie=untie)), folder / names[count])
    _finish(source, config, folder, names, untie=untie)
    untied = int(config["vocab_size"]) * int(config["hidden_size"]) if untie else 0
    return Rotated(folder, sum(before) / len(before), sum(after) / len(after), untied)


def orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """Return an orthogonal matrix (size, size) fp64: a Hadamard matrix of random signs, else a random one by QR."""
    found: torch.Tensor | None = hadamard(size)
    if found is None:
        drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
        basis, upper = torch.linalg.qr(drawn)
        found = torch.sign(upper.diagonal()) * basis  # without the signs QR prefers some rotations over others
        return found
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    return found * signs / math.sqrt(size)


def hadamard(size: int) -> torch.Tensor | None:
    """Return a Hadamard matrix (size, size) of 1 and -1, fp64; None where neither Sylvester nor Paley gives one.

    Sylvester doubles a matrix; Paley gives sizes q + 1 for primes q = 3 mod 4 and 2 (q + 1) for primes q = 1 mod 4,
    such as 12, 20, 28, 36, 60.
    """
    doublings = 0
    while size >> doublings:
        if size % (1 << doublings):
            return None
        base = _paley(size >> doublings)
        if base is not None:
            for _ in range(doublings):
                base = torch.cat([torch.cat([base, base], 1), torch.cat([base, -base], 1)])
            return base
        doublings += 1
    return None


def _paley(size: int) -> torch.Tensor | None:
    """Return a Hadamard matrix of one of Paley's sizes, or of size 1 or 2; None for another size."""
    if size in (1, 2):
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:size, :size]
    if size % 4:
        return None
    if _is_prime(size - 1):
        skew = _conference(size - 1, sign=-1)
        return skew + torch.eye(size, dtype=torch.float64)
    half = size // 2
    if _is_prime(half - 1) and (half - 1) % 4 == 1:
        core, one = _conference(half - 1, sign=1), torch.eye(half, dtype=torch.float64)
        return torch.cat([torch.cat([core + one, core - one], 1), torch.cat([core - one, -core - one], 1)])
    return None


def _conference(prime: int, *, sign: int) -> torch.Tensor:
    """Return the conference matrix (prime + 1, prime + 1) of the quadratic residues; skew for ``sign`` -1."""
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[[value * value % prime for value in range(1, prime)]] = 1.0
    residues[0] = 0.0
    places = torch.arange(prime)
    whole = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    whole[0, 1:], whole[1:, 0] = 1.0, sign
    whole[1:, 1:] = residues[(places.unsqueeze(1) - places) % prime]
    return whole


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


class _Turn:
    """The matrices of one rotation, and what they do to a block's tensors."""

    def __init__(self, config: Mapping[str, Any], mode: Mode, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size, self.kv_heads = head_size(config), kv_head_count(config)
        self.head = orthogonal(self.size, generator)
        self.stream = orthogonal(int(config["hidden_size"]), generator) if mode == "full" else None

    def gain(self, state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
        """Return the gain that stands before a linear of a block and goes into it; None when it stays."""
        norm = next((norm for norm, readers in READERS.items() if name in readers), None)
        return state[f"{norm}.weight"].double() if norm is not None and self.stream is not None else None

    def weight(self, name: str, weight: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        """Return the linear ``weight`` (out, in) of a block in the new bases, fp64."""
        work = weight.double() if gain is None else weight.double() * gain
        if self.stream is not None:
            work = self.stream.T @ work if name in WRITERS else work @ self.stream
        if name == VALUE:
            work = self._values(work)
        if name == OUTPUT:
            work = (work.view(len(work), -1, self.size) @ self.head).view(len(work), -1)
        return work

    def bias(self, name: str, bias: torch.Tensor) -> torch.Tensor:
        """Return the ``bias`` (out,) of a linear of a block in the new bases, fp64."""
        work = bias.double()
        if name in WRITERS and self.stream is not None:
            work = self.stream.T @ work
        return self._values(work.unsqueeze(1)).squeeze(1) if name == VALUE else work

    def _values(self, rows: torch.Tensor) -> torch.Tensor:
        """Turn the outputs of v_proj, (key-value heads * head size, n), within each head."""
        return (self.head.T @ rows.view(self.kv_heads, self.size, -1)).view(rows.shape)

    def rows(self, table: torch.Tensor, gain: torch.Tensor | None) -> torch.Tensor:
        """Return an embedding or head (V, hidden) in the new basis, fp32; a piece at a time in fp64."""
        stream = self.stream
        if stream is None:
            return table.float()
        pieces = (table[at : at + ROWS].double() for at in range(0, len(table), ROWS))
        return torch.cat([((piece if gain is None else piece * gain) @ stream).float() for piece in pieces])


def _block(files: Mapping[str, Path], index: int, turn: _Turn, path: Path) -> tuple[list[float], list[float]]:
    """Write one decoder layer's shard unless it is there; return the kurtoses of its linears before and after."""
    prefix = f"model.layers.{index}."
    state = {name.removeprefix(prefix): read_tensor(files[name], name) for name in files if name.startswith(prefix)}
    if path.is_file():
        done = {name: read_tensor(path, prefix + name) for name in state}
    else:
        done = {name: _turned(name, state, turn) for name in state}
        save_tensors({prefix + name: tensor for name, tensor in done.items()}, path)
    matrices = sorted(name for name, tensor in state.items() if tensor.dim() == 2)
    return [_kurtosis(state[name]) for name in matrices], [_kurtosis(done[name]) for name in matrices]


def _turned(name: str, state: Mapping[str, torch.Tensor], turn: _Turn) -> torch.Tensor:
    """Return one tensor of a block in the new bases, fp32."""
    part, _, kind = name.rpartition(".")
    if part in READERS:
        return torch.ones_like(state[name], dtype=torch.float32) if turn.stream is not None else state[name].float()
    if kind == "bias":
        return turn.bias(part, state[name]).float().contiguous()
    if state[name].dim() == 2:
        return turn.weight(part, state[name], turn.gain(state, part)).float().contiguous()
    return state[name].float()  # norms within a head see what they saw


def _outer(
    files: Mapping[str, Path], config: Mapping[str, Any], turn: _Turn, *, untie: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield embedding, final norm and head in the new basis."""
    embedding = read_tensor(files[EMBEDDING], EMBEDDING)
    norm = read_tensor(files[NORM], NORM).float()
    tied = bool(config.get("tie_word_embeddings"))
    folds = turn.stream is not None and (untie or not tied)
    yield EMBEDDING, turn.rows(embedding, None)
    yield NORM, torch.ones_like(norm) if folds else norm  # a constant gain may stay: it is the same in any basis
    if untie or not tied:
        head = embedding if tied else read_tensor(files[HEAD], HEAD)
        yield HEAD, turn.rows(head, norm.double() if folds else None)


def _constant(files: Mapping[str, Path]) -> bool:
    gain = read_tensor(files[NORM], NORM)
    return bool((gain == gain[0]).all())


def _finish(source: Path, config: Mapping[str, Any], folder: Path, names: list[str], *, untie: bool) -> None:
    """Write what makes a checkpoint of the shards: config, tokenizer, generation settings, and last the index."""
    new = dict(config) | {"tie_word_embeddings": bool(config.get("tie_word_embeddings")) and not untie}
    new |= {"dtype": "float32"}
    new.pop("torch_dtype", None)
    write_json(folder / "config.json", new)
    copy_tokenizer(source, folder)
    if (source / "generation_config.json").is_file():
        (folder / "generation_config.json").write_bytes((source / "generation_config.json").read_bytes())
    shards = {name: shard.name for shard in (folder / name for name in names) for name in _names(shard)}
    size = sum((folder / name).stat().st_size for name in names)
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": shards}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _names(path: Path) -> list[str]:
    with safe_open(str(path), framework="pt") as file:
        return sorted(file.keys())


def _kurtosis(values: torch.Tensor) -> float:
    squares = values.double().square()
    return float((squares.square().mean(1) / squares.mean(1).square().clamp(min=1e-60)).mean())
