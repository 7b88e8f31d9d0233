"""The export stage: a checkpoint becomes a bundle for a device, and is proven to compute the same.

`export` writes the formats that are asked for, checks parity in the runtime, checks that the bundle fits the target,
and describes everything in ``bundle.json``. If any of it fails it raises, and nothing is stored. Knows the pipeline's
contract for stages; how a format is written is known to `onnx`, `optimum`, `gptq` and `gguf`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.context import StageContext, StageResult
from compress.encoding import encode_text_prompt, load_tokenizer, sampled_texts, token_rows
from compress.errors import ModelError, TargetError
from compress.files import NOT_STATED, licence_of
from compress.functions import functions_of
from compress.json_reader import read_table
from compress.model.checkpoint import METADATA_FILE, check_tokenizer, read_config
from compress.model.shapes import architecture, parameter_count
from deploy.bundle import BESIDE, GGUF_FOLDER, GPTQ_FOLDER, RUNNER, RUNNER_FILE, Bundle, write_bundle
from deploy.export.gguf import export_gguf
from deploy.export.gptq import export_gptq
from deploy.export.onnx import OnnxOptions, OnnxReport, write_onnx
from deploy.export.optimum import interpreter, write_optimum
from deploy.export.parity import Parity, check
from deploy.export.text_proof import TextPath, prove
from deploy.export.tokenizer import write_tokenizer
from deploy.params import ExportParams
from deploy.sizing import Precision, check_fit, estimate, kv_cache_bytes, lowered_context, products

TEXT_ROWS = 64  # of the data, on which the text path is proven
_SAID = {GPTQ_FOLDER: "GPTQ checkpoint", GGUF_FOLDER: "GGUF file"}


def export(params: ExportParams, ctx: StageContext) -> StageResult:
    """Write the bundle of the model slot into ``ctx.out``.

    Raises:
        ModelError: the checkpoint cannot be exported, or a format needs codes that it does not have.
        TargetError: the target does not run a format, or the bundle does not fit it.
        ParityError: the exported graph computes something else than the checkpoint.
        UserError: the package for a format, or the environment of a back-end, is missing.
    """
    source = ctx.inputs["model"]
    config = read_config(source)
    _check_formats(params, ctx, config, source)
    load_tokenizer(source)  # a damaged one is found before a graph is drawn
    facts: dict[str, Any] = {
        "formats": sorted(set(params.formats)),
        "model": _model_facts(config, plain=params.backend == "optimum" and "onnx" in params.formats),
        "licence": params.licence or licence_of(source),
        **_history(params, ctx, source),
        "target": None if ctx.target is None else ctx.target.name,
    }
    result = StageResult(metrics={"parameters": parameter_count(config)})
    if "gptq" in params.formats:
        _export_gptq(source, ctx.out / GPTQ_FOLDER, str(facts["licence"]), result)
    if "gguf" in params.formats:
        facts["gguf"] = _export_gguf(source, ctx.out / GGUF_FOLDER, str(facts["licence"]), result)
    if "onnx" in params.formats:
        facts |= _export_onnx(params, ctx, source, result)
    facts |= _functions(params, ctx)
    bundle = write_bundle(ctx.out, facts)
    result.metrics["bundle_bytes"] = bundle.bytes
    if set(params.formats) != {"onnx"}:
        result.notes.append(_counted(bundle))
    return result


def _functions(params: ExportParams, ctx: StageContext) -> dict[str, Any]:
    """The table of functions for ``bundle.json``: as given, else as the data's rows call them; nothing without any."""
    found = params.functions
    if found is None and "data" in ctx.inputs:
        found = functions_of(ctx.inputs["data"])
    return {"functions": {name: sorted(found[name]) for name in sorted(found)}} if found else {}


def _counted(bundle: Bundle) -> str:
    """What ``bundle_bytes`` counts, where a folder holds more than the runtime opens."""
    beside = [form for form in BESIDE if form in bundle.formats]
    told = [f"the {_SAID[form]} in {form}/ ({form}_bytes)" for form in beside]
    if "onnx" in bundle.formats:
        return (
            f"bundle_bytes counts the {len(bundle.shipped)} files that go to the device, with bundle.json; "
            f"{' and '.join(told)} {'is' if len(told) == 1 else 'are'} not needed there and not counted"
        )
    return (
        f"bundle_bytes counts the {_SAID[beside[0]]} in {beside[0]}/, with bundle.json; there is no ONNX model, so "
        "that edgestill can neither judge nor time this bundle"
    )


def _check_formats(params: ExportParams, ctx: StageContext, config: dict[str, Any], source: Path) -> None:
    """Refuse early what cannot end well: a format that the target does not run, a model that does not fit it."""
    architecture(config, where=str(source / "config.json"))
    check_tokenizer(source, config)
    if "gptq" in params.formats and not config.get("quantization_config"):
        raise ModelError(
            str(source),
            "its weights are not quantized",
            "codes, for the format gptq",
            "Put model.quantization before the export, or leave gptq out of the formats",
        )
    if params.backend == "optimum":
        interpreter()
    if ctx.target is None:
        return
    missing = [form for form in params.formats if form not in ctx.target.formats]
    if missing:
        raise TargetError(
            f"target {ctx.target.name}", f"format {missing[0]}", f"one of {', '.join(ctx.target.formats)}"
        )
    precision = Precision() if params.backend == "optimum" else Precision.of_checkpoint(source, config)
    last = keeps_last(params)
    check_fit(estimate(config, precision, ctx.target, _context(params, ctx), last_logits=last), ctx.target)


def keeps_last(params: ExportParams) -> bool:
    """Whether the graph gives a prompt's logits at its last position alone; optimum's never does."""
    return params.last_logits and params.backend == "builder"


def _context(params: ExportParams, ctx: StageContext) -> int | None:
    return params.context_tokens or (None if ctx.target is None else ctx.target.context_tokens)


def _export_gptq(source: Path, out: Path, licence: str, result: StageResult) -> None:
    written = export_gptq(source, out, facts={"licence": licence})
    result.metrics |= {"gptq_bytes": written["bytes"], "gptq_matrices": written["matrices"]}


def _export_gguf(source: Path, out: Path, licence: str, result: StageResult) -> dict[str, Any]:
    """Write the GGUF file; return what ``bundle.json`` says of it."""
    written = export_gguf(source, out, licence=None if licence == NOT_STATED else licence)
    result.metrics["gguf_bytes"] = written["bytes"]
    result.notes += written["notes"]
    return {"weights": written["weights"], "notes": written["notes"]}


def _export_onnx(params: ExportParams, ctx: StageContext, source: Path, result: StageResult) -> dict[str, Any]:
    """Write the ONNX format, prove parity, and return what ``bundle.json`` says of it."""
    ctx.progress.say("proving that the device cuts texts as the tokenizer does")
    path = _text_path(params, ctx, source)
    options = OnnxOptions(
        accuracy_level=params.accuracy_level, context_tokens=_context(params, ctx), last_logits=params.last_logits
    )
    ctx.progress.say("writing the ONNX model")
    report = _writer(params)(source, ctx.out, options=options)
    write_tokenizer(source, ctx.out, template=path.template, tokenizer=path.tokenizer)
    (ctx.out / RUNNER_FILE).write_bytes(RUNNER.read_bytes())
    ctx.progress.say("proving that it computes what the checkpoint computes")
    parity = check(
        ctx.out,
        source,
        prompts(params, ctx, source, report.context_tokens),
        tolerance=params.parity_tolerance,
        max_kl=params.max_kl,
        threads=ctx.threads,
        work=ctx.work,
        progress=ctx.progress,
    )
    result.notes += path.notes + report.notes + ([] if ctx.target is None else ctx.target.notes)
    result.notes += _context_notes(params, ctx, read_config(source), report)
    if parity.shipped.top1 < 1:
        result.notes.append(_said(parity))
    result.metrics |= {
        "nodes": report.nodes,
        "parity": parity.facts(),
        "onnx_bytes": sum(path.stat().st_size for path in ctx.out.glob("model.onnx*")),
        "read_per_token_bytes": report.read_per_token_bytes,
        "context_tokens": report.context_tokens,
        "kv_cache_bytes": kv_cache_bytes(read_config(source), report.context_tokens),
    }
    facts = _onnx_facts(params, report)
    every, once = products(read_config(source), last_logits=keeps_last(params))
    facts |= {"last_logits": keeps_last(params), "products_per_token": every, "products_per_prompt": once}
    return {"onnx": facts, "parity": parity.facts(), "text": {**path.entries, "proof": path.proof}}


def _text_path(params: ExportParams, ctx: StageContext, source: Path) -> TextPath:
    """Prove how the bundle cuts texts, on a seeded sample of the data's rows too."""
    if "data" not in ctx.inputs:
        return prove(source, ctx.work, texts=params.prompts)
    texts, chats = sampled_texts(ctx.inputs["data"], TEXT_ROWS, ctx.seed)
    return prove(source, ctx.work, texts=[*params.prompts, *texts], chats=chats)


def _context_notes(params: ExportParams, ctx: StageContext, config: dict[str, Any], report: OnnxReport) -> list[str]:
    """What the context is, where a target sets it, and the memory of a whole one."""
    own = int(config.get("max_position_embeddings") or report.context_tokens)
    lowered = lowered_context(own, params.context_tokens, ctx.target)
    cache = kv_cache_bytes(config, report.context_tokens)
    told = f"keys and values of a whole context of {report.context_tokens} tokens take {cache / 1e6:.3g} MB of memory"
    return [*([lowered] if lowered else []), f"{told}; a request takes what its own tokens need"]


def _writer(params: ExportParams) -> Callable[..., OnnxReport]:
    """Return what writes the ONNX graph."""
    return write_onnx if params.backend == "builder" else write_optimum


def _said(parity: Parity) -> str:
    shipped = parity.shipped
    return (
        f"activations in 8 bits: the most likely token is torch's at {shipped.top1:.2%} of {shipped.positions} "
        f"positions, KL {shipped.kl:.2g} nats per token (in fp32: {parity.exact.top1:.2%})"
    )


def _onnx_facts(params: ExportParams, report: OnnxReport) -> dict[str, Any]:
    import onnxruntime
    import onnxruntime_genai

    return {
        "runtime": {"onnxruntime": onnxruntime.__version__, "onnxruntime-genai": onnxruntime_genai.__version__},
        "backend": params.backend,
        "accuracy_level": params.accuracy_level if params.backend == "builder" else 1,
        "context_tokens": report.context_tokens,
        "head_size": report.head_size,
        "nodes": report.nodes,
        "read_per_token_bytes": report.read_per_token_bytes,
        "notes": report.notes,
    }


def prompts(params: ExportParams, ctx: StageContext, source: Path, context: int) -> list[list[int]]:
    """Return the token ids on which parity is proven: a seeded sample of the data's rows, else ``params.prompts``."""
    tokenizer = load_tokenizer(source)
    most = min(params.parity_tokens, context)
    if "data" in ctx.inputs:
        rows = token_rows(ctx.inputs["data"], tokenizer, max_tokens=most, truncate=True)
        picked = random.Random(ctx.seed).sample(rows, min(params.parity_rows, len(rows)))  # noqa: S311 - a sample
        return [list(row.ids) for row in picked]
    encoded = [list(encode_text_prompt(text, tokenizer))[:most] for text in params.prompts[: params.parity_rows]]
    kept = [ids for ids in encoded if ids]
    if not kept:
        raise ModelError("export.prompts", "they give no token", "texts that the tokenizer knows")
    return kept


def _model_facts(config: dict[str, Any], *, plain: bool) -> dict[str, Any]:
    """What ``bundle.json`` says of the model; ``plain``: the graph holds values where the checkpoint holds codes."""
    quantization = {} if plain else config.get("quantization_config") or {}
    return {
        "architecture": architecture(config),
        "parameters": parameter_count(config),
        "layers": int(config["num_hidden_layers"]),
        "hidden": int(config["hidden_size"]),
        "vocabulary": int(config["vocab_size"]),
        "bits": quantization.get("bits"),
        "group_size": quantization.get("group_size"),
    }


def _history(params: ExportParams, ctx: StageContext, source: Path) -> dict[str, Any]:
    """Every step that led here, this one last, and what came in from outside, with its licence.

    Outside of a run the steps are not known, but for the last one, which a checkpoint of edgestill's own tells.
    """
    origins = list(ctx.lineage.get("origins", [])) or [{"role": "model", "licence": licence_of(source)}]
    own = {"stage": "deploy.export", "method": "bundle", "params": params.model_dump(mode="json"), "seed": ctx.seed}
    return {"steps": [*(ctx.lineage.get("steps") or _last_step(source)), own], "origins": origins}


def _last_step(folder: Path) -> list[dict[str, Any]]:
    """What the checkpoint says of the step that made it; nothing when it is not one of ours."""
    path = folder / METADATA_FILE
    if not path.is_file():
        return []
    found = read_table(path, ModelError)
    stage, _, method = str(found.get("stage", "")).rpartition(".")
    kept: dict[str, Any] = {key: found[key] for key in ("params", "teacher", "student") if key in found}
    return [{"stage": stage, "method": method, **kept}]
