"""Every supported architecture goes the whole way: distilled, pruned, quantized, exported, and run in the runtime.

Llama, Qwen2 and Qwen3, tied and untied, each with fewer key-value heads than heads. All biases and gains of the
teacher are random, so that a part that some step forgets shows in the export's parity or in the bundle's loss.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.pipeline import run
from compress.profile import load_profile
from compress.progress import Progress
from compress.run_record import RunRecord
from compress.store import Store
from tests.tiny import ARCHITECTURES, tiny_checkpoint, tiny_conversations

pytestmark = pytest.mark.timeout(300)  # a busy machine

PROFILE = """\
edgestill: 1
name: tiny
seed: 3
teacher: teacher
data: {pool: pool.jsonl, test: test.jsonl}
target: x86-laptop-avx2
hardware: {threads: 1}
steps:
  - model.distillation: {layers: 2, steps: 6, batch_tokens: 256, top_k: 16}
  - model.pruning: {heads: 2, kv_heads: 1, ffn: 64, recovery: {steps: 2, batch_tokens: 256}}
  - model.quantization: {method: gptq, bits: 4, group_size: 16}
export: {formats: [onnx, gptq], parity_rows: 3}
evaluate: {tasks: [function_call, perplexity], rows: 6, max_new_tokens: 8}
gate: [{metric: perplexity, max_ratio: 1000}]
bench: null
"""


def folder_of(record: RunRecord, stage: str) -> Path:
    return next(Path(entry["path"] or "") for entry in record["stages"] if entry["name"] == stage)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_whole_path(tmp_path: Path, arch: str, tied: bool) -> None:
    shape = {"layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 96}
    tiny_checkpoint(tmp_path / "teacher", arch, tied=tied, **shape)
    for name, count in (("pool", 60), ("test", 8)):
        lines = (json.dumps({"messages": talk}) for talk in tiny_conversations(count, seed=count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "tiny.yaml").write_text(PROFILE)
    record = run(load_profile(tmp_path / "tiny.yaml"), store=Store(tmp_path / "store"), progress=Progress(quiet=True))
    assert record["status"] == "done", record["verdict"]

    config = json.loads((folder_of(record, "model.quantization.gptq") / "config.json").read_text())
    assert config["model_type"] == arch
    assert config["tie_word_embeddings"] is tied
    found = tuple(config[f"num_{name}"] for name in ("hidden_layers", "attention_heads", "key_value_heads"))
    assert found == (2, 2, 1)
    assert config["intermediate_size"] == 64

    bundle_folder = folder_of(record, "deploy.export.bundle")
    found_files = {path.name for path in bundle_folder.rglob("*")}
    assert {"model.onnx", "genai_config.json", "tokenizer.json", "bundle.json"} <= found_files
    assert record["ledger"] is not None
    checkpoint, bundle = record["ledger"]["entries"][-2:]
    assert bundle["step"] == "bundle"
    assert bundle["metrics"]["nll"]["mean"] == pytest.approx(checkpoint["metrics"]["nll"]["mean"], rel=0.02)
    answers = (folder_of(record, "evaluate.bundle") / "predictions.jsonl").read_text().splitlines()
    assert len(answers) == 6
    assert any(json.loads(line)["prediction"] for line in answers), "the runtime has written nothing"
