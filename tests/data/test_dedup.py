"""Duplicates: MinHash and bands against brute force, planted noise found, slot values never confused."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.data.rows import Row, chat_row, make_row, read_dropped, read_rows
from compress.data.selection.near_duplicates import (
    Rules,
    band_hashes,
    candidate_probability,
    choose_bands,
    exact_key,
    find_duplicates,
    jaccard,
    normal_text,
    shingles,
    signatures,
)
from compress.data.selection.params import DedupParams
from compress.data.selection.static import dedup
from compress.errors import DataError
from tests.data.stages import make_context
from tests.reference import selection as reference

WORDS = ["".join(random.Random(i).choices(string.ascii_lowercase, k=4 + i % 5)) for i in range(400)]


def sentence(rng: random.Random, words: int) -> list[str]:
    return rng.choices(WORDS, k=words)


def pair_of_similarity(rng: random.Random, size: int, similarity: float) -> tuple[set[str], set[str]]:
    """Two sets of ``size`` tokens whose Jaccard similarity is as near to the wish as the size allows."""
    shared = round(2 * size * similarity / (1 + similarity))
    tokens = [str(rng.getrandbits(60)) for _ in range(2 * size - shared)]
    return set(tokens[:size]), set(tokens[size - shared :])


@given(a=st.sets(st.text(max_size=2)), b=st.sets(st.text(max_size=2)))
def test_jaccard_equals_reference(a: set[str], b: set[str]) -> None:
    assert jaccard(frozenset(a), frozenset(b)) == reference.jaccard(a, b)


@given(words=st.lists(st.text(string.ascii_lowercase, min_size=1, max_size=5), min_size=1), size=st.integers(1, 6))
def test_char_shingles_equal_reference(words: list[str], size: int) -> None:
    text = " ".join(words)
    assert shingles(text, unit="chars", size=size) == reference.char_shingles(text, size)


def test_shingles_of_words_and_of_odd_texts() -> None:
    assert shingles("A b, c! d", unit="words", size=3) == {"a b c", "b c d"}
    assert shingles("one two", unit="words", size=5) == {"one two"}
    assert shingles("日本語", unit="words", size=2) == {"日 本", "本 語"}
    assert shingles("?!", unit="chars", size=3) == {" ?!", "?! "}
    assert shingles("", unit="chars", size=5) == {"  "}


def test_signature_estimates_jaccard() -> None:
    rng = random.Random(1)
    for similarity in (0.0, 0.3, 0.6, 0.9, 1.0):
        a, b = pair_of_similarity(rng, 300, similarity)
        left, right = signatures([a, b], num_perm=1024, seed=3)
        assert np.mean(left == right) == pytest.approx(reference.jaccard(a, b), abs=0.06)


@pytest.mark.parametrize(("bands", "rows"), [(21, 6), (16, 8), (64, 2)])
def test_bands_follow_the_s_curve(bands: int, rows: int) -> None:
    rng = random.Random(2)
    for similarity in (0.3, 0.5, 0.7, 0.8, 0.9):
        pairs = [pair_of_similarity(rng, 40, similarity) for _ in range(400)]
        truth = reference.jaccard(*pairs[0])
        digests = signatures([s for pair in pairs for s in pair], num_perm=bands * rows, seed=5)
        keys = band_hashes(digests, np.zeros(len(digests), dtype=np.uint64), bands=bands, rows=rows)
        met = np.mean((keys[0::2] == keys[1::2]).any(axis=1))
        expected = candidate_probability(truth, bands, rows)
        assert met == pytest.approx(expected, abs=4 * np.sqrt(0.25 / len(pairs))), (similarity, truth)


def test_band_keys_part_groups_and_bands() -> None:
    digests = np.repeat(signatures([{"a", "b"}], num_perm=16, seed=0), 2, axis=0)
    keys = band_hashes(digests, np.array([1, 2], dtype=np.uint64), bands=4, rows=4)
    assert len(set(keys.ravel().tolist())) == 8
    constant = np.full((1, 16), 7, dtype=np.uint32)
    assert len(set(band_hashes(constant, np.zeros(1, np.uint64), bands=4, rows=4).ravel().tolist())) == 4


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 0.95, 1.0])
def test_chosen_bands_reach_the_recall_with_the_most_rows(threshold: float) -> None:
    bands, rows = choose_bands(threshold, 128, 0.99)
    assert candidate_probability(threshold, bands, rows) >= 0.99
    assert bands * rows <= 128
    if rows < 128:
        assert candidate_probability(threshold, 128 // (rows + 1), rows + 1) < 0.99


def test_chosen_bands_give_way_to_one_row() -> None:
    assert choose_bands(0.05, 16, 0.99) == (16, 1)


# ---------------------------------------------------------------------------------- rows


def matches(rows: Sequence[Row], **rules: object) -> list[tuple[int, bool] | None]:
    found = find_duplicates(rows, Rules(**rules), order=range(len(rows)), seed=7)  # type: ignore[arg-type]
    return [None if m is None else (m.of, m.jaccard is None) for m in found]


def test_exact_duplicates_see_through_layout() -> None:
    rows = [
        chat_row("Dim  the lights", '{"name": "x", "args": {"a": 1, "b": 2}}'),
        chat_row("dim the\nlights", '{"args":{"b":2,"a":1},"name":"x"}'),
        chat_row("dim the lights", '{"name": "y"}'),
        make_row(text="dim the lights"),
        make_row(text="ＤＩＭ the lights"),
        make_row(text="dim the lights", label="other"),
    ]
    assert matches(rows, near=False) == [None, (0, True), None, None, (3, True), None]


def test_numbers_and_slots_part_requests() -> None:
    """The nearest requests there are: one number, one word, or the answer differs."""
    rows = [chat_row(f"dim the kitchen lights to {n} percent please", f'{{"level":{n}}}') for n in (30, 40, 31)]
    rows += [chat_row("turn the kitchen lights on", '{"state":"on"}'), chat_row("turn the kitchen lights of", '"off"')]
    assert matches(rows, threshold=0.5) == [None] * 5
    same_answer = [chat_row(row.user, "{}") for row in rows]
    assert matches(same_answer, threshold=0.5)[:3] == [None] * 3, "the numbers part them still"
    assert matches(same_answer, threshold=0.5)[4] == (3, False)
    assert matches(rows, threshold=0.5, compare="prompt", same_numbers=False)[1:3] == [(0, False)] * 2
    texts = [make_row(text=row.user) for row in rows[:3]]
    assert matches(texts, threshold=0.3, unit="chars", same_numbers=True) == [None] * 3
    assert matches(texts, threshold=0.3, unit="chars", same_numbers=False)[1:] == [(0, False)] * 2


def test_compare_prompt_and_joined() -> None:
    rows = [
        chat_row("say hello", "hello there my dear old friend"),
        chat_row("say hello", "hello there my dear friend"),
    ]
    assert matches(rows) == [None, None]
    assert matches(rows, compare="prompt") == [None, (0, True)]
    assert matches(rows, compare="joined") == [None, (0, False)]


def test_system_turns_and_answers_that_only_look_like_json_count() -> None:
    rows = [make_row(messages=[{"role": "system", "content": s}, *chat_row("a b", "{x").messages]) for s in "pq"]
    assert matches(rows, near=False) == [None, None]
    assert exact_key(rows[0], "all")[2] == "{x"
    assert normal_text("ﬁ  X") == "fi x"


def noisy_pool(seed: int, *, rows: int = 1500, planted: int = 300) -> tuple[list[Row], list[int]]:
    """Distinct rows, and copies of some with one letter or one word changed; the copies' numbers."""
    rng = random.Random(seed)
    pool = [chat_row(" ".join(sentence(rng, rng.randrange(8, 16))), f'{{"f":{i % 40}}}') for i in range(rows)]
    copies = []
    for source in rng.sample(pool, planted):
        words = source.user.split()
        at = rng.randrange(len(words))
        words[at] = words[at][:-1] + "z" if rng.random() < 0.5 else words[at] + "s"
        copies.append(chat_row(" ".join(words), source.answer))
    return pool + copies, list(range(rows, rows + planted))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_near_duplicates_are_found(seed: int) -> None:
    rows, planted = noisy_pool(seed)
    found = find_duplicates(rows, Rules(threshold=0.8), order=range(len(rows)), seed=seed)
    caught = sum(found[i] is not None for i in planted)
    false = sum(m is not None for m in found) - caught
    assert caught / len(planted) >= 0.95
    assert false / (len(rows) - len(planted)) <= 0.01


def test_verdicts_equal_brute_force() -> None:
    rows, _ = noisy_pool(5, rows=250, planted=120)
    sets = [reference.char_shingles(row.user, 3) for row in rows]
    expected = reference.keep_first(sets, [row.answer for row in rows], 0.6)
    found = find_duplicates(rows, Rules(threshold=0.6, recall=0.9999), order=range(len(rows)), seed=1)
    assert [None if m is None else m.of for m in found] == expected
    for row, match in enumerate(found):
        if match is not None and match.jaccard is not None:
            assert match.jaccard == pytest.approx(reference.jaccard(sets[row], sets[match.of]))


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text("ab c", max_size=12), max_size=20), threshold=st.floats(0.3, 1.0))
def test_no_kept_pair_is_alike_and_every_match_is_kept(texts: list[str], threshold: float) -> None:
    rows = [make_row(text=text) for text in texts]
    found = find_duplicates(
        rows, Rules(threshold=threshold, unit="chars", recall=0.99999), order=range(len(rows)), seed=0
    )
    for match in found:
        assert match is None or found[match.of] is None
    kept = [shingles(normal_text(r.text), unit="chars", size=3) for r, m in zip(rows, found, strict=True) if m is None]
    assert all(jaccard(a, b) < threshold for i, a in enumerate(kept) for b in kept[:i])


def test_exact_duplicate_of_a_near_duplicate_names_the_row_that_stays() -> None:
    base = "please dim all of the lights in the kitchen"
    rows = [chat_row(base, "{}"), chat_row(base + " now", "{}"), chat_row(base + "  NOW", "{}")]
    assert matches(rows) == [None, (0, False), (0, False)]


# ---------------------------------------------------------------------------------- the stage


def test_stage_writes_reasons_and_counts(tmp_path: Path) -> None:
    rows = [chat_row(t, "{}") for t in ("please dim the kitchen lights", "Please dim the kitchen lights", "play jazz")]
    rows.append(chat_row("please dim the kitchen lights ok", "{}"))
    ctx = make_context(tmp_path, rows, name="data.selection.dedup")
    result = dedup(DedupParams(), ctx)
    assert read_rows(ctx.out) == [rows[0], rows[2]]
    lost = read_dropped(ctx.out)
    assert [(d.reason, d.stage) for d in lost] == [
        ("exact duplicate", "data.selection.dedup"),
        ("near duplicate", "data.selection.dedup"),
    ]
    assert lost[0].detail == f"of {rows[0].id}"
    assert lost[1].detail == f"of {rows[0].id} (jaccard 0.906)"
    assert result.metrics["dropped"] == {"exact duplicate": 1, "near duplicate": 1}
    assert (result.metrics["rows_in"], result.metrics["rows_out"]) == (4, 2)


def test_stage_is_deterministic_and_neutral_without_duplicates(tmp_path: Path) -> None:
    rows, _ = noisy_pool(3, rows=200, planted=50)
    first = make_context(tmp_path, rows, name="d", out="a")
    second = make_context(tmp_path, rows, name="d", out="b")
    dedup(DedupParams(), first), dedup(DedupParams(), second)
    for name in ("rows.parquet", "dropped.parquet"):
        assert (first.out / name).read_bytes() == (second.out / name).read_bytes()
    clean = make_context(tmp_path, rows[:200], name="d", out="c")
    dedup(DedupParams(near=False), clean)
    assert read_rows(clean.out) == rows[:200]


def test_keep_longest_and_by_score(tmp_path: Path) -> None:
    texts = ["dim all the kitchen lights now", "dim all the kitchen lights now ok", "dim all the kitchen lights now!"]
    rows = [
        chat_row(t, "{}").with_scores("data.selection.ifd", ratio=r)
        for t, r in zip(texts, (0.1, 0.2, 0.3), strict=True)
    ]
    longest = make_context(tmp_path, rows, name="d", out="a")
    dedup(DedupParams(keep="longest"), longest)
    assert read_rows(longest.out) == [rows[1]]
    best = make_context(tmp_path, rows, name="d", out="b")
    dedup(DedupParams(keep="score", score="data.selection.ifd.ratio"), best)
    assert read_rows(best.out) == [rows[2]]
    with pytest.raises(DataError, match=r"d\.score: no row has a score 'x\.y'; expected data\.selection\.ifd\.ratio"):
        dedup(DedupParams(keep="score", score="x.y"), make_context(tmp_path, rows, name="d", out="c"))
