"""The teacher's tokens in the student's: sums by hand, the exact distribution over bytes, the stage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from compress.encoding import load_tokenizer
from compress.errors import DataError, ModelError
from compress.model.checkpoint import load_model
from compress.model.distillation.cross_tokenizer import stage as module
from compress.model.distillation.cross_tokenizer.pairs import Pairs, read_pairs
from compress.model.distillation.cross_tokenizer.params import CrossTokenizerParams
from compress.model.distillation.cross_tokenizer.spelling import Places, SpelledTeacher, Spelling, next_tokens
from compress.model.distillation.cross_tokenizer.stage import distill
from compress.model.distillation.cross_tokenizer.symbols import END, UNKNOWN, Vocabulary, vocabulary
from compress.model.distillation.packing import RowTable
from compress.model.distillation.targets import OnlineTargets
from tests.model.distillation.cross_tokenizer import tokenizers_here as made
from tests.model.distillation.cross_tokenizer.test_stage import place, ready, scratch  # noqa: F401 - fixtures


def words(*spelled):
    """A vocabulary of these tokens."""
    symbols = tuple(word if isinstance(word, tuple) else tuple(word.encode()) for word in spelled)
    flags = (False,) * len(symbols)
    return Vocabulary(symbols, flags, (True,) * len(symbols), flags)


TEACHER = words("a", "b", "ab", "abc", "ba", (END,), (UNKNOWN,))
BYTES = words("c", "b", "a", (END,))
SAID = torch.tensor([[0.1, 0.2, 0.3, 0.15, 0.05, 0.1, 0.1]], dtype=torch.float64).log()


def told(spelling, spelled, *, said=SAID, vocab=4):
    """What the student's next token may be behind ``spelled``."""
    number = spelling._numbers[tuple(spelled.encode())]
    return next_tokens(said, torch.tensor([0]), torch.tensor([number]), spelling.pieces, vocab)[0].tolist()


def test_sums_by_hand():
    spelling = Spelling(TEACHER, BYTES)
    # c, b, a, end: the unknown token's 0.1 is left out
    assert told(spelling, "") == pytest.approx([0, 0.25 / 0.9, 0.55 / 0.9, 0.1 / 0.9])
    assert told(spelling, "a") == pytest.approx([0, 1, 0, 0])
    assert told(spelling, "ab") == pytest.approx([1, 0, 0, 0])
    assert told(spelling, "b") == pytest.approx([0, 0, 1, 0])


def test_the_longest_token_that_fits_is_taken():
    spelling = Spelling(TEACHER, words("c", "b", "a", "ab", (END,)))
    found = told(spelling, "", vocab=5)
    assert found == pytest.approx([0, 0.25 / 0.9, 0.1 / 0.9, 0.45 / 0.9, 0.1 / 0.9])
    assert spelling.piece(3, 0, 3) == 0  # abc begins with ab,
    assert spelling.piece(3, 0, 2) == -1  # not with a


def test_over_texts_the_mean_target_is_the_exact_distribution_over_bytes():
    # tokens drawn one by one, whatever went before: the exact next byte behind a text sums over all ways to cut it
    mass = dict(zip([*TEACHER.symbols[:5]], SAID[0, :5].exp().tolist(), strict=True))
    total = sum(mass.values())
    mass = {word: value / total for word, value in mass.items()}
    spelling = Spelling(words("a", "b", "ab", "abc", "ba"), words("c", "b", "a"))
    said = torch.tensor([list(mass.values())], dtype=torch.float64).log()

    def texts(length):
        """Every sequence of tokens with at least ``length`` bytes, and its probability."""
        stack = [((), 1.0)]
        while stack:
            tokens, weight = stack.pop()
            if sum(map(len, tokens)) >= length:
                yield tokens, weight
                continue
            stack += [((*tokens, word), weight * value) for word, value in mass.items()]

    seen: dict[tuple[int, ...], np.ndarray] = {}
    means: dict[tuple[int, ...], np.ndarray] = {}
    letters = [ord("c"), ord("b"), ord("a")]
    for tokens, weight in texts(4):
        text = tuple(itertools.chain.from_iterable(tokens))
        edges = np.cumsum([0, *map(len, tokens)])
        for at in range(4):
            start = edges[np.searchsorted(edges, at, side="right") - 1]
            target = told(spelling, bytes(text[start:at]).decode(), said=said, vocab=3)
            means[text[:at]] = means.get(text[:at], np.zeros(3)) + weight * np.array(target)
            real = np.eye(3)[letters.index(text[at])]
            seen[text[:at]] = seen.get(text[:at], np.zeros(3)) + weight * real
    assert len(seen) > 10
    for prefix, counts in seen.items():
        np.testing.assert_allclose(means[prefix], counts, atol=1e-12)


def rows_of(folder, ours, theirs):
    """Both sides' rows, vocabularies and pairs."""
    rows = read_pairs(folder, ours, theirs, max_tokens=512, teacher_max_tokens=512, truncate=True)
    sides = vocabulary(ours, where="t"), vocabulary(theirs, where="s")
    return rows, sides, Pairs(*rows, sides, where="w")


def spelled_teacher(place, theirs):  # noqa: F811
    """A teacher of the student's tokens, the student's table, and the places."""
    model, ours = load_model(place / "teacher"), load_tokenizer(place / "teacher")
    rows, sides, pairs = rows_of(place / "data", ours, theirs)
    places = Places(*rows, pairs, Spelling(*sides))
    tables = [RowTable(one, vocab=side.size) for one, side in zip(rows, sides, strict=True)]
    online = OnlineTargets(model, vocab=sides[0].size)
    return SpelledTeacher(online, tables[0], places, vocab=sides[1].size), tables[1], places


def test_equal_tokenizers_give_the_teachers_own_word(place):  # noqa: F811
    tokenizer = load_tokenizer(place / "teacher")
    teacher, table, places = spelled_teacher(place, tokenizer)
    assert len(places) == int(table.counts.sum())
    assert not places.places[:, 2].any()
    batch = table.batch(np.arange(5))
    plain = teacher.online(batch).narrow(0, len(batch.keep)).logprobs.exp()
    known = torch.tensor([UNKNOWN not in spelled for spelled in vocabulary(tokenizer, where="w").symbols])
    plain = plain * known
    found = teacher(batch).narrow(0, len(batch.keep)).logprobs.exp()
    torch.testing.assert_close(found, plain / plain.sum(dim=1, keepdim=True), rtol=1e-4, atol=1e-7)


def test_targets_of_a_student_of_bytes_are_those_of_a_slow_reference(place, monkeypatch):  # noqa: F811
    monkeypatch.setattr("compress.model.distillation.cross_tokenizer.spelling.CHUNK_ELEMENTS", 1500)  # slices of a few
    theirs = made.byte_level(0)
    teacher, table, places = spelled_teacher(place, theirs)
    assert len(places) > 0.95 * int(table.counts.sum())
    batch = table.batch(np.array([3, 0, 7]))
    targets = teacher(batch)
    symbols = vocabulary(load_tokenizer(place / "teacher"), where="t").symbols
    letters = {spelled: index for index, spelled in enumerate(vocabulary(theirs, where="s").symbols)}
    said = targets.states.narrow(0, len(targets.asked.slots)).logprobs.exp()
    names = {number: piece for piece, number in Spelling(*(vocabulary(t, where="w") for t in (
        load_tokenizer(place / "teacher"), theirs)))._numbers.items()}  # fmt: skip
    found = targets.narrow(10, len(batch.keep) - 7).logprobs.exp()
    checked = 0
    for target, owner, piece in zip(*(part.tolist() for part in (
        targets.asked.student, targets.asked.owner, targets.asked.piece)), strict=True):  # fmt: skip
        if not 10 <= target < len(batch.keep) - 7:
            continue
        spelled = names[piece]
        sums = np.zeros(len(letters))
        for token, word in enumerate(symbols):
            if len(word) > len(spelled) and word[: len(spelled)] == spelled and UNKNOWN not in word:
                sums[letters[word[len(spelled) : len(spelled) + 1]]] += float(said[owner, token])
        np.testing.assert_allclose(found[target - 10].numpy(), sums / sums.sum(), rtol=2e-4, atol=1e-6)
        assert found[target - 10, batch.labels[target]] > 0
        checked += 1
    assert checked > 40
    other = torch.ones(len(found), dtype=torch.bool)
    inside = targets.asked.student[(targets.asked.student >= 10) & (targets.asked.student < len(batch.keep) - 7)]
    other[inside - 10] = False  # where the teacher cannot be spelled its word is the label
    assert found[other].argmax(dim=1).tolist() == batch.labels[10 : len(batch.keep) - 7][other].tolist()


def test_a_token_that_reaches_beyond_the_teachers_is_left_out():
    spelling = Spelling(words("ab", "a", "b"), words("aba", "a", "b", "ab"))
    assert spelling.walk([0, 1], [0]) == []
    assert spelling.walk([0, 1], [3, 1]) == [(0, 0, 0), (1, 1, 0)]
    assert spelling.walk([0, 1], [1, 2, 1]) == [(1, 0, spelling._numbers[tuple(b"a")]), (2, 1, 0)]  # ab fits better


def test_a_space_on_one_side_alone_is_a_piece_that_stands_already():
    spelling = Spelling(words(" ab", "b"), words("a", "b", " "))
    assert spelling.walk([0, 1], [0, 1, 1]) == [
        (0, 0, spelling._numbers[tuple(b" ")]), (1, 0, spelling._numbers[tuple(b" a")]), (2, 1, 0)
    ]  # fmt: skip
    assert spelling.walk([1, 1], [2, 1, 1]) == [(1, 0, 0), (2, 1, 0)]  # a space of the student's own has no teacher


@pytest.mark.parametrize("given", [{}, {"targets": "online"}, {"accumulate": 2}])
def test_the_stage_learns(ready, scratch, given):  # noqa: F811
    ctx = ready()
    result = distill(CrossTokenizerParams(**scratch, loss="spelled", **given), ctx)
    assert result.metrics["validation_loss"] < result.metrics["start_loss"]
    assert result.metrics["spelled_share"] > 0.95
    assert ("target_bytes_per_token" in result.metrics) == ("targets" not in given)


def test_a_cache_of_all_entries_is_the_running_teacher(ready, scratch):  # noqa: F811
    losses = []
    for name, more in (("online", {"targets": "online"}), ("cache", {"top_k": 259}), ("few", {"top_k": 2})):
        params = CrossTokenizerParams(**scratch, loss="spelled", kd_weight=1.0, **more)
        losses.append(distill(params, ready(name)).metrics["validation_cross_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[2] != pytest.approx(losses[0], rel=2e-3)


def test_several_processes_give_the_loss_of_one(ready, scratch):  # noqa: F811
    params = CrossTokenizerParams(**scratch, loss="spelled", precision="fp32")
    one, two = (distill(params, ready(str(count), processes=count)) for count in (1, 2))
    assert two.metrics["validation_loss"] == pytest.approx(one.metrics["validation_loss"], rel=1e-5)


@pytest.mark.parametrize("targets", ["online", "cache"])
def test_a_teacher_that_gives_nan_is_not_taken_for_the_labels(ready, scratch, monkeypatch, targets):  # noqa: F811
    def broken(*given, **more):
        model = load_model(*given, **more)
        with torch.no_grad():
            model.get_output_embeddings().weight[5] = torch.nan
        return model

    monkeypatch.setattr(module, "load_model", broken)
    with pytest.raises(ModelError, match="its log-probabilities are not finite"):
        distill(CrossTokenizerParams(**scratch, loss="spelled", targets=targets), ready())


def test_a_student_of_longer_tokens_is_told_of_its_labels(ready, scratch, place):  # noqa: F811
    made.save(made.byte_level(300), place / "long")
    result = distill(CrossTokenizerParams(**(scratch | {"tokenizer": str(place / "long")})), ready())
    told = any("the teacher can be spelled at" in note for note in result.notes)
    assert told == (result.metrics["spelled_share"] < 0.9)
    low = module._notes({"rows_without_chunks": 0, "aligned_share": 1.0, "spelled_share": 0.4})
    assert low == [note for note in low if "spelled at 40%" in note]
    assert len(low) == 1


def test_a_teacher_whose_tokens_hold_none_of_the_students_is_refused(ready, scratch, monkeypatch):  # noqa: F811
    monkeypatch.setattr(module.Spelling, "walk", lambda *_: [])
    with pytest.raises(DataError, match="no token of the student's rows lies inside of one of the teacher's"):
        distill(CrossTokenizerParams(**scratch, loss="spelled"), ready())
