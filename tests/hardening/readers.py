"""Every reader of input from outside, with a valid input of each: what is mutated, and what is then called.

A `Reader` has ``seed(made)``, which copies a valid input into a new folder, ``mutate(folder, draw)``, and
``read(folder)``, which must return or raise an `EdgestillError` of exit code 1 or 2. What takes long is made once.
"""

# ruff: noqa: E501 - long tables of what goes wrong
from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.hardening import mutations as m

CHAT = [{"role": "user", "content": "lock the hall door"}, {"role": "assistant", "content": '{"name":"lock"}'}]


class Made:
    """Valid inputs in ``root``, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cache  # noqa: B019 - one object in a worker process
    def model(self) -> Path:
        from tests.tiny import tiny_checkpoint

        return tiny_checkpoint(self.root / "model", layers=1, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=64)

    @cache  # noqa: B019
    def quantized(self) -> Path:
        from tests.deploy.tools import rounded

        return rounded(self.model(), self.root / "quantized", bits=4, group_size=32)

    @cache  # noqa: B019
    def bundle(self) -> Path:
        from deploy.export.stage import export
        from deploy.params import ExportParams
        from tests.deploy.tools import context

        ctx = context("deploy.export.bundle", self.root / "bundle", inputs={"model": self.quantized()})
        export(ExportParams(), ctx)
        return ctx.out

    @cache  # noqa: B019
    def archive(self) -> Path:
        from deploy.archive import pack

        pack(self.bundle(), self.root / "b.tar.zst")
        return self.root / "b.tar.zst"

    @cache  # noqa: B019
    def run(self) -> Path:
        from tests.test_report import record

        (self.root / "run").mkdir()
        text = json.dumps(record.__wrapped__() if hasattr(record, "__wrapped__") else record._get_wrapped_function()())
        (self.root / "run/run.json").write_text(text)
        return self.root / "run"

    @cache  # noqa: B019
    def store(self) -> Path:
        from compress.store import Store

        store = Store(self.root / "store", say=lambda _: None)
        with store.begin("ab" * 32, {"stage": "x"}) as draft:
            (draft.out / "file.txt").write_text("text")
            draft.record |= {"seconds": 1.5, "metrics": {"rows_in": 5}}
        store.file_digest(self.model() / "config.json")
        (self.root / "store/digests.jsonl").write_text('\n["/a", 1, 2, 3, 4, "ff"]\n')
        return self.root / "store"


@dataclass(frozen=True)
class Reader:
    """One kind of input: the file of ``seed`` that is mutated, how, and who reads it."""

    name: str
    seed: Callable[[Made, Path], Any]
    file: str
    how: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path, Made], Any]

    def mutate(self, folder: Path, draw: random.Random) -> None:
        path = folder / self.file
        path.write_bytes(self.how(path.read_bytes(), draw))


def copy(what: str) -> Callable[[Made, Path], Any]:
    def seed(made: Made, folder: Path) -> None:
        source = getattr(made, what)()
        if source.is_dir():
            shutil.copytree(source, folder, dirs_exist_ok=True)
        else:
            shutil.copy(source, folder / source.name)

    return seed


def write(name: str, text: str) -> Callable[[Made, Path], Any]:
    return lambda made, folder: (folder / name).write_text(text, encoding="utf-8")


# ------------------------------------------------------------------------------------------------ models


def read_model(folder: Path, _: Made) -> None:
    from compress import hub
    from compress.model.checkpoint import load_model
    from compress.model.shapes import check_config, parameter_count, shape_for_ratio
    from compress.plans import Outside  # noqa: F401 - what a plan loads
    from deploy.sizing import Precision, estimate
    from deploy.targets import load_target

    config = hub.read_config(folder / "config.json")
    check_config(config)
    parameter_count(config)
    estimate(config, Precision.of_checkpoint(folder, config), load_target("raspberry-pi-5"))
    shape_for_ratio(config, 0.2, axes=("heads", "ffn", "layers"))
    load_model(folder)


def read_folder(folder: Path, _: Made) -> None:
    from compress.model.checkpoint import check_folder

    check_folder(folder)


def read_weights(folder: Path, made: Made) -> None:
    from compress.model.checkpoint import load_model

    read_folder(folder, made)
    load_model(folder)


def shard(made: Made, folder: Path) -> None:
    copy("model")(made, folder)
    from safetensors.torch import load_file

    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 5}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_tokenizer(folder: Path, _: Made) -> None:
    from compress.data.rows import make_row
    from compress.encoding import decode, encode_rows, encode_text_prompt, load_tokenizer, stop_ids
    from compress.model.checkpoint import check_tokenizer, read_config
    from compress.model.distillation.cross_tokenizer.shapes import tokenizer_size
    from deploy.export.gguf_tokenizer import read

    check_tokenizer(folder, read_config(folder))
    tokenizer_size(folder)
    tokenizer = load_tokenizer(folder)
    stop_ids(tokenizer)
    encode_rows([make_row(messages=CHAT), make_row(text="once upon a time \u00e9")], tokenizer, max_tokens=4096)
    decode(encode_text_prompt("hello \U0001f600", tokenizer), tokenizer)
    read(folder, size=320)


def read_template(folder: Path, _: Made) -> None:
    from compress.data.rows import make_row
    from compress.encoding import encode_prompt, encode_rows, load_tokenizer, stop_ids

    tokenizer = load_tokenizer(folder)
    stop_ids(tokenizer)
    encode_prompt(CHAT[:1], tokenizer)
    encode_rows([make_row(messages=CHAT)], tokenizer, max_tokens=4096)


def template(made: Made, folder: Path) -> None:
    from tests.tiny import CHAT_TEMPLATE

    copy("model")(made, folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def as_bytes(how: Callable[[str, random.Random], str]) -> Callable[[bytes, random.Random], bytes]:
    return lambda seed, draw: how(seed.decode(), draw).encode("utf-8", "replace")


def read_ends(folder: Path, made: Made) -> None:
    from compress.model.checkpoint import load_model, save_model
    from compress.teachers import LocalTeacher

    LocalTeacher(folder).stop_ids  # noqa: B018 - read on first use
    save_model(load_model(folder), folder / "out", tokenizer_from=folder)


def read_notes(folder: Path, _: Made) -> None:
    from compress.lineage import figures_of
    from compress.model.checkpoint import read_config
    from deploy.export.stage import _last_step
    from deploy.sizing import Precision

    figures_of(folder)
    _last_step(folder)
    Precision.of_checkpoint(folder, read_config(folder))


# ------------------------------------------------------------------------------------------------ bundles


def read_bundle(folder: Path, _: Made) -> None:
    from compress.errors import EdgestillError
    from deploy.archive import pack
    from deploy.bundle import open_bundle, tuned
    from deploy.bundle_runner import run
    from deploy.sizing import estimate_of_bundle
    from deploy.targets import load_target

    tuned(folder)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
        assert run.main(["--check", "--bundle", str(folder)]) in (0, 1, 2)
    assert "Traceback" not in said.getvalue()
    try:
        info = run.read_json(folder / "bundle.json")
        run.Settings.of(info, run.read_json(folder / "genai_config.json"), None)
    except (run.Fault, AttributeError, LookupError, TypeError, ValueError):  # what its main turns into a message
        pass
    bundle = open_bundle(folder, verify=False)
    errors = []
    (folder.parent / "packed.tar.zst").unlink(missing_ok=True)
    for work in (
        lambda: pack(folder, folder.parent / "packed.tar.zst"),
        lambda: estimate_of_bundle(bundle, load_target("raspberry-pi-5"), 64),
        lambda: (bundle.parameters, bundle.bytes, bundle.tuned, bundle.need("onnx")),
    ):
        try:
            work()
        except EdgestillError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def read_runtime(folder: Path, made: Made) -> None:
    from deploy.bundle import write_bundle
    from deploy.runners import GenaiRunner
    from deploy.tune import starting_point

    info = json.loads((made.bundle() / "bundle.json").read_text())
    facts = {key: value for key, value in info.items() if key not in ("edgestill", "files")}
    starting_point(write_bundle(folder, facts))  # its digests are right: whoever changed it wrote them
    GenaiRunner(folder, threads=1).generate([[5, 6, 7]], 4, [4])


def read_archive(folder: Path, _: Made) -> None:
    from deploy.archive import bundle_folder

    with bundle_folder(folder / "b.tar.zst"):
        pass


def packed_again(seed: bytes, draw: random.Random) -> bytes:
    """An archive with another entry, size, kind or content; or with a few bytes changed."""
    import zstandard

    if draw.random() < 0.4:
        return m.some_bytes(seed, draw)
    plain = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(seed)).read()
    if draw.random() < 0.4:
        return zstandard.ZstdCompressor(level=1).compress(m.some_bytes(plain, draw))
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(plain)) as tar,
        tarfile.open(fileobj=out, mode="w", format=draw.choice((0, 1, 2))) as new,
    ):
        for entry in tar.getmembers():
            data, own = tar.extractfile(entry).read(), entry.name
            if draw.random() < 0.3:
                entry.name = draw.choice(
                    (entry.name, "../x", "/x", "a/b", "", "x\ny", "\u00e9", "bundle.json", "x" * 200)
                )
            if own == "bundle.json" and draw.random() < 0.6:
                info = json.loads(data)
                name = draw.choice(list(info["files"]))
                info["files"][name]["bytes"] = draw.choice((0, -1, 10**9, 10**15, 2**70, "5", None, 5.5))
                data = draw.choice((json.dumps(info).encode(), m.json_bytes(data, draw)))
            if draw.random() < 0.2:
                entry.type = draw.choice(
                    (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
                )
                entry.linkname = "/etc/passwd"
            if draw.random() < 0.2:
                data = draw.choice((b"", data + b"x", b"\0" * 30_000_000))
            entry.size = len(data)
            new.addfile(entry, io.BytesIO(data))
    return zstandard.ZstdCompressor(level=1).compress(out.getvalue())


# ------------------------------------------------------------------------------------------------ records


def read_run(folder: Path, _: Made) -> None:
    from compress import run_record
    from compress.errors import UserError
    from compress.listings import rows_of
    from compress.report import write_report
    from compress.shipping import figures_of_run

    (folder / "runs/x").mkdir(parents=True)
    shutil.copy(folder / "run.json", folder / "runs/x/run.json")
    rows_of("runs", folder)
    record = run_record.read(folder / "run.json")
    write_report(record, folder / "report.html")
    (folder / "bundle.json").write_text("{}")
    with suppress(UserError):  # it made another bundle
        figures_of_run(record, folder)


def read_store(folder: Path, _: Made) -> None:
    from compress.store import Store

    store, said = Store(folder, say=lambda _: None), "ab" * 32
    store.lookup(said, verify=True)
    store.record(said)
    store.file_digest(folder / "digests.jsonl")
    store.gc([])


def scores(_: Made, folder: Path) -> None:
    import numpy as np

    from compress.scores import Scores

    found = Scores("teacher", 5, 7)
    found.add("perplexity", ["a", "b", "c"], np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 1.0]))
    found.write(folder)


def read_scores(folder: Path, _: Made) -> None:
    from compress.scores import measure
    from compress.scores import read_scores as read

    found = read(folder)
    for name in found.metrics:
        measure(found, name, seed=1, samples=20)


PROFILE = """\
edgestill: 1
name: tiny
seed: 3
teacher: teacher
data: {pool: pool.jsonl, test: test.jsonl}
target: x86-laptop-avx2
hardware: {threads: 1}
steps:
  - data.selection: {method: heuristics}
  - model.distillation: {layers: 1, steps: 2, batch_tokens: 256}
  - model.quantization: {method: gptq, bits: 4, group_size: 16}
export: {formats: [onnx]}
evaluate: {tasks: [perplexity], rows: 4}
gate: [{metric: perplexity, max_ratio: 1000}]
bench: null
"""


def read_profile(folder: Path, _: Made) -> None:
    from compress.profile import load_profile

    load_profile(str(folder / "p.yaml"))


def read_override(folder: Path, _: Made) -> None:
    from compress.profile import load_profile
    from compress.single import stage_and_params

    text = (folder / "set.txt").read_bytes().decode("utf-8", "surrogateescape").replace("\x00", "")
    try:
        stage_and_params("model.quantization.gptq", [text])
    finally:
        load_profile("quickstart", overrides=[text])


def override(seed: bytes, draw: random.Random) -> bytes:
    key = draw.choice(
        (
            b"bits",
            b"seed",
            b"steps[0].bits",
            b"steps[99999999999].x",
            b"steps[model.pruning].heads",
            b"a.b.c",
            b"gate[0].metric",
            seed,
        )
    )
    return m.some_bytes(key, draw) if draw.random() < 0.2 else key + b"=" + m.yaml_bytes(b"a: 1\nb: [1, 2]", draw)


def target(_: Made, folder: Path) -> None:
    from deploy.targets import find_target

    shutil.copy(find_target("raspberry-pi-5"), folder / "t.yaml")


def read_target(folder: Path, _: Made) -> None:
    from deploy.targets import load_target

    load_target(folder / "t.yaml")


# ------------------------------------------------------------------------------------------------ devices, servers


def looked(made: Made, folder: Path) -> None:
    from deploy.remote.device_side import look

    names = sorted(json.loads((made.bundle() / "bundle.json").read_text())["files"])
    (folder / "answer.json").write_text(json.dumps(look(made.bundle(), [*names, "bundle.json"])))


def read_device(folder: Path, made: Made) -> None:
    from deploy.bundle import open_bundle
    from deploy.remote.sync import Remote, copy_bundle
    from deploy.remote.transport import Finished

    class Answering:
        where = "ssh://someone"

        def run(self, arguments: Any, *, timeout: float) -> Finished:
            return Finished(0, (folder / "answer.json").read_bytes().decode("utf-8", "replace"), "")

        def send(self, source: Path, target: str, *, offset: int = 0) -> None:
            pass

        def folder(self, name: str) -> str:
            return name

    copy_bundle(Remote(Answering(), "x"), open_bundle(made.bundle(), verify=False))


def benched(_: Made, folder: Path) -> None:
    spread = {"low": 1.0, "median": 1.0, "high": 1.0}
    record = {
        "runtime": "x", "runtime_version": "1", "threads": 1, "tuned": False, "prompt_tokens": 4, "new_tokens": 4, "repeats": 1, "warmup": 1,
        "prefill_tokens_per_s": 1.0, "decode_tokens_per_s": 1.0, "first_token_s": 1.0, "load_s": 1.0, "peak_memory_bytes": 1, "base_memory_bytes": 1,
        "prefill_s": spread, "decode_s_per_token": spread, "first_token_spread_s": spread, "weight_bytes": 1, "memory_bandwidth_bytes_per_s": 1.0,
        "read_bound_tokens_per_s": 1.0, "read_bound_share": 1.0, "load_average": 1.0, "energy": {}, "temperature": {},
        "machine": {"cores": 2, "system": "Linux 6 x86_64", "instruction_sets": [], "cpu": "a cpu"},
    }  # fmt: skip
    (folder / "seen.json").write_text(json.dumps(record))


def read_bench(folder: Path, _: Made) -> None:
    from deploy.bench import BenchRecord, _seen
    from deploy.remote.transport import Finished
    from deploy.targets import load_target, unlike

    said = (folder / "seen.json").read_bytes().decode("utf-8", "replace")
    record = BenchRecord.of("ssh://x", _seen("ssh://x", Finished(0, said, "")))
    unlike(load_target("raspberry-pi-5"), record.machine)
    json.dumps(record.facts(), allow_nan=False)


REPLY = {"id": "x", "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "hello"},
         "logprobs": {"content": [{"token": "hello", "logprob": -0.5, "top_logprobs": []}]}}], "usage": {"completion_tokens": 1}}  # fmt: skip


def read_endpoint(folder: Path, _: Made) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    from compress.endpoint import ChatClient, Request

    content = (folder / "reply.json").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        client = ChatClient(f"http://127.0.0.1:{server.server_port}/v1", "m", attempts=1, backoff_s=0.01, timeout_s=10)
        client.complete(CHAT[:1], Request(8))
    finally:
        server.shutdown()
        server.server_close()


def read_recording(folder: Path, _: Made) -> None:
    from compress.teachers import RecordedTeacher

    teacher = RecordedTeacher(folder / "r.jsonl")
    teacher.identity  # noqa: B018
    teacher.answer([CHAT[:1]])


# ------------------------------------------------------------------------------------------------ rows, texts


def rows_file(name: str) -> Callable[[Made, Path], Any]:
    def seed(_: Made, folder: Path) -> None:
        from compress.data.rows import make_row, write_jsonl, write_rows

        rows = [make_row(messages=CHAT, meta={"a": {"b": [1, 2.5]}}, label="x"), make_row(text="once upon a time")]
        if name == "rows.jsonl":
            write_jsonl(folder / name, rows)
        else:
            write_rows(folder, rows)

    return seed


def read_source(folder: Path, _: Made) -> None:
    from compress.data.rows import read_rows, write_rows
    from compress.data.rows import read_source as read

    path = next(folder.glob("rows.*"))
    found = read(path)
    (folder / "again").mkdir()
    write_rows(folder / "again", found.rows)
    read_rows(folder / "again")


def read_artifact(folder: Path, _: Made) -> None:
    from compress.data.rows import read_rows

    read_rows(folder)


def artifact(seed: bytes, draw: random.Random) -> bytes:
    """A rows.parquet with a column of other values or another type; or with a few bytes changed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if draw.random() < 0.5:
        return m.some_bytes(seed, draw)
    records = pq.read_table(io.BytesIO(seed)).to_pylist()
    name = draw.choice(list(records[0]))
    value = draw.choice(
        (
            "{",
            "5",
            "[1]",
            "null",
            '[{"role": 5}]',
            "[" * 3000,
            "",
            None,
            5,
            2.5,
            [1],
            {"a": 1},
            b"\xff",
            '"\\ud800"',
            "9" * 5000,
        )
    )
    for record in records:
        if draw.random() < 0.1:
            record.pop(name, None)
        else:
            record[name] = value
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), out)
    return out.getvalue()


def read_answers(folder: Path, _: Made) -> None:
    from compress.data.quality.mixes import function_name
    from compress.data.rows import make_row
    from compress.data.selection.heuristic_rules import judge
    from compress.data.selection.near_duplicates import exact_key
    from compress.data.selection.params import HeuristicsParams
    from evaluators.metrics import parse_call, score_calls

    text = (folder / "answer.txt").read_bytes().decode("utf-8", "replace")
    parse_call(text)
    score_calls([text], ['{"name":"lock","args":{"room":"hall"}}'])
    function_name(text)
    row = make_row(messages=[CHAT[0], {"role": "assistant", "content": text or "x"}])
    judge(row, HeuristicsParams())
    exact_key(row, "all")


def read_card(folder: Path, _: Made) -> None:
    from compress.files import licence_of

    licence_of(folder)


CARD = "---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n"
READERS = [
    Reader("config.json", copy("model"), "config.json", m.json_bytes, read_model),
    Reader("quantization_config", copy("quantized"), "config.json", m.json_bytes, read_model),
    Reader("index", shard, "model.safetensors.index.json", m.json_bytes, read_folder),
    Reader("safetensors", copy("model"), "model.safetensors", m.safetensors_bytes, read_weights),
    Reader("safetensors of codes", copy("quantized"), "model.safetensors", m.safetensors_bytes, read_weights),
    Reader("tokenizer.json", copy("model"), "tokenizer.json", m.json_bytes, read_tokenizer),
    Reader("tokenizer_config.json", copy("model"), "tokenizer_config.json", m.json_bytes, read_tokenizer),
    Reader("generation_config.json", copy("model"), "generation_config.json", m.json_bytes, read_ends),
    Reader("chat template", template, "chat_template.jinja", as_bytes(m.template_text), read_template),
    Reader("edgestill.json", copy("quantized"), "edgestill.json", m.json_bytes, read_notes),
    Reader("card", write("README.md", CARD), "README.md", m.some_bytes, read_card),
    Reader("bundle.json", copy("bundle"), "bundle.json", m.json_bytes, read_bundle),
    Reader("genai_config.json", copy("bundle"), "genai_config.json", m.json_bytes, read_runtime),
    Reader("archive", copy("archive"), "b.tar.zst", packed_again, read_archive),
    Reader("run.json", copy("run"), "run.json", m.json_bytes, read_run),
    Reader("manifest.json", copy("store"), f"artifacts/{'ab' * 32}/manifest.json", m.json_bytes, read_store),
    Reader("store record", copy("store"), f"records/{'ab' * 32}.json", m.json_bytes, read_store),
    Reader("digests", copy("store"), "digests.jsonl", m.json_lines, read_store),
    Reader("scores.json", scores, "scores.json", m.json_bytes, read_scores),
    Reader("profile", write("p.yaml", PROFILE), "p.yaml", m.yaml_bytes, read_profile),
    Reader("--set", write("set.txt", "seed"), "set.txt", override, read_override),
    Reader("target", target, "t.yaml", m.yaml_bytes, read_target),
    Reader("device", looked, "answer.json", m.json_bytes, read_device),
    Reader("device's bench", benched, "seen.json", m.json_bytes, read_bench),
    Reader("endpoint", write("reply.json", json.dumps(REPLY)), "reply.json", m.json_bytes, read_endpoint),
    Reader("recording", write("r.jsonl", json.dumps({"messages": CHAT[:1], "reply": "x", "mean_logprob": -1.0}) + "\n"), "r.jsonl", m.json_lines, read_recording),
    Reader("rows as JSON lines", rows_file("rows.jsonl"), "rows.jsonl", m.json_lines, read_source),
    Reader("rows as parquet", rows_file("rows.parquet"), "rows.parquet", m.some_bytes, read_source),
    Reader("artifact of rows", rows_file("rows.parquet"), "rows.parquet", artifact, read_artifact),
    Reader("answers", write("answer.txt", '{"name": "lock", "args": {"room": "hall", "level": 5}}'), "answer.txt", m.json_bytes, read_answers),
]  # fmt: skip
NAMES = {reader.name: reader for reader in READERS}


def drawn(name: str, seed: int) -> random.Random:
    """The source of all chance in one input."""
    return random.Random(hashlib.sha256(f"{name}:{seed}".encode()).hexdigest())
