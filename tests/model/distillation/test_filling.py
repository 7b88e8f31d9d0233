"""Filling a cache: only rows that are reached, each said of alike whoever its neighbours are, the same files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from compress.data.rows import read_source, write_rows
from compress.errors import DataError
from compress.model.distillation import filling as module
from compress.model.distillation import targets as targets_module
from compress.model.distillation import voices
from compress.model.distillation.cache import CacheHeader, TargetCache
from compress.model.distillation.filling import even_batches, layout, reached
from compress.model.distillation.packing import RowTable
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.settings import TrainSettings
from compress.model.distillation.stage import distill
from compress.model.distillation.targets import CachedTargets, OnlineTargets, cache_tokens, fill_cache
from compress.progress import Progress
from compress.teachers import open_teacher
from tests.model.distillation.conftest import Killed, files
from tests.tiny import VOCAB, tiny_checkpoint, tiny_conversations, tiny_model, tiny_token_rows

QUIET = Progress(quiet=True)
ROWS = tiny_token_rows(90, tokens=(4, 9, 17, 30, 31, 45))
HEADER = CacheHeader("teacher", "tokenizer", "template", vocab=VOCAB, top_k=16, temperature=1.0)
SETTINGS = TrainSettings(steps=3, batch_tokens=128, validation_share=0.05, seed=4)


@pytest.fixture(scope="module")
def teacher():
    return tiny_model(seed=5, scale=0.5, layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128)


@pytest.fixture
def table():
    return RowTable(ROWS, vocab=VOCAB)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(targets_module, "SHARD_POSITIONS", 400)
    monkeypatch.setattr(targets_module, "CACHE_TOKENS", 128)


def bits(cache, table, rows):
    """What is stored of rows, bit for bit."""
    batch = table.batch(rows)
    found = CachedTargets(cache, table, rows)(batch)
    return found.ids.numpy().tobytes() + found.logprobs.numpy().tobytes() + found.log_tail.numpy().tobytes()


def test_rows_are_reached_that_the_steps_draw_or_that_are_held_out(table):
    found = layout(table, SETTINGS)
    rows = reached(table, SETTINGS)
    assert set(rows) == {*found.held.tolist(), *(row for step in range(3) for row in found.order[step].tolist())}
    assert len(found.held) == 4
    assert len(rows) < 40
    longer = dataclasses.replace(SETTINGS, steps=1000)
    assert reached(table, longer).tolist() == list(range(90))
    assert reached(table, dataclasses.replace(SETTINGS, steps=None, epochs=1.0)).tolist() == list(range(90))
    assert set(reached(table, SETTINGS, dataclasses.replace(SETTINGS, steps=6))) >= set(rows)
    assert not len(reached(table))


@pytest.mark.parametrize("tokens", [32, 100, 1024])
def test_batches_have_one_shape_for_each_width_and_hold_every_row_once(table, tokens):
    rows = np.array(sorted(range(90), key=lambda row: table.lengths[row]))
    shapes: dict[int, int] = {}
    seen = []
    for batch in even_batches(rows, table.lengths, tokens):
        assert table.lengths[batch.rows].max() <= batch.width <= table.lengths.max()
        assert shapes.setdefault(batch.width, len(batch.filled)) == len(batch.filled)
        assert batch.filled[: len(batch.rows)].tolist() == batch.rows.tolist()
        assert len(batch.filled) == 1 or len(batch.filled) * batch.width <= tokens
        seen += batch.rows.tolist()
    assert seen == rows.tolist()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_said_of_a_row_does_not_depend_on_its_neighbours(tmp_path, teacher, table, small, bf16, threads):
    online = OnlineTargets(teacher, vocab=VOCAB, bf16=bf16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = TargetCache(tmp_path / "whole", HEADER)
        fill_cache(whole, table, online, QUIET)
        draw = np.random.default_rng(0)
        for number, count in enumerate((1, 7, 40)):
            some = np.sort(draw.choice(90, count, replace=False))
            cache = TargetCache(tmp_path / str(number), HEADER)
            fill_cache(cache, table, online, QUIET, some)
            assert cache.positions == int(table.counts[some].sum())
            assert bits(cache, table, some) == bits(whole, table, some)
    finally:
        torch.set_num_threads(before)


def test_a_row_that_was_not_asked_about_is_refused(tmp_path, teacher, table):
    cache = TargetCache(tmp_path, HEADER)
    some = np.arange(5)
    fill_cache(cache, table, OnlineTargets(teacher, vocab=VOCAB), QUIET, some)
    cached = CachedTargets(cache, table, some)
    cached(table.batch(some))
    with pytest.raises(DataError, match="row number 7 was not asked about"):
        cached(table.batch(np.array([3, 7])))
    with pytest.raises(DataError, match="not in the teacher's cache"):
        CachedTargets(cache, table)


class Dying(OnlineTargets):
    """A teacher that is killed when it is asked the ``left``-th time."""

    left = 0
    asked = 0

    def __call__(self, batch):
        self.left -= 1
        if self.left < 0:
            raise Killed("killed")
        self.asked += 1
        return super().__call__(batch)


@pytest.mark.parametrize("every", [0.0, 1e9])
def test_killed_at_any_batch_it_ends_with_the_same_files(tmp_path, monkeypatch, teacher, table, small, every):
    online = OnlineTargets(teacher, vocab=VOCAB)
    fill_cache(TargetCache(tmp_path / "whole", HEADER), table, online, QUIET)
    whole = files(tmp_path / "whole")
    assert len(whole) > 7
    monkeypatch.setattr(module, "STORE_EVERY_S", every)
    for stop in (0, 1, 2, 5, 9):
        place = tmp_path / f"cut {stop}"
        dying = Dying(teacher, vocab=VOCAB)
        dying.left = stop
        with pytest.raises(Killed):
            fill_cache(TargetCache(place, HEADER), table, dying, QUIET)
        again = Dying(teacher, vocab=VOCAB)
        again.left = 10**6
        fill_cache(TargetCache(place, HEADER), table, again, QUIET)
        assert files(place) == whole
        if not every:
            fresh = Dying(teacher, vocab=VOCAB)
            fresh.left = 10**6
            fill_cache(TargetCache(tmp_path / f"fresh {stop}", HEADER), table, fresh, QUIET)
            assert dying.asked + again.asked == fresh.asked, "what was stored is not asked again"


@pytest.mark.parametrize("damage", ["flip", "marker", "other rows"])
def test_parts_that_cannot_be_used_are_made_again(tmp_path, monkeypatch, teacher, table, small, damage):
    monkeypatch.setattr(module, "STORE_EVERY_S", 0.0)
    dying = Dying(teacher, vocab=VOCAB)
    dying.left = 3
    with pytest.raises(Killed):
        fill_cache(TargetCache(tmp_path / "cut", HEADER), table, dying, QUIET)
    parts = sorted((tmp_path / "cut").glob("part-*.safetensors"))
    assert len(parts) == 3
    wanted = None
    if damage == "flip":
        content = parts[1].read_bytes()
        parts[1].write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage == "marker":
        parts[0].with_suffix(".json").write_text("{", encoding="utf-8")
    else:
        wanted = np.arange(40, 90)
    online = OnlineTargets(teacher, vocab=VOCAB)
    fill_cache(TargetCache(tmp_path / "cut", HEADER), table, online, QUIET, wanted)
    fill_cache(TargetCache(tmp_path / "whole", HEADER), table, online, QUIET, wanted)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_progress_goes_on_batch_by_batch_in_positions(tmp_path, teacher, table, small):
    counted = []

    class Seen(Progress):
        def draw(self, bar, now, note):
            counted.append((bar.done, bar.total, bar.unit))

        def every_s(self, passed):
            return 0.0

    fill_cache(TargetCache(tmp_path, HEADER), table, OnlineTargets(teacher, vocab=VOCAB), Seen(quiet=True))
    done = [one[0] for one in counted]
    assert done == sorted(done)
    assert done[-1] == counted[0][1] == int(table.counts.sum())
    assert max(np.diff(done)) <= 128
    assert {one[2] for one in counted} == {"positions"}


def test_a_large_teacher_reads_fewer_tokens_at_once(teacher):
    class Large:
        device = torch.device("cpu")
        models = (torch.nn.Linear(1, 1).to("meta"),)

    assert cache_tokens(OnlineTargets(teacher, vocab=VOCAB)) == 1024
    for millions, tokens in ((135, 1024), (500, 256), (1700, 128), (70_000, 32)):
        Large.models = (torch.nn.Linear(1000, millions * 1000, bias=False, device="meta"),)
        assert cache_tokens(Large()) == tokens


def test_the_student_is_the_one_of_a_cache_of_all_rows(tmp_path, monkeypatch, context):
    """By bytes; and the teacher is asked about a part of the rows alone."""
    tiny_checkpoint(tmp_path / "teacher", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128)
    source = tmp_path / "rows.jsonl"
    talks = tiny_conversations(150)
    source.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data", read_source(source).rows)
    params = LogitsParams(steps=3, batch_tokens=256, top_k=16, validations=2, validation_share=0.05, layers=1)
    made, positions = [], []
    for name in ("reached", "all"):
        if name == "all":
            monkeypatch.setattr(voices, "reached", lambda table, settings: np.arange(len(table)))
        inputs = {"inputs": {"data": tmp_path / "data"}, "teacher": open_teacher(tmp_path / "teacher")}
        ctx = context(name, **inputs)
        result = distill(params, ctx)
        made.append(files(ctx.out))
        positions.append(result.metrics["target_positions"])
    assert made[0] == made[1]
    assert positions[0] < 0.5 * positions[1]
