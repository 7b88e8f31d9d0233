"""The stages on tiny models: the folder they write, streaming, padding, options, resuming after a kill."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from compress.context import StageContext, StageResult
from compress.data.rows import chat_row, write_rows
from compress.errors import DataError, ModelError
from compress.model.calibration import Batch
from compress.model.checkpoint import check_folder, load_model, parameter_count, read_config
from compress.model.layers import decoder_layers, embedding, linears, output_head
from compress.model.quantization import blocks, gptq_stage, streaming
from compress.model.quantization.blocks import EMBEDDING, BlockStream
from compress.model.quantization.gptq import gptq_quantize
from compress.model.quantization.hessians import corrected, paired_moments, position_weights, second_moment
from compress.model.quantization.layout import choose, fit_group_size, stored_as
from compress.model.quantization.packing import dequantize, read_layer
from compress.model.quantization.params import GptqParams, RtnParams
from compress.model.quantization.rtn import round_to_nearest
from compress.model.quantization.streaming import calibration_rows, open_job
from compress.model.quantization.writing import OUTER_FILE
from compress.model.shapes import layer_shapes
from compress.progress import Progress
from tests.tiny import ARCHITECTURES, tiny_checkpoint, tiny_conversations

QUICK: dict[str, Any] = {"clip_steps": 4, "calibration_tokens": 1500}
ONCE = QUICK | {"calibration_draws": 1}
SCRIPT = """
import os, signal, sys
from pathlib import Path
from compress.model.quantization import gptq_stage, writing
from tests.model.quantization.test_stage import context, GptqParams, QUICK
save, seen = writing.save_tensors, []
def save_then_die(tensors, path, **rest):
    if len(seen) == 1:  # the second layer: its file is half written when the process dies
        path.with_name(f".{path.name}.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    seen.append(path)
    save(tensors, path, **rest)
writing.save_tensors = save_then_die
gptq_stage.quantize(GptqParams(**QUICK), context(Path(sys.argv[1]), Path(sys.argv[2]), out="killed"))
"""

# prints by how many bytes the resident set rose at most while the stage ran
PEAK = """
import sys
from pathlib import Path
import psutil
from compress.metering import Meter
from compress.model.quantization import gptq_stage
from tests.model.quantization.test_stage import context, GptqParams, ONCE
ctx = context(Path(sys.argv[1]), Path(sys.argv[2]), out=sys.argv[3])
before = psutil.Process().memory_info().rss
with Meter() as meter:
    gptq_stage.quantize(GptqParams(**(ONCE | {'clip_steps': 0})), ctx)
print(meter.peak_memory_bytes - before)
"""


def context(root: Path, model: Path, *, out: str = "out", **change: Any) -> StageContext:
    data = root / "data"
    if not data.is_dir():
        data.mkdir()
        talks = tiny_conversations(80, seed=3)
        write_rows(data, [chat_row(talk[0]["content"], talk[1]["content"]) for talk in talks])
    folders = [root / out, root / f"{out}-work"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    known: dict[str, Any] = {"name": "model.quantization.gptq", "seed": 5, "threads": 1}
    return StageContext(
        inputs={"model": model, "data": data},
        out=folders[0],
        work=folders[1],
        progress=Progress(quiet=True),
        **(known | change),
    )


def quantize(root: Path, model: Path, out: str = "out", **params: Any) -> StageResult:
    return gptq_stage.quantize(GptqParams(**(QUICK | params)), context(root, model, out=out))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_opens_and_computes_what_its_codes_say(arch: str, tied: bool, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", arch, tied=tied)
    result = quantize(tmp_path, source, embedding_bits=8, sym=arch != "qwen2")
    out = tmp_path / "out"
    check_folder(out)
    assert (out / "tokenizer.json").is_file()
    settings = read_config(out)["quantization_config"]
    expected = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    assert expected.items() <= settings.items()
    tensors = load_file(out / "model.safetensors")
    model = load_model(out)
    for index, layer in enumerate(decoder_layers(model)):
        for name, linear in linears(layer).items():
            prefix = next(n for n in tensors if f"layers.{index}." in n and f".{name}.qweight" in n)
            assert torch.equal(linear.weight, dequantize(*read_layer(tensors, prefix.removesuffix(".qweight"))))
    outer = load_file(out / OUTER_FILE)
    pairs = {"embedding": embedding(model)} | ({} if tied else {"lm_head": output_head(model)})
    assert {name.split(".")[0] for name in outer} == pairs.keys()
    for prefix, module in pairs.items():
        parts = [outer[f"{prefix}.{part}"] for part in ("codes", "scales", "zero_points", "g_idx")]
        assert torch.equal(module.weight, dequantize(*parts))
    assert result.metrics["parameters"] == parameter_count(read_config(source))
    assert len(result.metrics["layers"]) == 14 + (not tied)
    assert result.metrics["kl"] < 0.05


def test_what_is_made_twice_and_what_is_held_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    quantize(tmp_path, source, "held")
    monkeypatch.setattr(blocks, "HELD_BYTES", 0)
    quantize(tmp_path, source, "twice")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("held", "twice")]
    assert files[0] == files[1]


def test_calibration_in_bf16_changes_little(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    stream = BlockStream(source, read_config(source))
    ids = torch.randint(5, 320, (3, 17), generator=torch.Generator().manual_seed(0))
    plain = torch.nn.functional.embedding(ids, stream.tensor(EMBEDDING))
    layer = stream.layer(0)
    exact, short = stream.run(layer, plain), stream.run(layer, plain, bf16=True)
    assert short.dtype == torch.float32  # what is added up stays whole
    assert 0 < float((short - exact).norm() / exact.norm()) < 0.01
    walked = [plain]
    steps = [(names, list(inputs)) for names, inputs in stream.walk(layer, walked, bf16=True)]
    assert torch.equal(walked[0], short)
    assert [inputs[0].dtype for _, inputs in steps][1::2] == [torch.bfloat16] * 2
    found = {kind: quantize(tmp_path, source, kind, precision=kind).metrics for kind in ("fp32", "bf16")}
    assert found["fp32"]["layers"] != found["bf16"]["layers"]
    assert found["bf16"]["kl"] == pytest.approx(found["fp32"]["kl"], rel=0.2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_streaming_computes_what_the_model_computes(arch: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", arch, ffn=44)
    model = load_model(source)
    ids = torch.randint(5, 320, (3, 17), generator=torch.Generator().manual_seed(0))
    expected = model.model(ids).last_hidden_state
    for ffn in (44, 64):
        stream = BlockStream(source, read_config(source), ffn=ffn)
        ran = walked = torch.nn.functional.embedding(ids, stream.tensor(EMBEDDING))
        hidden = [walked]
        for index in range(stream.count):
            layer = stream.layer(index)
            ran = stream.run(layer, ran)
            for _ in stream.walk(layer, hidden):
                pass
        assert torch.equal(ran, hidden[0])
        assert torch.allclose(stream.final_norm()(ran), expected, atol=2e-6)
    # what stands behind the last real token changes nothing before it
    longer = torch.cat([ids, ids[:, :4]], dim=1)
    hidden = [torch.nn.functional.embedding(longer, stream.tensor(EMBEDDING))]
    for index in range(stream.count):
        hidden = [stream.run(stream.layer(index), hidden[0])]
    assert torch.allclose(stream.final_norm()(hidden[0])[:, :17], expected, atol=2e-6)


@pytest.mark.parametrize("sequential", [True, False])
def test_each_linear_sees_the_inputs_that_it_should(sequential: bool, tmp_path: Path) -> None:
    """The whole stage again by hand: hooks on a whole model, quantized linear by linear."""
    source = tiny_checkpoint(tmp_path / "model", layers=2)
    params = GptqParams(**ONCE, true_sequential=sequential, embedding_bits=16, prompt_weight=0.3, correction_damp=None)
    ctx = context(tmp_path, source)
    gptq_stage.quantize(params, ctx)
    drawn = calibration_rows(open_job(params, ctx), params).draws[0]
    model = load_model(source).requires_grad_(False)
    embedding(model).weight.data = embedding(model).weight.half().float()
    weights = [position_weights(batch, prompt_weight=0.3) for batch in drawn]
    steps = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    for layer in decoder_layers(model):
        for step in steps if sequential else [sum(steps, ())]:
            caught: dict[str, list[torch.Tensor]] = {name: [] for name in step}
            hooks = [
                linears(layer)[name].register_forward_pre_hook(lambda _m, args, into=caught[name]: into.append(args[0]))
                for name in step
            ]
            for batch in drawn:
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            for hook in hooks:
                hook.remove()
            for name in step:
                linear = linears(layer)[name]
                moment = second_moment(iter(caught[name]), weights)
                options = {"act_order": True, "clip_steps": 4, "damp_frac": 0.01}
                found = gptq_quantize(linear.weight.data, moment, bits=4, group_size=32, **options)
                linear.weight.data = dequantize(*found.layer)
    result = load_model(tmp_path / "out")
    got, expected = dict(result.named_parameters()), dict(model.named_parameters())
    differing = [float((got[name] != expected[name]).float().mean()) for name in expected]
    assert max(differing) < 0.02  # fp32 sums in another order move a weight on the edge between two codes


def test_position_weights() -> None:
    batch = Batch(*(torch.tensor(rows) for rows in ([[1, 5, 6, 7, 0]], [[1, 1, 1, 1, 0]], [[0, 0, 1, 1, 0]])))
    assert position_weights(batch, prompt_weight=0.25).tolist() == [[0.25, 1.0, 1.0, 0.25, 0.0]]
    moment = second_moment([torch.arange(5.0).view(1, 5, 1)], [torch.tensor([[0.25, 1.0, 1.0, 0.25, 0.0]])])
    assert moment.item() == pytest.approx((1 + 4 + 0.25 * 9) / 2.5)


def test_the_correction_is_least_squares_and_none_where_nothing_changed() -> None:
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    changed = plain + 0.3 * torch.randn(400, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 6, generator=generator)
    ones = [torch.ones(1, 400, dtype=torch.float64)]
    moment, cross = paired_moments([changed.unsqueeze(0)], [plain.unsqueeze(0)], ones)
    assert torch.allclose(moment, changed.T @ changed / 400)
    assert torch.allclose(cross, plain.T @ changed / 400)
    wanted = plain @ weight.double().T
    expected = torch.linalg.lstsq(changed, wanted).solution.T
    assert torch.allclose(corrected(weight, moment, cross, damp_frac=1e-12).double(), expected, atol=1e-6)
    assert torch.allclose(corrected(weight, moment, moment, damp_frac=0.1), weight, atol=1e-6)
    assert torch.allclose(corrected(weight, moment, cross, damp_frac=1e9), weight, atol=1e-6)
    damped = corrected(weight, moment, cross, damp_frac=0.1).double()
    error = [float((changed @ w.T - wanted).square().sum()) for w in (expected, damped, weight.double())]
    assert error[0] < error[1] < error[2]
    assert torch.equal(corrected(weight, moment * 0, cross, damp_frac=0.1), weight)  # nothing was seen


def test_without_errors_before_it_the_correction_changes_almost_nothing(tmp_path: Path) -> None:
    """At 8 bits no layer changes what the next one sees by much: the codes of both ways are nearly all the same."""
    source = tiny_checkpoint(tmp_path / "model")
    for name, damp in (("with", 0.1), ("without", None)):
        quantize(tmp_path, source, out=name, bits=8, embedding_bits=16, correction_damp=damp)
    models = [dict(load_model(tmp_path / name).named_parameters()) for name in ("with", "without")]
    for name, weight in models[0].items():
        assert torch.allclose(weight, models[1][name], atol=0.02), name


def test_rounding_needs_no_data_and_is_plain_rounding(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", tied=False)
    ctx = context(tmp_path, source, name="model.quantization.rtn")
    result = gptq_stage.round_to_nearest(RtnParams(bits=3, clip_steps=5, embedding_bits=4, lm_head_bits=16), ctx)
    before, after = (dict(load_model(folder).named_parameters()) for folder in (source, ctx.out))
    for name, weight in after.items():
        if "proj" in name or "embed" in name:
            bits = 4 if "embed" in name else 3
            expected = dequantize(*round_to_nearest(before[name].data, bits=bits, group_size=32, clip_steps=5))
        elif name == "lm_head.weight":
            expected = before[name].half().float()
        else:
            expected = before[name]
        assert torch.equal(weight, expected), name
    assert read_config(ctx.out)["quantization_config"]["bits"] == 4
    assert any("3-bit codes are stored in 4 bits" in note for note in result.notes)


def test_gptq_beats_rounding_at_every_linear_together(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    reports = quantize(tmp_path, source, bits=3).metrics["layers"]
    params, ctx = GptqParams(**(QUICK | {"bits": 3})), context(tmp_path, source, out="nearest")
    job = streaming.open_job(params, ctx)

    def nearest(step: streaming.Step) -> dict[str, streaming.Solved]:
        found = {}
        for path, weight in step.weights.items():
            layer = streaming.rounded(weight, step.specs[path], params)
            error = gptq_stage.output_share(weight, layer, step.moment)
            found[path] = streaming.Solved(layer, {"linear": path, "error": error})
        return found

    plain = streaming.run(job, nearest, streaming.calibration_rows(job, params), prompt_weight=1.0).metrics["layers"]
    assert sum(report["error"] for report in reports) < 0.9 * sum(report["error"] for report in plain)
    assert not any(report["fell_back"] for report in reports)


@pytest.mark.parametrize(
    ("params", "bits"),
    [
        ({"group_size": 32}, 4 + 16 / 32),
        ({"group_size": 32, "sym": False}, 4 + (16 + 4) / 32),
        ({"group_size": 16, "bits": 8}, 8 + 16 / 16),
        ({"group_size": 16, "act_order": True, "keep_groups": False}, None),
    ],
)
def test_bits_per_weight_count_scales_and_zero_points(
    params: dict[str, Any], bits: float | None, tmp_path: Path
) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    metrics = quantize(tmp_path, source, **params).metrics
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    if bits is None:  # the index of freely ordered groups is counted: 32 bits per input of each matrix
        bits = 5 + 2 * 32 * (32 * 6 + 64) / linear
    assert metrics["bits_per_weight"] == pytest.approx(bits)
    whole = linear * bits + 320 * 32 * (
        8 + 16 / metrics["group_size"] + 8 / metrics["group_size"] * (not params.get("sym", True))
    )
    assert metrics["bits_per_weight_model"] == pytest.approx((whole + 5 * 32 * 32) / metrics["parameters"])


def test_an_awkward_width_is_padded_and_the_outputs_stay(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", ffn=44)
    result = quantize(tmp_path, source, bits=8, embedding_bits=16, group_size=16, correction_damp=None)
    assert read_config(tmp_path / "out")["intermediate_size"] == 48
    assert any("44 padded with zeros to 48" in note for note in result.notes)
    model = load_model(tmp_path / "out")
    for layer in decoder_layers(model):
        assert not linears(layer)["down_proj"].weight[:, 44:].any()
        assert not linears(layer)["gate_proj"].weight[44:].any()
    ids = torch.arange(5, 45).unsqueeze(0)
    assert torch.allclose(model(ids).logits, load_model(source)(ids).logits, atol=0.08)


@pytest.mark.parametrize(
    ("sizes", "wanted", "expected"),
    [
        ((576, 576, 1536), 128, (64, 1536, "fell to 64")),
        ((64, 64, 172), 32, (32, 192, "172 padded with zeros to 192")),
        ((64, 64, 172), 128, (64, 192, "fell to 64")),
        ((256, 256, 768), 128, (128, 768, None)),
        ((64, 64, 48), 32, (16, 48, "fell to 16")),
        ((24, 24, 64), 32, (32, 64, "last group of a row is shorter")),
        ((24, 24, 172), -1, (-1, 172, None)),
    ],
)
def test_group_sizes(sizes: tuple[int, int, int], wanted: int, expected: tuple[int, int, str | None]) -> None:
    hidden, attention, ffn = sizes
    config = {"hidden_size": hidden, "num_attention_heads": attention // 8, "head_dim": 8, "intermediate_size": ffn}
    size, padded, notes = fit_group_size(config, wanted)
    assert (size, padded) == expected[:2]
    if expected[2] is None:
        assert not notes
    else:
        assert expected[2] in " ".join(notes)


def test_a_kill_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=3)
    whole = quantize(tmp_path, source, out="whole")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(source)]
    ended = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr.decode()
    work = tmp_path / "killed-work" / "draw-0"
    kept = sorted(path.name for path in work.iterdir())
    assert kept == [".layer-0001.safetensors.tmp", "layer-0000.safetensors"]
    assert not any((tmp_path / "killed").iterdir())
    stamp = (work / kept[1]).stat().st_mtime_ns
    resumed = quantize(tmp_path, source, out="killed")
    assert (work / kept[1]).stat().st_mtime_ns == stamp  # not done again
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert resumed.metrics == whole.metrics
    assert resumed.notes == whole.notes


def test_one_layer_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=4)
    alive: list[Any] = []
    counts: list[int] = []
    original = BlockStream.layer

    def counted(self: BlockStream, index: int) -> Any:
        import weakref

        counts.append(sum(ref() is not None for ref in alive))
        layer = original(self, index)
        alive.append(weakref.ref(layer.mlp.up_proj.weight))
        return layer

    monkeypatch.setattr(BlockStream, "layer", counted)
    quantize(tmp_path, source, calibration_draws=1)
    assert len(counts) == 4
    assert max(counts) <= 1  # the one just finished may still be there when the next is read


def test_draws_are_disjoint_and_the_better_one_is_kept(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    (tmp_path / "data").mkdir()
    talks = tiny_conversations(700, seed=3)
    write_rows(tmp_path / "data", [chat_row(f"{i} {t[0]['content']}", t[1]["content"]) for i, t in enumerate(talks)])
    ctx = context(tmp_path, source)
    params = GptqParams(**QUICK, bits=3, calibration_draws=3)
    rows = calibration_rows(open_job(params, ctx), params)
    sets = [{tuple(ids) for batch in part for ids in batch.input_ids.tolist()} for part in rows.draws]
    assert len(sets) == 3
    checked = {tuple(ids) for batch in rows.check for ids in batch.input_ids.tolist()}
    assert len(sets[0] | sets[1] | sets[2] | checked) == sum(map(len, sets)) + len(checked)
    assert len(rows.held) == len(checked)
    found = gptq_stage.quantize(params, ctx)
    calibration = found.metrics["calibration"]
    assert calibration["draws"] == 3 == len(set(calibration["kl"]))
    assert found.metrics["kl"] == min(calibration["kl"])
    assert any("divergence with 3 draws" in note for note in found.notes)
    for number, value in enumerate(calibration["kl"]):  # each draw is what it would be alone
        alone = streaming.run(
            open_job(params, context(tmp_path, source, out=f"alone-{number}")),
            lambda step: gptq_stage.solve(step, params),
            rows._replace(draws=[rows.draws[number]]),
            prompt_weight=params.prompt_weight,
        )
        assert alone.metrics["kl"] == value


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_patterns_give_some_linears_other_bits_or_none(method: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", layers=2, tied=False)
    plain = load_model(source)
    shared: dict[str, Any] = {
        "bits": 4,
        "group_size": 32,
        "ignore": ["model.layers.1.*.k_proj"],
        "overrides": [
            {"pattern": "*.down_proj", "bits": 8, "group_size": 16},
            {"pattern": "model.layers.0.*", "bits": 2},
        ],
    }
    ctx = context(tmp_path, source)
    if method == "gptq":
        result = gptq_stage.quantize(GptqParams.model_validate(ONCE | shared), ctx)
    else:
        result = gptq_stage.round_to_nearest(RtnParams.model_validate(shared), ctx)
    check_folder(ctx.out)
    settings = read_config(ctx.out)["quantization_config"]
    tensors = load_file(ctx.out / "model.safetensors")
    expected = {"layers.0.self_attn.q_proj": 2, "layers.1.self_attn.q_proj": 4, "layers.0.mlp.down_proj": 8}
    for path, bits in expected.items():
        assert stored_as(settings, f"model.{path}")[0] == bits
        codes = read_layer(tensors, f"model.{path}", bits=bits).codes
        assert int(codes.max()) == (1 << bits) - 1
    assert "model.layers.1.self_attn.k_proj.qweight" not in tensors
    assert any(
        text.startswith("-:") and re.match(text[2:], "model.layers.1.self_attn.k_proj") for text in settings["dynamic"]
    )
    assert stored_as(settings, "model.layers.1.self_attn.k_proj")[0] == 16
    assert tensors["model.layers.0.mlp.down_proj.scales"].shape[0] == 64 // 16
    model = load_model(ctx.out)
    kept = decoder_layers(model)[1].self_attn.k_proj.weight
    assert torch.equal(kept, decoder_layers(plain)[1].self_attn.k_proj.weight.half().float())
    hidden, ffn = 32 * 32, 32 * 64
    layer = 2 * hidden + 2 * hidden // 2
    weights = {2: layer + 2 * ffn, 4: layer - hidden // 2 + 2 * ffn, 8: 2 * ffn, 16: hidden // 2}
    stored = {2: 2.5, 4: 4.5, 8: 9, 16: 16}
    average = sum(count * stored[bits] for bits, count in weights.items()) / sum(weights.values())
    assert result.metrics["bits_per_weight"] == pytest.approx(average)


def test_a_pattern_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    params = RtnParams.model_validate({"overrides": [{"pattern": "*.dwon_proj", "bits": 8}]})
    with pytest.raises(ModelError, match=r"overrides.*'\*\.dwon_proj' fits no linear"):
        choose(read_config(source), params, where="steps[2].model.quantization")


def test_peak_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """Many blocks of one size: what is allocated at the peak is one block and its activations, not the model."""
    peaks = []
    context(tmp_path, tmp_path)  # the rows, so that neither process writes them
    for layers in (2, 12):
        source = tiny_checkpoint(tmp_path / f"model-{layers}", layers=layers, hidden=256, ffn=512)
        command = [sys.executable, "-c", PEAK, str(tmp_path), str(source), f"out-{layers}"]
        # what is freed goes back to the system at once: measured is what is held, not what the allocator keeps
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}
        root = Path(__file__).parents[3]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, check=True, text=True)
        peaks.append(int(done.stdout.split()[-1]))
    block = sum(4 * math.prod(shape) for shape in layer_shapes(read_config(source)).values())
    assert peaks[1] - peaks[0] < 4 * block  # of ten more blocks


def test_a_stored_head_beside_a_tied_config_counts_where_it_differs(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", tied=False)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    quantize(tmp_path, source, embedding_bits=16)
    before, after = load_model(source), load_model(tmp_path / "out")
    assert not after.config.tie_word_embeddings
    assert torch.allclose(output_head(after).weight, output_head(before).weight, atol=1e-3)
    assert not torch.allclose(output_head(after).weight, embedding(after).weight, atol=1e-2)


def test_what_is_refused(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model")
    with pytest.raises(ModelError, match=r"lm_head_bits.*tie_word_embeddings"):
        choose(read_config(source), GptqParams(embedding_bits=8, lm_head_bits=4), where="steps[2].model.quantization")
    with pytest.raises(ValidationError, match="group_size"):
        GptqParams(group_size=48)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="bits"):
        RtnParams(bits=5)  # type: ignore[arg-type]
    quantize(tmp_path, source)
    with pytest.raises(ModelError, match="a quantized checkpoint"):
        quantize(tmp_path, tmp_path / "out", out="again")
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data", [])
    with pytest.raises(DataError, match="no row with an answer"):
        quantize(tmp_path, source, out="empty")
