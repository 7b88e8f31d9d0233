"""Magpie: the funnel with a made-up author, and a small language model that was really taught to talk."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from compress.answers import Generation
from compress.data.quality.mixes import function_name
from compress.data.quality.params import MislabelParams
from compress.data.quality.stabilization import mislabel
from compress.data.rows import Row, chat_row, read_dropped, read_rows
from compress.data.synthesis.instruction import magpie
from compress.data.synthesis.novelty import Known
from compress.data.synthesis.params import MagpieParams
from compress.encoding import encode_rows, load_tokenizer
from compress.endpoint import Reply
from compress.errors import ModelError, UserError
from compress.teachers import LocalTeacher
from tests.data.stages import make_context
from tests.reference import quality as slow
from tests.tiny import ROOMS, tiny_checkpoint, tiny_conversations, tiny_tokenizer

MAGPIE = "data.synthesis.magpie"
END = 4


# ---------------------------------------------------------------------------------- novelty


@pytest.mark.parametrize("limit", [0.3, 0.6, 0.8, 0.95, 1.0])
def test_known_texts_are_found_exactly_as_by_comparing_with_all(limit: float) -> None:
    draw = random.Random(4)
    words = ["dim", "the", "kitchen", "hall", "lights", "light", "to", "30", "40", "now", "please"]
    texts = list(dict.fromkeys(" ".join(draw.choices(words, k=draw.randrange(1, 7))) for _ in range(500)))
    known = Known(texts[:100], origin="pool", max_similarity=limit)
    near = 0
    for at, text in enumerate(texts[100:], start=100):
        found = known.find(text)
        assert (found is not None) == slow.is_near(text, texts[:at], limit)
        near += found is not None
        known.add(text, origin="drawn")
    assert near < len(texts) - 100
    assert (near > 20) == (limit < 0.9)


def test_equal_texts_are_known_whatever_their_case_and_spaces() -> None:
    known = Known(["Dim the  Lights"], origin="pool", max_similarity=1.0)
    assert known.find("dim THE lights ") == ("equal", "pool")
    assert known.find("dim the lights to 3") is None
    known.add("dim the lights to 3", origin="drawn", near=False)
    assert known.find("dim the lights to 3") == ("equal", "drawn")
    assert known.find("Dim the lights, to 3") is None  # added by its letters only


# ---------------------------------------------------------------------------------- the funnel


@dataclass
class Author:
    """Says the given requests in turn, whatever is asked; answers from a table. `None` stands for an endless one."""

    tokenizer: Any
    says: list[str | None]
    answers: dict[str, tuple[str, float]]
    can: frozenset[str] = frozenset({"generate"})
    stop_ids: tuple[int, ...] = (END,)
    said: int = 0
    seeds: list[int] = field(default_factory=list)

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[Generation]:
        assert all(list(prompt) == [1, 2] for prompt in prompts)
        self.seeds.append(options["seed"])
        assert options["stop_ids"] == [END]
        return [self._request() for _ in prompts]

    def answer(self, conversations: Sequence[Any], **_: Any) -> list[Reply]:
        found = [self.answers[conversation[-1]["content"]] for conversation in conversations]
        return [Reply(text, logprob, text != '{"name":"long"}') for text, logprob in found]

    def _request(self) -> Generation:
        text = self.says[self.said % len(self.says)]
        self.said += 1
        ids = self.tokenizer(text or "and and and", add_special_tokens=False)["input_ids"]
        return Generation(tuple(ids), -1.0, text is not None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return load_tokenizer(folder)


POOL = [chat_row("lock the hall door", '{"name":"lock"}'), chat_row("play some jazz", '{"name":"song"}')]
TABLE = {
    "dim the attic": ('{"name":"dim"}', -0.01),
    "open the gate": ('{"name":"open"}', -0.02),
    "sing a song for me": ('{"name":"song"}', -0.03),
    "what is love": ("baby don't hurt me", -0.01),
    "how are things": ('["fine"]', -0.01),
    "mumble mumble": ('{"name":"dim"}', -0.9),
    "go on for ever": ('{"name":"long"}', -0.01),
    "say nothing": ("", -0.01),
}
SAYS = [
    "lock the hall door", "Play some jazz!", "dim the attic", "open the gate", "dim  the attic", "dim the attic!",
    None, "<|user|>x", "a", "what is love", "how are things", "mumble mumble", "go on for ever", "say nothing",
]  # fmt: skip


def test_every_draw_is_kept_or_counted(tmp_path: Path, tokenizer: Any) -> None:
    author = Author(tokenizer, SAYS, {**TABLE, "dim the attic!": TABLE["dim the attic"]})
    ctx = make_context(tmp_path, POOL, name=MAGPIE, teacher=author)
    params = MagpieParams(rows=50, draws=len(SAYS), round_size=8, answer_format="json")
    result = magpie(params, ctx)
    rows = read_rows(ctx.out)
    assert rows[:2] == POOL
    assert [(row.user, row.answer, row.source) for row in rows[2:]] == [
        ("dim the attic", '{"name":"dim"}', "magpie"),
        ("open the gate", '{"name":"open"}', "magpie"),
    ]
    assert rows[2].scores(MAGPIE) == {"logprob": -0.01}
    assert rows[2].label is None
    assert result.metrics["rejected"] == {
        "answer does not end": 1,
        "answer does not parse": 2,
        "answer is empty": 1,
        "answer is not confident": 1,
        "drawn before": 1,
        "in the pool": 1,
        "near duplicate of one drawn before": 1,
        "near duplicate of one in the pool": 1,
        "request does not end": 1,
        "request too short": 1,
        "special token in the request": 1,
    }
    assert result.metrics["drawn"] == len(SAYS) == result.metrics["added"] + sum(result.metrics["rejected"].values())
    assert (result.metrics["rows_in"], result.metrics["rows_out"]) == (2, 4)
    assert result.metrics["functions"] == {"dim": 1, "open": 1}
    assert result.notes[0].startswith("2 of 50 rows after 14 draws (most often answer does not parse: 2")
    examples = [json.loads(line) for line in (ctx.out / "rejected.jsonl").read_text().splitlines()]
    assert len(examples) == 12
    assert {e["reason"] for e in examples} == set(result.metrics["rejected"])
    assert len(set(author.seeds)) == 2, "every round has a seed of its own"


def test_answers_in_free_words_need_not_parse(tmp_path: Path, tokenizer: Any) -> None:
    author = Author(tokenizer, ["what is love", "how are things"], TABLE)
    ctx = make_context(tmp_path, POOL, name=MAGPIE, teacher=author)
    assert magpie(MagpieParams(rows=2), ctx).metrics["added"] == 2


def test_it_stops_when_all_rows_are_there(tmp_path: Path, tokenizer: Any) -> None:
    author = Author(tokenizer, ["dim the attic", "open the gate", "sing a song for me"], TABLE)
    ctx = make_context(tmp_path, POOL, name=MAGPIE, teacher=author)
    result = magpie(MagpieParams(rows=2, round_size=3, answer_format="json"), ctx)
    assert result.metrics["added"] == 2
    assert result.metrics["rejected"] == {"not needed any more": 1}
    assert author.said == 3
    assert result.notes == []


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        ({"mix": "uniform"}, {"lock": 2, "song": 2}),
        ({"mix": "pool"}, {"lock": 1, "song": 3}),
        ({"mix": "weights", "weights": {"dim": 1.0, "song": 1.0}}, {"dim": 2, "song": 2}),
        ({}, {"lock": 4}),
    ],
)
def test_the_wanted_mix_is_kept(tmp_path: Path, tokenizer: Any, mix: dict[str, Any], expected: dict[str, int]) -> None:
    says = [f"{name} number {k}" for name in ("lock", "dim", "song") for k in range(5)]
    author = Author(tokenizer, says, {say: (json.dumps({"name": say.split()[0]}), -0.01) for say in says})
    pool = [chat_row("lock the hall door", '{"name":"lock"}', label="lock")]
    pool += [chat_row(f"play {word}", '{"name":"song"}', label="song") for word in ("jazz", "blues", "a waltz")]
    ctx = make_context(tmp_path, pool, name=MAGPIE, teacher=author)
    result = magpie(MagpieParams(rows=4, draws=15, answer_format="json", **mix), ctx)
    new = read_rows(ctx.out)[4:]
    assert Counter(function_name(row.answer) for row in new) == expected == result.metrics["functions"]
    assert all(row.label == function_name(row.answer) for row in new), "the pool is labelled, so the new rows are"


def test_no_function_in_the_pool_to_follow(tmp_path: Path, tokenizer: Any) -> None:
    ctx = make_context(tmp_path, [chat_row("hi", "hello")], name=MAGPIE, teacher=Author(tokenizer, ["x"], {}))
    with pytest.raises(UserError, match="mix: pool, but no answer of the pool names a function"):
        magpie(MagpieParams(mix="pool", answer_format="json"), ctx)


def test_magpie_needs_a_teacher_that_continues_and_a_template_with_ends(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path / "t")
    ctx = make_context(tmp_path, POOL, name=MAGPIE)
    with pytest.raises(UserError, match="needs a teacher"):
        magpie(MagpieParams(), ctx)
    with pytest.raises(UserError, match="cannot continue a bare template"):
        magpie(MagpieParams(), replace(ctx, teacher=Author(tokenizer, [], {}, can=frozenset({"answer"}))))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ModelError, match="no special token follows the user's message"):
        magpie(MagpieParams(), replace(ctx, teacher=Author(tokenizer, [], {})))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": "weights", "answer_format": "json"}, "weights and mix: weights go together"),
        ({"mix": "uniform"}, "needs answer_format: json"),
        ({"temperature": 0.0}, "greater than 0"),
    ],
)
def test_parameters_that_contradict(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MagpieParams(**settings)


# ---------------------------------------------------------------------------------- a model that was taught


STEPS, BATCH = 400, 16


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> LocalTeacher:
    """A Llama of 150 thousand parameters that has seen the tiny requests for some seconds, user turns included."""
    import torch

    from compress.model.checkpoint import load_model, save_model

    folder = tiny_checkpoint(tmp_path_factory.mktemp("untaught"), hidden=64, ffn=192, scale=0.05)
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    talks = tiny_conversations(4000, seed=9)
    rows = encode_rows([chat_row(t[0]["content"], t[1]["content"]) for t in talks], tokenizer, max_tokens=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=STEPS, pct_start=0.1)
    draw = random.Random(1)
    model.train()
    for _ in range(STEPS):
        batch = draw.sample(rows, BATCH)
        width = max(len(row.ids) for row in batch)
        ids = torch.tensor([list(row.ids) + [0] * (width - len(row.ids)) for row in batch])
        model(input_ids=ids, labels=ids.masked_fill(ids == 0, -100)).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    out = tmp_path_factory.mktemp("taught")
    save_model(model.eval(), out, tokenizer_from=folder)
    return LocalTeacher(out, threads=1)


GRAMMAR = re.compile(
    rf"dim the (?P<dim>{'|'.join(ROOMS)}) lights to (?P<level>\d+)|set a timer for (?P<minutes>\d+) minutes"
    rf"|lock the (?P<lock>{'|'.join(ROOMS)}) door|who won the cup in the (?:{'|'.join(ROOMS)})"
)


def truth(request: str) -> dict[str, Any] | None:
    """The call that a request of the grammar means; None when it is not of the grammar."""
    found = GRAMMAR.fullmatch(request)
    if found is None:
        return None
    if found["dim"]:
        return {"name": "set_light", "args": {"room": found["dim"], "level": int(found["level"])}}
    if found["minutes"]:
        return {"name": "set_timer", "args": {"minutes": int(found["minutes"])}}
    return {"name": "lock", "args": {"room": found["lock"]}} if found["lock"] else {"name": "none"}


def pool_of(count: int, *, seed: int) -> list[Row]:
    return [chat_row(t[0]["content"], t[1]["content"]) for t in tiny_conversations(count, seed=seed)]


@pytest.mark.timeout(600)
def test_invented_requests_are_of_the_grammar_and_rightly_answered(tmp_path: Path, taught: LocalTeacher) -> None:
    ctx = make_context(tmp_path, pool_of(30, seed=3), name=MAGPIE, teacher=taught)
    result = magpie(MagpieParams(rows=60, answer_format="json", min_logprob=-0.05), ctx)
    new = read_rows(ctx.out)[30:]
    assert len(new) == 60
    calls = [truth(row.user) for row in new]
    assert sum(call is not None for call in calls) >= 57, "at least 95 % are requests of the grammar"
    assert sum(call == json.loads(row.answer) for call, row in zip(calls, new, strict=True)) >= 55
    assert len({row.user for row in new} | {row.user for row in pool_of(30, seed=3)}) == 60 + len(
        {row.user for row in pool_of(30, seed=3)}
    )
    assert result.metrics["drawn"] < 600


@pytest.mark.timeout(600)
def test_invented_requests_follow_what_was_taught(taught: LocalTeacher) -> None:
    """Chi-square of the four kinds of request, each a quarter of what was taught; 3 degrees of freedom."""
    drawn = taught.generate([[1, 2]] * 400, max_new_tokens=32, temperature=1.0, stop_ids=[END], seed=2, batch_size=200)
    kinds = Counter()
    for generation in drawn:
        call = truth(taught.tokenizer.decode(generation.ids))
        if call is not None:
            kinds[call["name"]] += 1
    assert sum(kinds.values()) >= 0.9 * 400
    expected = sum(kinds.values()) / 4
    chi = sum((kinds[name] - expected) ** 2 / expected for name in ("set_light", "set_timer", "lock", "none"))
    # the model's own error comes on top of sampling: 16.3 is the 0.1 % point of sampling alone
    assert chi < 2 * 16.3, dict(kinds)


@pytest.mark.timeout(600)
def test_a_killed_synthesis_gives_the_same_rows(tmp_path: Path, taught: LocalTeacher) -> None:
    params = MagpieParams(rows=25, round_size=20, answer_format="json", min_logprob=-0.05)
    pool = pool_of(10, seed=3)
    whole = make_context(tmp_path, pool, name=MAGPIE, teacher=taught)
    magpie(params, whole)

    class Killed(LocalTeacher):
        left = 3  # calls until the blow: in the middle of the second round

        def generate(self, *args: Any, **options: Any) -> list[Generation]:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().generate(*args, **options)

    broken = make_context(tmp_path, pool, name=MAGPIE, teacher=Killed(taught.folder, threads=1), out="broken")
    with pytest.raises(KeyboardInterrupt):
        magpie(params, broken)
    assert len(list(broken.work.iterdir())) == 1
    magpie(params, replace(broken, teacher=taught))
    for name in ("rows.parquet", "dropped.parquet", "rejected.jsonl"):
        assert (broken.out / name).read_bytes() == (whole.out / name).read_bytes()


@pytest.mark.timeout(600)
def test_the_batch_size_changes_nothing(tmp_path: Path, taught: LocalTeacher) -> None:
    found = []
    for size in (5, 64):
        ctx = make_context(tmp_path, pool_of(10, seed=3), name=MAGPIE, teacher=taught, out=f"out{size}")
        magpie(MagpieParams(rows=20, batch_size=size, answer_format="json", min_logprob=-0.05), ctx)
        found.append([(row.user, row.answer) for row in read_rows(ctx.out)])
    assert found[0] == found[1]


@pytest.mark.timeout(600)
def test_a_taught_teacher_finds_planted_wrong_answers(tmp_path: Path, taught: LocalTeacher) -> None:
    draw = random.Random(6)
    rows = list({row.user: row for row in pool_of(300, seed=5)}.values())
    wrong = {row.user for row in rows if draw.random() < 0.2}
    told = [
        chat_row(row.user, draw.choice([o.answer for o in rows if o.answer != row.answer]))
        if row.user in wrong
        else row
        for row in rows
    ]
    ctx = make_context(tmp_path, told, name="data.quality.mislabel", teacher=taught)
    mislabel(MislabelParams(), ctx)
    lost = {d.row.user for d in read_dropped(ctx.out)}
    precision, recall = len(lost & wrong) / len(lost), len(lost & wrong) / len(wrong)
    assert precision >= 0.95
    assert recall >= 0.95
    entropies = [-row.scores("data.quality.mislabel")["mean_logprob"] for row in read_rows(ctx.out)]
    assert math.fsum(entropies) / len(entropies) < 0.1
