"""Alignment: every byte once, on both sides; equal to a walk; and what differs is counted, never compared."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.encoding import load_tokenizer
from compress.errors import ModelError
from compress.model.distillation.cross_tokenizer.alignment import align
from compress.model.distillation.cross_tokenizer.symbols import END, UNKNOWN, common_tokens, vocabulary
from tests.model.distillation.cross_tokenizer import tokenizers_here as made
from tests.reference import cross_tokenizer as reference

STORIES = Path(__file__).parents[4] / "../shared/models/stories260k"
KINDS = {
    "bytes": lambda: made.byte_level(0),
    "byte-level BPE": lambda: made.byte_level(120),
    "byte-level BPE with a prefix space": lambda: made.byte_level(60, prefix=True),
    "pieces": made.pieces,
    "unigram": made.unigram,
}


@lru_cache
def all_sides():
    """Name -> (tokenizer, what its tokens spell)."""
    tokenizers = {name: make() for name, make in KINDS.items()}
    if (STORIES / "tokenizer.json").is_file():
        tokenizers["stories260k"] = load_tokenizer(STORIES)
    return {name: (one, vocabulary(one, where=name)) for name, one in tokenizers.items()}


@pytest.fixture
def sides():
    return all_sides()


def spelled(side, text):
    tokenizer, words = side
    return [words.symbols[token] for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def joined(tokens):
    return [value for token in tokens for value in token]


def cut(symbols, places):
    """Cut a text into tokens at ``places``."""
    edges = sorted({0, len(symbols), *(place % (len(symbols) + 1) for place in places)})
    return [tuple(symbols[a:b]) for a, b in pairwise(edges)]


TEXT = st.lists(st.integers(97, 101), min_size=1, max_size=40)
PLACES = st.lists(st.integers(0, 40), max_size=25)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXT, PLACES, PLACES)
def test_one_text_cut_in_two_ways_is_covered_once_and_as_by_a_walk(text, ours, theirs):
    teacher, student = cut(text, ours), cut(text, theirs)
    found = align(teacher, student)
    assert [tuple(row) for row in found.chunks.tolist()] == reference.chunks(teacher, student)
    assert found.covered == len(text)
    assert found.teacher_left == found.student_left == (0, 0, 0)
    for side, first in ((teacher, 0), (student, 2)):
        assert joined([token for a, b in found.chunks[:, first : first + 2] for token in side[a:b]]) == text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TEXT, PLACES, TEXT, PLACES)
def test_of_two_texts_only_what_agrees_is_aligned_and_the_rest_is_counted(text, ours, other, theirs):
    middle = list(range(200, 220))
    teacher, student = cut(text + middle + other, ours), cut(other + middle + text, theirs)
    found = align(teacher, student)
    before = (0, 0)
    for a, b, c, d in found.chunks.tolist():
        assert joined(teacher[a:b]) == joined(student[c:d]) != []
        assert a >= before[0]
        assert c >= before[1]
        before = (b, d)
    assert found.covered == sum(len(joined(teacher[a:b])) for a, b, _, _ in found.chunks.tolist())
    assert found.covered + sum(found.teacher_left) == len(joined(teacher))
    assert found.covered + sum(found.student_left) == len(joined(student))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_every_tokenizer_spells_the_text_and_every_pair_is_aligned(text):
    sides = all_sides()
    for name, side in sides.items():
        own = joined(spelled(side, text))
        if UNKNOWN not in own:
            assert bytes(own) in (text.encode(), b" " + text.encode()), name
    for here in sides.values():
        for there in sides.values():
            ours, theirs = spelled(here, text), spelled(there, text)
            found = align(ours, theirs)
            for a, b, c, d in found.chunks.tolist():
                assert bytes(joined(ours[a:b])).strip(b" ") == bytes(joined(theirs[c:d])).strip(b" ")
            if UNKNOWN not in joined(ours) + joined(theirs):
                assert sum(found.teacher_left) == sum(found.student_left) == 0


def test_one_tokenizer_on_both_sides_gives_one_chunk_for_every_token(sides):
    for side in sides.values():
        tokens = spelled(side, made.TEXTS[0])
        chunks = align(tokens, tokens).chunks
        steps = np.arange(len(tokens))
        assert (chunks == np.stack([steps, steps + 1, steps, steps + 1], axis=1)).all()


def words(text):
    return [tuple(text.encode())]


@pytest.mark.parametrize(
    ("teacher", "student", "chunks", "teacher_left", "student_left"),
    [
        # SentencePiece's space before a text is no part of it, be it a token of its own or not
        ([*words(" Hi"), *words("!")], [*words("H"), *words("i"), *words("!")], [(0, 1, 0, 2), (1, 2, 2, 3)], 0, 0),
        ([*words(" "), *words("Hi")], words("Hi"), [(0, 2, 0, 1)], 0, 0),
        # spaces of the text stay
        (words("  Hi"), words(" Hi"), [(0, 1, 0, 1)], 0, 0),
        # one template puts a line feed before the end of the turn
        ([*words("Yes."), (END,)], [*words("Yes."), *words("\n"), (END,)], [(0, 1, 0, 1), (1, 2, 2, 3)], 0, 1),
        # one row was cut short
        ([*words("ab"), *words("cd"), *words("ef")], [*words("abc")], [], 6, 3),
        ([*words("ab"), *words("cd"), *words("ef")], [*words("a"), *words("bcd")], [(0, 2, 0, 2)], 2, 0),
        # a token whose text is lost equals nothing, not even another one
        ([*words("a"), (UNKNOWN,), *words("b")], [*words("a"), (UNKNOWN,), *words("b")], [(0, 1, 0, 1), (2, 3, 2, 3)],
         1, 1),
        ([*words("abcd"), *words("X"), *words("efgh")], [*words("abcd"), *words("YY"), *words("efgh")],
         [(0, 1, 0, 1), (2, 3, 2, 3)], 1, 2),
        ([], words("a"), [], 0, 1),
    ],
)  # fmt: skip
def test_hand_cases(teacher, student, chunks, teacher_left, student_left):
    found = align(teacher, student)
    assert [tuple(row) for row in found.chunks.tolist()] == chunks
    assert (sum(found.teacher_left), sum(found.student_left)) == (teacher_left, student_left)


def test_what_is_left_is_counted_by_its_place():
    found = align([*words("xx"), *words("same text"), *words("yyy")], [*words("z"), *words("same text")])
    assert found.teacher_left == (2, 0, 3)
    assert found.student_left == (1, 0, 0)


def test_ends_bytes_and_boundaries_of_a_vocabulary(sides):
    tokenizer, side = sides["pieces"]
    ids = tokenizer.get_vocab()
    assert side.symbols[ids["<|end|>"]] == (END,)
    assert side.symbols[ids["<|user|>"]] == tuple(b"<|user|>")
    assert side.symbols[ids["<0x41>"]] == (0x41,)
    assert side.symbols[ids["<unk>"]] == (UNKNOWN,)
    assert [side.boundary[ids[name]] for name in ("<|end|>", "<0x0A>", "<0x20>", "<0x41>")] == [True, True, True, False]
    assert all(side.boundary[index] for token, index in ids.items() if token.startswith("\u2581"))
    assert side.end


def test_common_tokens_spell_the_same_and_are_the_usual_ones(sides):
    for here in sides.values():
        for there in sides.values():
            pairs = common_tokens(here[1], there[1])
            assert all(here[1].symbols[a] == there[1].symbols[b] for a, b in pairs)
            assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
            shared = {s for s in here[1].symbols if s} & {s for s in there[1].symbols if s} - {(UNKNOWN,)}
            assert {here[1].symbols[a] for a, _ in pairs} == {s for s in shared if UNKNOWN not in s}
    tokenizer, side = sides["pieces"]
    usual = dict(common_tokens(side, side))
    ids = tokenizer.get_vocab()
    assert ids["a"] in usual
    assert ids["<0x61>"] not in usual, "the byte is spelled by the letter's own token"


def test_tokens_that_do_not_hold_spaces_are_refused():
    with pytest.raises(ModelError, match=r"the tokens of its tokenizer \(WordPiece\) do not say where the spaces"):
        vocabulary(made.word_piece(), where="student")
