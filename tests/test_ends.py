"""What ends an answer is one thing: for training, evaluation, checkpoints, bundles, their script and GGUF files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compress.data.rows import chat_row
from compress.encoding import decode, encode_prompt, encode_rows, load_tokenizer, stop_ids
from compress.ends import declared_ends
from compress.errors import ModelError
from compress.teachers import LocalTeacher
from deploy.export.gguf_tokenizer import read
from deploy.export.onnx import end_tokens
from deploy.export.stage import export
from deploy.params import ExportParams
from deploy.serving import BundleProcess
from tests.deploy.tools import context, rounded
from tests.tiny import BOS, CHAT_TEMPLATE, END, PAD, USER, VOCAB, tiny_checkpoint

ASKED = ("say yes", "say no", "say maybe")


def declare(folder: Path, **files: Any) -> Path:
    """Put entries into the JSON files of a folder; a file's None removes it."""
    for name, values in files.items():
        path = folder / f"{name}.json"
        if values is None:
            path.unlink(missing_ok=True)
            continue
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(before | values), encoding="utf-8")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose EOS is a token that no chat has: the template alone ends a turn with another."""
    folder = tiny_checkpoint(tmp_path / "model")
    eos = {"eos_token_id": PAD}
    return declare(folder, config=eos, generation_config=eos, tokenizer_config={"eos_token": "<|pad|>"})


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (PAD, PAD, {PAD, END}),
        (PAD, [PAD, 9, 7], {PAD, END, 7, 9}),
        ([BOS, 9], None, {PAD, END, BOS, 9}),
        (None, None, {PAD, END}),
        (-1, [VOCAB, 10**9, None, 5], {PAD, END, 5}),
        ([], 6, {PAD, END, 6}),
    ],
)
def test_all_that_says_where_an_answer_ends_counts(
    model: Path, config: Any, generation: Any, expected: set[int]
) -> None:
    declare(model, config={"eos_token_id": config}, generation_config={"eos_token_id": generation})
    assert set(stop_ids(load_tokenizer(model))) == expected
    assert set(LocalTeacher(model).stop_ids) == expected
    ends, _ = end_tokens(model, json.loads((model / "config.json").read_text()))
    assert set(ends) == expected
    assert stop_ids(load_tokenizer(model)) == tuple(sorted(expected))


@pytest.mark.parametrize("said", ["</s>", 2.0, [4, "x"], True, {"a": 1}])
def test_an_end_that_is_no_id_is_refused_by_its_file(model: Path, said: Any) -> None:
    declare(model, generation_config={"eos_token_id": said})
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id .*expected a token id, a list of"):
        load_tokenizer(model)


def test_a_bundle_says_it_in_its_own_config(model: Path) -> None:
    declare(model, config=None, generation_config=None, genai_config={"model": {"eos_token_id": [8], "vocab_size": 9}})
    assert declared_ends(model) == (8,)


@pytest.mark.parametrize(
    ("behind", "end", "kept"),
    [
        ("<|end|>", END, ["<|end|>"]),
        ("<|end|>\\n", END, ["<|end|>"]),
        ("\\n<|end|>\\n", END, ["\n", "<|end|>"]),
        (" over<|end|>", END, [" over", "<|end|>"]),
        ("<|end|><|pad|>", END, ["<|end|>"]),
        ("<|end|>\\n<|user|>go on", END, ["<|end|>"]),
        ("\\n", None, ["\n", "<|pad|>"]),
        ("", None, ["<|pad|>"]),
        (" over", None, [" over", "<|pad|>"]),
    ],
)
def test_a_trained_answer_ends_where_it_is_cut(model: Path, behind: str, end: int | None, kept: list[str]) -> None:
    """With the first end that the template puts behind it; with EOS where it puts none; with nothing after that."""
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ '"
        + behind
        + "' }}{% else %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert set(stop_ids(tokenizer)) == {PAD} | ({end} if end is not None else set())
    for answer in ("yes", "", "a<|end|>b"):
        (coded,) = encode_rows([chat_row("hi", answer)], tokenizer, max_tokens=99)
        targets = [token for token, wanted in zip(coded.ids, coded.answer, strict=True) if wanted]
        assert tokenizer.decode(targets) == answer + "".join(kept)
        assert targets[-1] in stop_ids(tokenizer)


def test_a_template_that_wants_a_system_message_still_tells_its_end(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    check = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = check + CHAT_TEMPLATE
    assert set(stop_ids(tokenizer)) == {PAD, END}


def test_an_added_token_that_is_not_marked_special_ends_a_turn(model: Path) -> None:
    path = model / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for token in data["added_tokens"]:
        token["special"] = token["special"] and token["id"] != END
    path.write_text(json.dumps(data), encoding="utf-8")
    declare(model, tokenizer_config={"added_tokens_decoder": {}, "additional_special_tokens": [],
                                     "extra_special_tokens": []})  # fmt: skip
    assert END in stop_ids(load_tokenizer(model))


def test_llama_cpp_is_told_of_three_ends_and_the_user_of_more(model: Path) -> None:
    declare(model, generation_config={"eos_token_id": [PAD, USER]})
    found = read(model, size=VOCAB)
    assert (found.special["eos"], found.special["eot"], found.special["eom"]) == (PAD, END, USER)
    declare(model, generation_config={"eos_token_id": [PAD, USER, BOS, 40]})
    found = read(model, size=VOCAB)
    assert {found.special[name] for name in ("eos", "eot", "eom")} == {PAD, END, BOS}
    assert any("it goes on after <|user|>, " in note for note in found.notes)


def taught(folder: Path) -> Path:
    """Overfits the model in ``folder`` to answer with the last word of three questions and the template's end."""
    import torch

    from compress.model.checkpoint import load_model

    torch.set_num_threads(1)
    found, tokenizer = load_model(folder).train(), load_tokenizer(folder)
    rows = encode_rows([chat_row(asked, asked.split()[1]) for asked in ASKED], tokenizer, max_tokens=64)
    optimizer = torch.optim.AdamW(found.parameters(), lr=5e-3)
    for _ in range(40):
        for row in rows:
            ids = torch.tensor([row.ids])
            labels = ids.masked_fill(torch.tensor([row.answer]) == 0, -100)
            found(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found.save_pretrained(folder)
    return declare(folder, generation_config={"eos_token_id": PAD})


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A taught model in 8 bits and its bundle, with a GPTQ checkpoint and a GGUF file beside it."""
    place = tmp_path_factory.mktemp("ends")
    folder = declare(
        tiny_checkpoint(place / "model", hidden=64, head_dim=16, scale=0.05),
        config={"eos_token_id": PAD}, tokenizer_config={"eos_token": "<|pad|>"},
    )  # fmt: skip
    small = rounded(taught(folder), place / "small", bits=8, group_size=32)
    ctx = context("deploy.export.bundle", place / "bundle", inputs={"model": small})
    export(ExportParams(formats=["onnx", "gptq", "gguf"]), ctx)
    return small, ctx.out


def test_the_taught_model_ends_in_the_same_place_everywhere(shipped: tuple[Path, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from compress.model.checkpoint import TorchRuntime, load_model, save_model

    small, bundle = shipped
    tokenizer = load_tokenizer(small)
    assert stop_ids(tokenizer) == stop_ids(load_tokenizer(bundle)) == (PAD, END)
    for folder in (small, bundle / "gptq"):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [PAD, END]
    assert json.loads((bundle / "genai_config.json").read_text())["model"]["eos_token_id"] == [PAD, END]
    requests = [[{"role": "user", "content": asked}] for asked in ASKED]
    prompts = [encode_prompt(messages, tokenizer) for messages in requests]
    opened = load_model(small)
    found = TorchRuntime(opened).generate(prompts, 40, stop_ids(tokenizer))
    assert [decode(ids, tokenizer) for ids in found] == ["yes", "no", "maybe"]
    save_model(opened, bundle.with_name("student"), tokenizer_from=small)
    plain = AutoModelForCausalLM.from_pretrained(bundle.with_name("student"), dtype=torch.float32)
    written = plain.generate(torch.tensor(prompts[:1]), max_new_tokens=40, do_sample=False)[0]
    assert written.tolist() == [*prompts[0], *found[0], END]
    with BundleProcess(bundle, threads=1) as device:
        answers = device.answer([{"messages": messages} for messages in requests], 40)
        assert [(one.prompt, one.ids, one.text) for one in answers] == [
            (prompt, ids, text) for prompt, ids, text in zip(prompts, found, ["yes", "no", "maybe"], strict=True)
        ]
        with pytest.raises(ModelError, match=r"its run\.py cannot answer: max_new_tokens 0; expected 1 or more"):
            device.answer([{"text": "x"}], 0)
        assert device.encode([{"text": "say"}]) == [[BOS, *tokenizer("say")["input_ids"]]]
    run = [sys.executable, str(bundle / "run.py"), "--threads", "1", "--max-new-tokens", "40"]
    one = subprocess.run([*run, ASKED[0]], capture_output=True, text=True, check=True)
    assert one.stdout == "yes\n"
    turns = subprocess.run(
        [*run, "--chat"], input="say yes\n/new\nsay no\n", capture_output=True, text=True, check=True
    )
    assert turns.stdout == "yes\nno\n\n"


def test_nothing_is_timed_behind_an_end(shipped: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the benchmark nor by a tune: their generators never choose an end, where an answer has one at once."""
    from deploy.bundle_runner import run
    from deploy.runners import GenaiRunner
    from deploy.tune_worker import generate

    small, bundle = shipped
    prompt = encode_prompt([{"role": "user", "content": ASKED[0]}], load_tokenizer(small))
    chosen: list[int] = []
    info = run.read_json(bundle / "bundle.json")
    for opened in (
        run.Runner(bundle, info, run.Settings(threads=1), endless=True),
        GenaiRunner(bundle, threads=1, endless=True),
    ):
        start = opened.start

        def watched(*arguments: Any, start: Any = start, **more: Any) -> Any:
            generator = start(*arguments, **more)

            class Watched:
                def generate_next_token(self) -> None:
                    generator.generate_next_token()
                    chosen.append(int(generator.get_next_tokens()[0]))

                def append_tokens(self, ids: Any) -> None:
                    generator.append_tokens(ids)

            return Watched()

        monkeypatch.setattr(opened, "start", watched)
        chosen.clear()
        if isinstance(opened, GenaiRunner):
            generate(opened, prompt, 12)
        else:
            run.generate_once(opened, prompt, 12, run.EnergyMeter())
        assert len(chosen) == 12
        assert not {PAD, END} & set(chosen)
