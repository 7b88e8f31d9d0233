"""Targets: the cache holds what the teacher says, survives kills and damage, and refuses what it is not of."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from compress.errors import DataError, ModelError, StoreError
from compress.model.distillation import targets as module
from compress.model.distillation.cache import CacheHeader, TargetCache, decode, encode
from compress.model.distillation.filling import shards
from compress.model.distillation.losses import forward_kl
from compress.model.distillation.packing import RowTable
from compress.model.distillation.targets import (
    CachedTargets,
    OnlineTargets,
    check_rows_fit,
    fill_cache,
    local_folder,
    shared_vocabulary,
)
from compress.progress import Progress
from tests.tiny import VOCAB, tiny_model, tiny_token_rows

QUIET = Progress(quiet=True)
ROWS = tiny_token_rows(60, tokens=(4, 9, 17, 30))
HEADER = CacheHeader("teacher", "tokenizer", "template", vocab=VOCAB, top_k=VOCAB, temperature=1.0)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model(seed=5, scale=0.5)


@pytest.fixture
def table():
    return RowTable(ROWS, vocab=VOCAB)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_POSITIONS", 100)
    monkeypatch.setattr(module, "CACHE_TOKENS", 64)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("top_k", [VOCAB, 16, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_cached_targets_equal_online_targets(tmp_path, teacher, table, small_shards, top_k, temperature):
    header = dataclasses.replace(HEADER, top_k=top_k, temperature=temperature)
    online = OnlineTargets(teacher, vocab=VOCAB, temperature=temperature)
    cache = TargetCache(tmp_path, header)
    fill_cache(cache, table, online, QUIET)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) > 2
    cached = CachedTargets(TargetCache(tmp_path, header), table)
    batch = table.batch(np.array([40, 3, 17, 59, 0]))
    exact = online(batch).narrow(0, len(batch.keep)).logprobs
    found = cached(batch)
    torch.testing.assert_close(found.logprobs, exact.gather(1, found.ids), rtol=2e-3, atol=2e-3)
    mass = found.logprobs.exp().sum(-1) + found.log_tail.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass))
    if top_k < VOCAB:
        assert (found.ids.sort(-1).values == exact.topk(top_k).indices.sort(-1).values).float().mean() > 0.99
        tail = 1 - exact.exp().gather(1, found.ids).sum(-1)
        torch.testing.assert_close(found.log_tail.exp(), tail, rtol=5e-3, atol=1e-4)
    student = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    dense = forward_kl(student / temperature, online(batch).narrow(0, len(batch.keep)))[0]
    sparse = forward_kl(student / temperature, found)[0]
    if top_k == VOCAB:
        torch.testing.assert_close(sparse, dense, rtol=5e-3, atol=5e-3)
    else:
        assert (sparse <= dense + 5e-3).all(), "coarsening can only lower a KL"


def test_temperature_is_applied_before_the_cut(teacher, table):
    """The tail at temperature 2 is not the tail at 1: it cannot be derived from a cache taken at another one."""
    batch = table.batch(np.arange(10))
    tails = []
    for temperature in (1.0, 2.0):
        states = OnlineTargets(teacher, vocab=VOCAB, temperature=temperature)(batch)
        tails.append(decode(encode(states.narrow(0, len(batch.keep)).logprobs, 8)).log_tail.exp())
    assert (tails[1] > tails[0] + 0.01).all()


@pytest.mark.parametrize(
    ("vocab", "dtype", "size"), [(VOCAB, torch.uint16, 4 * 8 + 2), (70_000, torch.int32, 6 * 8 + 2)]
)
def test_ids_take_two_bytes_where_they_fit(tmp_path, vocab, dtype, size):
    logprobs = torch.log_softmax(torch.randn(5, vocab, generator=torch.Generator().manual_seed(0)), -1)
    logprobs[0, vocab - 1] = 0.0  # the highest id must come back unharmed
    coded = encode(logprobs, 8)
    assert coded.ids.dtype == dtype
    assert (decode(coded).ids == logprobs.topk(8).indices).all()
    header = dataclasses.replace(HEADER, vocab=vocab, top_k=8)
    assert header.bytes_per_token == size
    stored = sum(t.numel() * t.element_size() for t in (coded.ids, coded.logprobs, coded.log_tail))
    assert stored == 5 * size
    cache = TargetCache(tmp_path, header)
    cache.append([b"k" * 16], [5], coded)
    assert (TargetCache(tmp_path, header).take(torch.tensor([4, 0])).ids == decode(coded).ids[[4, 0]]).all()


def test_equal_rows_are_stored_once(tmp_path, teacher):
    table = RowTable([*ROWS, *ROWS], vocab=VOCAB)
    cache = TargetCache(tmp_path, HEADER)
    fill_cache(cache, table, OnlineTargets(teacher, vocab=VOCAB), QUIET)
    assert cache.positions == sum(row.targets for row in ROWS)


def test_a_filling_cut_short_goes_on_to_the_same_bytes(tmp_path, teacher, table, small_shards):
    class Killed(Exception):
        pass

    class Dying(OnlineTargets):
        left = 9

        def __call__(self, batch):
            self.left -= 1
            if self.left < 0:
                raise Killed("killed")
            return super().__call__(batch)

    fill_cache(TargetCache(tmp_path / "whole", HEADER), table, OnlineTargets(teacher, vocab=VOCAB), QUIET)
    with pytest.raises(Killed, match="killed"):
        fill_cache(TargetCache(tmp_path / "cut", HEADER), table, Dying(teacher, vocab=VOCAB), QUIET)
    before = files(tmp_path / "cut")
    assert 1 < len(before) < len(files(tmp_path / "whole"))
    fill_cache(TargetCache(tmp_path / "cut", HEADER), table, OnlineTargets(teacher, vocab=VOCAB), QUIET)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_appending_rows_computes_only_the_new_ones(tmp_path, teacher, small_shards):
    fill_cache(
        TargetCache(tmp_path, HEADER), RowTable(ROWS[:30], vocab=VOCAB), OnlineTargets(teacher, vocab=VOCAB), QUIET
    )
    before = files(tmp_path)
    wide = RowTable(ROWS, vocab=VOCAB)
    cache = TargetCache(tmp_path, HEADER)
    fill_cache(cache, wide, OnlineTargets(teacher, vocab=VOCAB), QUIET)
    assert {name: files(tmp_path)[name] for name in before} == before
    batch = wide.batch(np.arange(60))
    found = CachedTargets(cache, wide)(batch)
    exact = OnlineTargets(teacher, vocab=VOCAB)(batch).narrow(0, len(batch.keep)).logprobs
    torch.testing.assert_close(found.logprobs, exact.gather(1, found.ids), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("damage", ["flip", "cut", "no shard", "bad marker"])
def test_a_damaged_shard_is_computed_again(tmp_path, teacher, table, small_shards, damage, caplog):
    fill_cache(TargetCache(tmp_path, HEADER), table, OnlineTargets(teacher, vocab=VOCAB), QUIET)
    shard = tmp_path / "shard-00001.safetensors"
    content = shard.read_bytes()
    if damage == "flip":
        shard.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "no shard":
        shard.unlink()
    else:
        shard.with_suffix(".json").write_text("{")
    cache = TargetCache(tmp_path, HEADER)
    assert "computed again" in caplog.text
    with pytest.raises(DataError, match="is not in the teacher's cache"):
        CachedTargets(cache, table)
    fill_cache(cache, table, OnlineTargets(teacher, vocab=VOCAB), QUIET)
    CachedTargets(TargetCache(tmp_path, HEADER), table)


@pytest.mark.parametrize(
    ("field", "value"),
    [("teacher", "x"), ("tokenizer", "x"), ("template", "x"), ("vocab", 9), ("top_k", 3), ("temperature", 2.0)],
)
def test_a_cache_of_something_else_is_refused(tmp_path, field, value):
    TargetCache(tmp_path, HEADER)
    with pytest.raises(DataError, match=f"the cache's {field} is .* expected {value!r}.* remove the folder"):
        TargetCache(tmp_path, dataclasses.replace(HEADER, **{field: value}))


def test_an_unreadable_header_is_refused(tmp_path):
    (tmp_path / "header.json").write_text("{")
    with pytest.raises(StoreError, match=r"header\.json: cannot be read"):
        TargetCache(tmp_path, HEADER)
    (tmp_path / "header.json").write_text(json.dumps([1]))
    with pytest.raises(DataError, match="the cache's teacher is"):
        TargetCache(tmp_path, HEADER)


def test_online_targets_leave_padded_vocabulary_out(teacher, table):
    batch = table.batch(np.arange(4))
    narrow = OnlineTargets(teacher, vocab=300)(batch).narrow(0, 5).logprobs
    assert narrow.shape == (5, 300)
    torch.testing.assert_close(narrow.exp().sum(-1), torch.ones(5))


def test_shards_cover_all_rows():
    assert [(s.start, s.stop) for s in shards([3, 3, 1, 9, 2], 6)] == [(0, 2), (2, 4), (4, 5)]
    assert list(shards([], 6)) == []


def test_vocabularies_of_different_padding_are_shared_and_different_tokens_refused():
    ids = {"a": 0, "b": 1, "c": 2}
    assert shared_vocabulary(({"vocab_size": 4}, ids), ({"vocab_size": 3}, dict(ids)), where="w") == 3
    with pytest.raises(ModelError, match=r"different tokenizers \(3 and 3 tokens; 'c' is 2 in one"):
        shared_vocabulary(({"vocab_size": 4}, ids), ({"vocab_size": 4}, {"a": 0, "b": 1, "d": 2}), where="w")
    with pytest.raises(ModelError, match="the student's vocab_size is 2; expected at least 3"):
        shared_vocabulary(({"vocab_size": 4}, ids), ({"vocab_size": 2}, dict(ids)), where="w")


def test_refusals_of_teachers_and_rows_that_do_not_fit(table):
    with pytest.raises(ModelError, match="the teacher is not a local model"):
        local_folder(None, where="w")
    with pytest.raises(ModelError, match="a row has 30 tokens; expected at most 16"):
        check_rows_fit(table, [{"max_position_embeddings": 64}, {"max_position_embeddings": 16}], where="w")
