"""Pairs of rows and the teacher's side: positions of a batch, the cache against the running teacher, kills."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from compress.data.rows import make_row, write_rows
from compress.errors import DataError, ModelError
from compress.model.distillation import targets as targets_module
from compress.model.distillation.cross_tokenizer import targets as module
from compress.model.distillation.cross_tokenizer.cache import ChunkCache, ChunkHeader
from compress.model.distillation.cross_tokenizer.pairs import Pairs, read_pairs
from compress.model.distillation.cross_tokenizer.symbols import END, vocabulary
from compress.model.distillation.cross_tokenizer.targets import CachedTeacher, OnlineTeacher, fill_cache
from compress.model.distillation.packing import RowTable
from compress.model.distillation.targets import OnlineTargets
from compress.progress import Progress
from tests.model.distillation.conftest import files
from tests.model.distillation.cross_tokenizer import tokenizers_here as made
from tests.tiny import tiny_conversations, tiny_model, tiny_tokenizer

QUIET = Progress(quiet=True)
HEADER = ChunkHeader("teacher", "tokenizer", "template", "student's tokenizer", "student's template", columns=2)


def chat_rows(folder, count=30):
    folder.mkdir()
    rows = [make_row(messages=talk) for talk in tiny_conversations(count)]
    write_rows(folder, list({row.id: row for row in rows}.values()))
    return folder


class Place:
    """Chats of a teacher with the tokenizer of tests.tiny and a student of bytes, aligned."""

    def __init__(self, folder):
        self.tokenizers = tiny_tokenizer(folder / "tiny"), made.byte_level(0)
        self.words = tuple(vocabulary(one, where="w") for one in self.tokenizers)
        self.data = chat_rows(folder / "data")
        self.rows = read_pairs(self.data, *self.tokenizers, max_tokens=400, teacher_max_tokens=400, truncate=False)
        self.pairs = Pairs(*self.rows, self.words, where="w")
        self.tables = [RowTable(rows, vocab=side.size) for rows, side in zip(self.rows, self.words, strict=True)]
        self.model = tiny_model(seed=5, scale=0.5)

    def teacher(self, *, edges=True, whole=False, pairs=None):
        return OnlineTeacher(
            OnlineTargets(self.model, vocab=self.words[0].size),
            self.tables[0],
            pairs or self.pairs,
            edges=torch.tensor(self.words[0].boundary) if edges else None,
            whole=whole,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("place"))


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_chunks_of_a_batch_spell_the_same_on_both_sides(place):
    order = np.array([7, 0, 12, 3])
    chunks = place.pairs.batch(order)
    batches = [table.batch(order) for table in place.tables]
    covered = [0, 0]
    for ours, theirs, last, ended in zip(chunks.teacher, chunks.student, chunks.last, chunks.ended, strict=True):
        spelled = []
        for side, (words, batch, piece) in enumerate(zip(place.words, batches, (ours, theirs), strict=True)):
            tokens = batch.labels[piece[0] : piece[1]].tolist()
            covered[side] += len(tokens)
            spelled.append([symbol for token in tokens for symbol in words.symbols[token]])
        assert spelled[0] == spelled[1]
        assert bool(ended) == bool(last) == (spelled[0] == [END])
    assert covered == [len(batch.labels) for batch in batches]
    assert place.pairs.figures["aligned_share"] == 1.0
    assert place.pairs.figures["rows_without_chunks"] == 0
    assert int((~chunks.joins).sum()) == len(order), "a row's chunks follow each other, and end with the row"


def test_by_index_pairs_the_first_with_the_first(place):
    other = place.pairs.by_index()
    shorter = np.minimum(place.pairs.ours, place.pairs.theirs)
    assert len(other.chunks) == shorter.sum()
    order = np.array([2, 5])
    chunks, batches = other.batch(order), [table.batch(order) for table in place.tables]
    first = [int(batch.counts[0]) for batch in batches]
    expected = [(i, i) for i in range(shorter[2])] + [(first[0] + i, first[1] + i) for i in range(shorter[5])]
    assert list(zip(chunks.teacher[:, 0].tolist(), chunks.student[:, 0].tolist(), strict=True)) == expected


def test_the_teachers_scores_are_those_of_its_own_tokens(place):
    order = np.array([4, 9])
    batch = place.tables[0].batch(order)
    found = place.teacher(whole=True).of_rows(order, torch.device("cpu"))
    logits = place.model(input_ids=batch.input_ids).logits[..., : place.words[0].size]
    logprobs = torch.log_softmax(logits.flatten(0, 1)[batch.keep], -1)
    labels = logprobs.gather(1, batch.labels[:, None])[:, 0]
    edge = torch.tensor(place.words[0].boundary)
    for number, (start, stop) in enumerate(found.chunks.teacher.tolist()):
        torch.testing.assert_close(found.scores[number, 0], labels[start:stop].sum(), rtol=1e-4, atol=1e-5)
        behind = 0.0 if found.chunks.last[number] else float(logprobs[stop][edge].logsumexp(0))
        assert float(found.scores[number, 1]) == pytest.approx(behind, abs=1e-4)
        assert int(found.spans.first[number]) == int(batch.labels[start])
        torch.testing.assert_close(found.spans.rest[number], labels[start + 1 : stop].sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.states.narrow(0, len(found.scores)).logprobs, logprobs[found.chunks.teacher[:, 0]], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("edges", [True, False])
def test_cached_scores_equal_online_scores(place, tmp_path, monkeypatch, edges):
    monkeypatch.setattr(module, "SHARD_CHUNKS", 100)
    monkeypatch.setattr(targets_module, "CACHE_TOKENS", 256)
    header = dataclasses.replace(HEADER, columns=2 if edges else 1)
    cache = ChunkCache(tmp_path, header)
    online = place.teacher(edges=edges)
    fill_cache(cache, online, QUIET)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) > 2
    batch = place.tables[1].batch(np.array([11, 3, 3, 0]))
    cached = CachedTeacher(ChunkCache(tmp_path, header), place.tables[0], place.pairs)
    torch.testing.assert_close(cached(batch).scores, online(batch).scores, rtol=1e-5, atol=1e-5)
    stored = sum(values.numel() * values.element_size() for values in cache._rows.values())
    assert stored == cache.chunks * header.bytes_per_chunk == cache.chunks * (8 if edges else 4)


def test_a_filling_cut_short_goes_on_to_the_same_bytes(place, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_CHUNKS", 100)

    class Killed(Exception):
        pass

    write, calls = ChunkCache.write, []

    def dying(self, *args, **told):
        calls.append(1)
        if len(calls) == 3:
            raise Killed("killed")
        write(self, *args, **told)

    fill_cache(ChunkCache(tmp_path / "whole", HEADER), place.teacher(), QUIET)
    with monkeypatch.context() as patch:
        patch.setattr(ChunkCache, "write", dying)
        with pytest.raises(Killed, match="killed"):
            fill_cache(ChunkCache(tmp_path / "cut", HEADER), place.teacher(), QUIET)
    assert 1 < len(files(tmp_path / "cut")) < len(files(tmp_path / "whole"))
    fill_cache(ChunkCache(tmp_path / "cut", HEADER), place.teacher(), QUIET)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["flip", "cut", "no shard", "bad marker"])
def test_a_damaged_shard_is_computed_again(place, tmp_path, monkeypatch, damage, caplog):
    monkeypatch.setattr(module, "SHARD_CHUNKS", 100)
    fill_cache(ChunkCache(tmp_path, HEADER), place.teacher(), QUIET)
    shard = tmp_path / "shard-00001.safetensors"
    content = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "no shard":
        shard.unlink()
    else:
        shard.with_suffix(".json").write_text("{")
    cache = ChunkCache(tmp_path, HEADER)
    assert "computed again" in caplog.text
    with pytest.raises(DataError, match=r"of \d+ rows are not in the teacher's cache"):
        CachedTeacher(cache, place.tables[0], place.pairs)
    fill_cache(cache, place.teacher(), QUIET)
    CachedTeacher(ChunkCache(tmp_path, HEADER), place.tables[0], place.pairs)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ChunkHeader)])
def test_a_cache_of_something_else_is_refused(tmp_path, field):
    ChunkCache(tmp_path, HEADER)
    value = 1 if field == "columns" else 7 if field == "version" else "x"
    with pytest.raises(DataError, match=f"the cache's {field} is .* expected {value!r}.* remove the folder"):
        ChunkCache(tmp_path, dataclasses.replace(HEADER, **{field: value}))


def test_a_teacher_that_gives_no_numbers_is_refused(place, tmp_path, monkeypatch):
    teacher = place.teacher()
    original = OnlineTeacher.of_rows

    def broken(self, *args):
        found = original(self, *args)
        return dataclasses.replace(found, scores=found.scores * torch.nan)

    monkeypatch.setattr(OnlineTeacher, "of_rows", broken)
    with pytest.raises(ModelError, match="its log-probabilities are not finite"):
        fill_cache(ChunkCache(tmp_path, HEADER), teacher, QUIET)


def test_other_chunks_have_another_key(place):
    """Where the student's tokens end decides what the teacher's chunks are."""
    keys = {place.pairs.key(row, place.tables[0]) for row in range(len(place.pairs))}
    assert len(keys) == len(place.pairs)
    coarse = made.unigram()
    rows = read_pairs(place.data, place.tokenizers[0], coarse, max_tokens=400, teacher_max_tokens=400, truncate=False)
    other = Pairs(*rows, (place.words[0], vocabulary(coarse, where="w")), where="w")
    assert not keys & {other.key(row, place.tables[0]) for row in range(len(other))}


def test_texts_without_a_first_token_begin_behind_their_first_byte(tmp_path):
    """A student without BOS predicts nothing at its first byte, so the teacher's first chunk has no counterpart."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder, [make_row(text="one two three")])
    sides = made.pieces(), made.byte_level(0)
    rows = read_pairs(folder, *sides, max_tokens=99, teacher_max_tokens=99, truncate=False)
    words = tuple(vocabulary(one, where="w") for one in sides)
    pairs = Pairs(*rows, words, where="w")
    for ours, theirs in zip(pairs.batch(np.array([0])).teacher, pairs.batch(np.array([0])).student, strict=True):
        assert [
            symbol for token in rows[0][0].ids[1 + ours[0] : 1 + ours[1]] for symbol in words[0].symbols[token]
        ] == [symbol for token in rows[1][0].ids[1 + theirs[0] : 1 + theirs[1]] for symbol in words[1].symbols[token]]
    assert pairs.chunks[0, 2] > 0
    chunks = pairs.batch(np.array([0]))
    assert bool(chunks.last[-1])
    assert not chunks.ended.any(), "a text may go on: nothing says that a word ends with it"


def test_cut_rows_are_aligned_as_far_as_both_go(place):
    rows = read_pairs(place.data, *place.tokenizers, max_tokens=70, teacher_max_tokens=400, truncate=True)
    pairs = Pairs(*rows, place.words, where="w")
    assert 0.3 < pairs.figures["aligned_share"] <= 1.0
    assert pairs.figures["teacher_unaligned_bytes"]["behind"] > 0
    assert pairs.figures["teacher_unaligned_bytes"]["before"] == 0


def test_messages_name_the_side(place):
    with pytest.raises(DataError, match=r"student's tokens: row .* expected at most 20 \(max_tokens\)"):
        read_pairs(place.data, *place.tokenizers, max_tokens=20, teacher_max_tokens=400, truncate=False)
    with pytest.raises(DataError, match=r"teacher's tokens: row .* at most 20 \(teacher_max_tokens\)"):
        read_pairs(place.data, *place.tokenizers, max_tokens=400, teacher_max_tokens=20, truncate=False)
    bare = made.byte_level(0, template=None)
    with pytest.raises(ModelError, match="student's tokens: tokenizer: has no chat template"):
        read_pairs(place.data, place.tokenizers[0], bare, max_tokens=400, teacher_max_tokens=400, truncate=False)


def test_texts_that_cannot_be_aligned_are_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder, [make_row(text="ONE TWO THREE")])
    sides = made.byte_level(0), made.lower_case()
    rows = read_pairs(folder, *sides, max_tokens=99, teacher_max_tokens=99, truncate=False)
    words = tuple(vocabulary(one, where="w") for one in sides)
    with pytest.raises(DataError, match=r"of 1 rows none can be aligned .* Look at the normalizer"):
        Pairs(*rows, words, where="w")
