"""The GPTQ checkpoint in GPTQModel, in transformers with it, and in AutoGPTQ: the same codes, the same logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.encoding import load_tokenizer
from compress.model.checkpoint import load_model, read_config
from compress.model.quantization import packing
from compress.model.quantization.layout import stored_as
from deploy.export.gptq import export_gptq, read_codes
from tests.deploy.tools import changed_config, rounded, shuffled
from tests.interop.conftest import Ask
from tests.tiny import tiny_checkpoint

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1600)]

SHAPE: dict[str, Any] = {"hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 256}
PROMPTS = [[1, 2, 77, 200, 31, 8, 150, 3], [1, 2, 99, 98, 97, 40, 41, 42, 43, 4]]
TEXTS = ["dim the kitchen lights to 30", "<|bos|><|user|>lock  the door<|end|>"]
MIXED = [{"pattern": "*.down_proj", "bits": 8}, {"pattern": "model.layers.0.self_attn.v_proj", "bits": 16}]
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "4-bits": ("llama", False, {"bits": 4, "group_size": 32}),
    "4-bits-tied": ("llama", True, {"bits": 4, "group_size": 128}),
    "4-bits-asym": ("qwen2", False, {"bits": 4, "group_size": 64, "sym": False}),
    "8-bits-asym": ("llama", False, {"bits": 8, "group_size": 64, "sym": False}),
    "2-bits": ("qwen3", False, {"bits": 2, "group_size": 32, "sym": False}),
    "3-bits": ("llama", False, {"bits": 3, "group_size": 32}),
    "whole-rows": ("qwen2", False, {"bits": 4, "group_size": -1}),
    "any-order": ("llama", False, {"bits": 4, "group_size": 32}),
    "mixed": ("llama", False, {"bits": 4, "group_size": 32, "overrides": MIXED}),
}
# AutoGPTQ is older than Qwen3 and than widths of their own for single linears
KNOWN_TO_AUTO_GPTQ = [name for name, case in CASES.items() if case[0] != "qwen3" and name != "mixed"]
# Largest difference of a logit over the largest logit. GPTQModel's torch kernel takes fp16 and bf16 alone; AutoGPTQ
# computes in fp32. 2e-2 is what bf16's 8 bits of precision leave of two layers; a zero point read one off gives over
# 1e-1 (the control below).
HALF, FP32, BF16 = 5e-3, 1e-3, 2e-2


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One exported GPTQ folder for each case."""
    root, made = tmp_path_factory.mktemp("gptq"), {}
    for name, (arch, tied, params) in CASES.items():
        plain = tiny_checkpoint(root / f"{name}-plain", arch, tied=tied, **SHAPE)
        changed_config(plain, rope_parameters={"rope_type": "default", "rope_theta": 50_000.0})
        source = rounded(plain, root / f"{name}-q", clip_steps=3, **params)
        if name == "any-order":
            source = shuffled(source, root / f"{name}-s")
        made[name] = root / name
        export_gptq(source, made[name])
    return made


@pytest.fixture(scope="session")
def vouched(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same folders, the asymmetric ones marked as GPTQModel marks its own: it refuses them from anyone else."""
    root, marked = tmp_path_factory.mktemp("vouched"), dict(folders)
    for name in asymmetric():
        marked[name] = Path(shutil.copytree(folders[name], root / name))
        meta = {"meta": {"quantizer": ["gptqmodel:7.6.0"]}}
        changed_config(marked[name], quantization_config=meta)
        path = marked[name] / "quantize_config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | meta), encoding="utf-8")
    return marked


def asymmetric() -> list[str]:
    return [name for name, case in CASES.items() if not case[2].get("sym", True)]


def request(folders: dict[str, Path]) -> dict[str, Any]:
    return {"models": {name: str(path) for name, path in folders.items()}, "prompts": PROMPTS, "texts": TEXTS}


@pytest.fixture(scope="session")
def gptqmodel(ask: Ask, folders: dict[str, Path], vouched: dict[str, Path]) -> dict[str, Any]:
    """What GPTQModel finds in every folder; under ``unmarked-NAME`` what it says of an asymmetric one as it is."""
    return ask("stranger", "gptqmodel", request(vouched | {f"unmarked-{name}": folders[name] for name in asymmetric()}))


@pytest.fixture(scope="session")
def transformers(ask: Ask, folders: dict[str, Path]) -> dict[str, Any]:
    """What AutoModelForCausalLM finds in every folder."""
    return ask("stranger", "transformers", request(folders))


@pytest.fixture(scope="session")
def auto_gptq(ask: Ask, folders: dict[str, Path]) -> dict[str, Any]:
    """What AutoGPTQ finds in every folder of a model that it knows."""
    return ask("auto-gptq", "auto_gptq", request({name: folders[name] for name in KNOWN_TO_AUTO_GPTQ}))


def off(folder: Path, found: dict[str, Any], name: str, *, shift: int = 0) -> float:
    """Largest difference of ``found`` logits from ours, over our largest; ``shift`` moves our zero points."""
    model = load_model(folder)
    if shift:
        weights = dict(model.named_parameters())
        for prefix, layer in read_codes(folder):
            moved = layer._replace(zero_points=layer.zero_points + shift)
            weights[f"{prefix}.weight"].data = packing.dequantize(*moved)
    worst = 0.0
    for number, ids in enumerate(PROMPTS):
        with torch.no_grad():
            ours = model(torch.tensor([ids])).logits[0].numpy()
        assert np.isfinite(found[f"{name}/logits{number}"]).all(), "NaN compares as equal below"
        worst = max(worst, float(np.abs(found[f"{name}/logits{number}"] - ours).max() / np.abs(ours).max()))
    print(f"{name}, zero points + {shift}: {worst:.2g} of the largest logit")
    return worst


def check_codes(folder: Path, found: dict[str, Any], name: str, *, stored_less: int) -> None:
    """Unpack every linear of the other tool and compare codes, zero points, scales and groups with ours."""
    assert f"{name}/error" not in found, found[f"{name}/error"]
    settings = read_config(folder)["quantization_config"]
    linears = 0
    for prefix, ours in read_codes(folder):
        bits = stored_as(settings, prefix)[0]
        rows, columns = ours.codes.shape
        qweight, qzeros, scales, g_idx = (found[f"{name}/{prefix}.{part}"] for part in packing.SUFFIXES)
        codes = packing.unpack_rows(torch.from_numpy(qweight), bits, columns).T
        zeros = packing.unpack_rows(torch.from_numpy(qzeros.T.copy()), bits, rows)
        assert torch.equal(codes, ours.codes), prefix
        assert torch.equal(zeros, (ours.zero_points.int() - stored_less).to(torch.uint8)), prefix
        assert np.array_equal(scales.T.astype(np.float32), ours.scales.float().numpy()), prefix
        assert np.array_equal(g_idx, ours.g_idx.numpy()), prefix
        linears += 1
    theirs = {key.removesuffix(".qweight") for key in found if key.startswith(f"{name}/") and key.endswith(".qweight")}
    assert len(theirs) == linears == (13 if name == "mixed" else 14)


@pytest.mark.parametrize("name", CASES)
def test_gptqmodel_opens_it(folders: dict[str, Path], gptqmodel: dict[str, Any], name: str) -> None:
    check_codes(folders[name], gptqmodel, name, stored_less=0)  # it adds the 1 when it loads
    assert off(folders[name], gptqmodel, name) < HALF


@pytest.mark.parametrize("name", asymmetric())
def test_gptqmodel_takes_free_zero_points_from_its_own_files_alone(gptqmodel: dict[str, Any], name: str) -> None:
    """Not silently misread; the day that it opens them, the card and docs/methods.md can say so."""
    assert "Loading of a sym=False model" in str(gptqmodel[f"unmarked-{name}/error"])


@pytest.mark.parametrize("name", [name for name in CASES if name != "mixed"])
def test_transformers_opens_it(folders: dict[str, Path], transformers: dict[str, Any], name: str) -> None:
    assert f"{name}/error" not in transformers, transformers[f"{name}/error"]
    assert len(transformers[f"{name}/kinds"]), "no quantized linear: it was opened as something else"
    tokenizer = load_tokenizer(folders[name])
    if CASES[name][0] != "qwen2":  # for which transformers 5 puts its own splitting rules over those of the file
        for number, text in enumerate(TEXTS):
            assert list(transformers[f"{name}/tokens{number}"]) == tokenizer(text)["input_ids"]
    assert off(folders[name], transformers, name) < BF16


def test_transformers_alone_refuses_widths_of_their_own(transformers: dict[str, Any]) -> None:
    """It does not know ``dynamic``, which is GPTQModel's, and says so instead of reading garbage."""
    assert "RuntimeError" in str(transformers["mixed/error"])


@pytest.mark.parametrize("name", KNOWN_TO_AUTO_GPTQ)
def test_auto_gptq_opens_it(folders: dict[str, Path], auto_gptq: dict[str, Any], name: str) -> None:
    check_codes(folders[name], auto_gptq, name, stored_less=1)
    assert auto_gptq[f"{name}/rope_theta"] == 50_000, "transformers 4 reads the rotary base too"
    assert off(folders[name], auto_gptq, name) < FP32


@pytest.mark.parametrize("name", CASES)
def test_zero_points_one_off_would_be_seen(folders: dict[str, Path], gptqmodel: dict[str, Any], name: str) -> None:
    """The negative control: what a reader of "gptq_v2" would make of the file is no rounding error."""
    assert off(folders[name], gptqmodel, name, shift=1) > (2 * HALF if name == "8-bits-asym" else 0.1)
