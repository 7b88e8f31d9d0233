"""The export stage: what it writes, the same bytes each time, and what it refuses before anything is stored."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress.data.rows import chat_row, write_rows
from compress.errors import ModelError, ParityError, TargetError
from compress.files import NOT_STATED, licence_of
from compress.model.checkpoint import load_model
from deploy.bundle import bundle_bytes, open_bundle
from deploy.export import onnx as onnx_export
from deploy.export.codes import Coded
from deploy.export.stage import export
from deploy.params import ExportParams
from deploy.targets import Target, load_target
from tests.deploy.tools import context
from tests.tiny import tiny_conversations

LAPTOP = load_target("x86-laptop-avx2")


def run(source: Path, out: Path, *, target: Target | None = LAPTOP, inputs: Any = None, **params: Any) -> Any:
    """Export ``source`` into ``out``."""
    ctx = context("deploy.export.bundle", out, inputs={"model": source, **(inputs or {})}, target=target)
    return export(ExportParams(**params), ctx)


def test_both_formats_come_from_the_same_codes(quantized: Path, tmp_path: Path) -> None:
    result = run(quantized, tmp_path / "out", formats=["onnx", "gptq"], licence="Apache-2.0")
    bundle = open_bundle(tmp_path / "out")
    assert bundle.formats == ["gptq", "onnx"]
    assert bundle.info["licence"] == "Apache-2.0"
    assert result.metrics["bundle_bytes"] == bundle_bytes(tmp_path / "out")  # the checkpoint beside it is not copied
    assert result.metrics["gptq_bytes"] > 0
    assert result.metrics["nodes"]["MatMulNBits"] == 11
    for (name, ours), (_, theirs) in zip(
        load_model(quantized).named_parameters(), load_model(tmp_path / "out" / "gptq").named_parameters(), strict=True
    ):
        assert bool((ours == theirs).all()), name


def test_two_exports_are_the_same_bytes(quantized: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(quantized, tmp_path / name, formats=["onnx", "gptq"])
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) > 8
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_parity_is_proven_on_the_datas_own_rows(quantized: Path, tmp_path: Path) -> None:
    rows = [chat_row(ask["content"], call["content"]) for ask, call in tiny_conversations(40)]
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data", rows)
    result = run(quantized, tmp_path / "out", inputs={"data": tmp_path / "data"}, parity_rows=6)
    assert result.metrics["parity"]["exact"]["positions"] > 6 * 10


def test_a_context_longer_than_the_targets_is_cut(quantized: Path, tmp_path: Path) -> None:
    small = LAPTOP.model_copy(update={"context_tokens": 64})
    run(quantized, tmp_path / "out", target=small)
    assert open_bundle(tmp_path / "out").info["onnx"]["context_tokens"] == 64


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"storage_bytes": 50_000}, r"target x86-laptop-avx2: the bundle needs about \d{2,3}\.?\d* kB of storage"),
        ({"usable_memory_bytes": 30_000_000}, r"running the bundle needs about 69.* MB of memory.*at most 30 MB"),
        ({"formats": ["gptq"]}, r"target x86-laptop-avx2: format onnx; expected one of gptq"),
    ],
)
def test_a_target_that_is_too_small_is_refused(
    quantized: Path, tmp_path: Path, update: dict[str, Any], message: str
) -> None:
    with pytest.raises(TargetError, match=message) as caught:
        run(quantized, tmp_path / "out", target=LAPTOP.model_copy(update=update))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out" / "bundle.json").exists()


def test_plain_weights_have_no_gptq_format(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not quantized; expected codes.*model.quantization before the export"):
        run(plain, tmp_path / "out", formats=["gptq"])


def test_a_graph_that_computes_something_else_stops_the_run(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_rows = onnx_export.codes.take_rows

    def off_by_one(matrix: Coded, order: Any) -> Coded:
        taken = take_rows(matrix, order)
        taken.codes[0, 0] ^= 1
        return taken

    monkeypatch.setattr(onnx_export.codes, "take_rows", off_by_one)
    with pytest.raises(ParityError, match=r"its logits differ from torch's by") as caught:
        run(quantized, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "out" / "bundle.json").exists()


def test_activations_that_cost_too_much_stop_the_run(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"diverges from torch by .* \(max_kl\). Set accuracy_level: 1"):
        run(quantized, tmp_path / "out", max_kl=1e-9)
    run(quantized, tmp_path / "again", max_kl=1e-9, accuracy_level=1)


def test_another_architecture_names_the_supported_ones(plain: Path, tmp_path: Path) -> None:
    for path in plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["LamaForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM") as caught:
        run(tmp_path, tmp_path / "out")
    assert caught.value.exit_code == 2


def test_the_licence_comes_from_the_model_card(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == NOT_STATED
    (tmp_path / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Model\n", encoding="utf-8")
    assert licence_of(tmp_path) == "apache-2.0"
    (tmp_path / "README.md").write_text("# Model\n\nlicense: none\n", encoding="utf-8")
    assert licence_of(tmp_path) == NOT_STATED


@pytest.mark.parametrize("value", [{"accuracy_level": 2}, {"formats": []}, {"formats": ["ggml"]}, {"max_kl": 0.0}])
def test_parameters_out_of_range_are_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(value))):
        ExportParams(**value)
    assert math.isclose(ExportParams().parity_tolerance, 1e-3)


def test_a_target_never_shortens_the_context_in_silence(quantized: Path, tmp_path: Path) -> None:
    small = load_target("x86-laptop-avx2").model_copy(update={"context_tokens": 100})
    for at, (target, params, said) in enumerate(
        (
            (small, {}, True),
            (small, {"context_tokens": 64}, False),
            (None, {}, False),
            (small.model_copy(update={"context_tokens": 9999}), {}, False),
        )
    ):
        ctx = context("deploy.export.bundle", tmp_path / str(at), inputs={"model": quantized}, target=target)
        notes = export(ExportParams.model_validate({"parity_rows": 1, "parity_tokens": 8, **params}), ctx).notes
        told = "the context is 100 tokens, as the target x86-laptop-avx2 says, and 256 by the model"
        assert any(note.startswith(told) for note in notes) == said
        assert any(note.startswith("keys and values of a whole context of ") for note in notes)
