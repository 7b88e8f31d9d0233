"""Rows to tokens: what is a target, what is asked, what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress.data.rows import chat_row, make_row, write_rows
from compress.encoding import (
    TokenRow,
    bare_user_prefix,
    decode,
    encode_prompt,
    encode_rows,
    encode_text_prompt,
    end_of_turn,
    ids_of_source,
    load_tokenizer,
    stop_ids,
    token_rows,
)
from compress.errors import DataError, ModelError
from tests.tiny import ASSISTANT, BOS, END, USER, tiny_conversations, tiny_tokenizer

STORIES = Path(__file__).parents[1] / "../shared/models/stories260k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(path)
    return path


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)  # anew for each test: some change the template


def chats(count: int = 20) -> list[Any]:
    return [chat_row(talk[0]["content"], talk[1]["content"]) for talk in tiny_conversations(count)]


def test_targets_are_the_answer_and_its_end_of_turn(tokenizer: Any) -> None:
    rows = chats()
    for row, coded in zip(rows, encode_rows(rows, tokenizer, max_tokens=200), strict=True):
        assert coded.id == row.id
        targets = [token for token, wanted in zip(coded.ids, coded.answer, strict=True) if wanted]
        assert targets[-1] == END
        assert decode(targets, tokenizer) == row.answer
        assert coded.targets == len(targets)


def test_the_prompt_of_a_row_is_what_a_model_is_asked_with(tokenizer: Any) -> None:
    rows = chats()
    for row, coded in zip(rows, encode_rows(rows, tokenizer, max_tokens=200), strict=True):
        assert list(coded.prompt) == encode_prompt(row.prompt, tokenizer)
        assert coded.prompt[:2] == (BOS, USER)
        assert coded.prompt[-2:] == (END, ASSISTANT)


def test_prefix_and_ends_of_the_template(tokenizer: Any) -> None:
    assert bare_user_prefix(tokenizer) == [BOS, USER]
    assert end_of_turn(tokenizer, "user") == END
    assert end_of_turn(tokenizer, "assistant") == END
    assert stop_ids(tokenizer) == (END,)


def test_only_the_last_of_several_answers_is_a_target(tokenizer: Any) -> None:
    turns = [*tiny_conversations(1, seed=1)[0], *tiny_conversations(1, seed=2)[0]]
    (coded,) = encode_rows([make_row(messages=turns)], tokenizer, max_tokens=200)
    start = coded.answer.index(1)
    assert set(coded.answer[start:]) == {1}
    assert decode(coded.ids[start:], tokenizer) == turns[-1]["content"]


def test_text_rows_get_bos_and_predict_all_the_rest(tokenizer: Any) -> None:
    (coded,) = encode_rows([make_row(text="dim the lights")], tokenizer, max_tokens=200)
    assert coded.ids[0] == BOS
    assert coded.answer == (0,) + (1,) * (len(coded.ids) - 1)
    assert END not in coded.ids
    assert decode(coded.ids, tokenizer) == "dim the lights"
    assert encode_text_prompt("dim the lights", tokenizer) == list(coded.ids)


def test_mixed_rows_keep_their_order(tokenizer: Any) -> None:
    rows = [make_row(text="dim"), *chats(2), make_row(text="lock")]
    assert [coded.id for coded in encode_rows(rows, tokenizer, max_tokens=200)] == [row.id for row in rows]


def test_a_tokenizer_without_template_and_with_its_own_bos() -> None:
    if not STORIES.exists():
        pytest.skip("the stories260k model is not on this machine")
    stories = load_tokenizer(STORIES)
    (coded,) = encode_rows([make_row(text="Once upon a time")], stories, max_tokens=64)
    assert coded.ids == (1, 403, 407, 261, 378)  # BOS is 1, once: the tokenizer adds it by itself
    assert stop_ids(stories) == (1, 2)  # as its generation_config.json says: a story ends where the next begins
    with pytest.raises(ModelError, match="has no chat template, but the rows are chats"):
        encode_rows(chats(1), stories, max_tokens=64)
    with pytest.raises(ModelError, match="has no chat template"):
        bare_user_prefix(stories)


def test_a_row_that_is_too_long_is_named(tokenizer: Any) -> None:
    rows = [*chats(3), chat_row("dim " * 60, "{}")]
    with pytest.raises(DataError, match=rf"row {rows[3].id}: has \d+ tokens; expected at most 64 \(max_tokens\)"):
        encode_rows(rows, tokenizer, max_tokens=64)
    cut = encode_rows(rows, tokenizer, max_tokens=64, truncate=True)
    assert [len(coded.ids) for coded in cut[:3]] == [
        len(c.ids) for c in encode_rows(rows[:3], tokenizer, max_tokens=64)
    ]
    assert len(cut[3].ids) == len(cut[3].answer) == 64
    assert cut[3].targets == 0
    assert cut[3].prompt == cut[3].ids


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (make_row(messages=[{"role": "user", "content": "hi"}]), "the last message is not the assistant's"),
        (make_row(text=""), "gives no token to predict"),
    ],
)
def test_rows_without_a_target_are_refused(tokenizer: Any, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_rows([row], tokenizer, max_tokens=64)


def test_a_template_whose_answer_does_not_follow_its_prompt_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>Answer: {% endif %}"
    )
    with pytest.raises(ModelError, match=r"does not begin with its prompt.*Answer"):
        encode_rows(chats(1), tokenizer, max_tokens=64)


def test_a_template_that_refuses_the_messages_is_an_error_about_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"row [0-9a-f]{16}: the chat template refuses.*roles must alternate"):
        encode_rows(chats(1), tokenizer, max_tokens=64)


def test_a_line_feed_behind_the_end_of_turn_is_no_target(tokenizer: Any) -> None:
    plain = encode_rows(chats(5), tokenizer, max_tokens=64)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|end|>{{ '\\n' }}")
    for before, after in zip(plain, encode_rows(chats(5), tokenizer, max_tokens=64), strict=True):
        assert after.ids[-1] == END
        assert after.targets == before.targets


def test_a_token_across_prompt_and_answer_is_parted(tokenizer: Any) -> None:
    # the prompt ends in "lo", the answer begins with "ck": the tokenizer would make one token of them
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>{% else %}"
        "lo{{ m['content'] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}lo{% endif %}"
    )
    row = chat_row("x", "ck the door")
    together = tokenizer("lock the door", add_special_tokens=False)["input_ids"]
    apart = tokenizer("lo", add_special_tokens=False)["input_ids"]
    assert together[: len(apart)] != apart, "the case needs a merge over the border"
    (coded,) = encode_rows([row], tokenizer, max_tokens=64)
    assert list(coded.prompt) == encode_prompt(row.prompt, tokenizer)
    assert decode(coded.ids[len(coded.prompt) :], tokenizer) == "ck the door"


def test_a_template_without_end_of_turn(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert end_of_turn(tokenizer, "user") is None
    assert stop_ids(tokenizer) == (END,)


def test_token_rows_reads_an_artifact_and_leaves_out_rows_without_target(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*chats(3), chat_row("dim " * 60, "{}")]
    write_rows(tmp_path, rows)
    found = token_rows(tmp_path, tokenizer, max_tokens=64, truncate=True)
    assert found == encode_rows(rows[:3], tokenizer, max_tokens=64)
    assert "1 of 4 rows have no answer within 64 tokens" in caplog.text
    with pytest.raises(DataError, match="no row with an answer within 5 tokens"):
        token_rows(tmp_path, tokenizer, max_tokens=5, truncate=True)


def test_rows_are_found_by_their_source(tmp_path: Path) -> None:
    rows = [replace(row, source="own" if index % 2 else "pool") for index, row in enumerate(chats(6))]
    write_rows(tmp_path, rows)
    assert ids_of_source(tmp_path, "own") == {row.id for row in rows[1::2]}
    with pytest.raises(DataError, match=r"no row of source 'mine'; expected one of its sources: own, pool"):
        ids_of_source(tmp_path, "mine")


@pytest.mark.parametrize("content", [None, "{ cut", "{}"])
def test_a_missing_or_damaged_tokenizer_is_a_model_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"no tokenizer\.json|cannot be read|no model\.vocab"):
        load_tokenizer(tmp_path)


def test_token_row_properties() -> None:
    row = TokenRow("x", (1, 2, 3, 4), (0, 0, 1, 1))
    assert row.prompt == (1, 2)
    assert row.targets == 2


@pytest.mark.parametrize("module", ["compress.encoding", "compress.teachers", "compress.data.quality.params"])
def test_importing_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_learning_all_tokens_keeps_the_row_and_makes_every_token_but_the_first_a_target():
    row = TokenRow("a", (1, 5, 6, 7), (0, 0, 1, 1))
    assert row.learning("answer") is row
    assert row.learning("all") == TokenRow("a", (1, 5, 6, 7), (0, 1, 1, 1))
    assert TokenRow("b", (), ()).learning("all").answer == ()
