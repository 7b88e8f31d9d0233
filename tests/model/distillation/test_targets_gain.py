"""What kinds of targets are worth on a toy, 3 seeds: draws against the whole distribution, two teachers against one."""

from __future__ import annotations

import dataclasses
import statistics

import numpy as np
import torch
from torch import log_softmax

from compress.model.distillation.cache import CacheHeader, TargetCache
from compress.model.distillation.losses import LossWeights, Sparse
from compress.model.distillation.mixtures import MixedTargets, routed, row_scores, shared_out
from compress.model.distillation.packing import RowTable
from compress.model.distillation.settings import TrainSettings
from compress.model.distillation.targets import CachedTargets, OnlineTargets, fill_cache
from compress.model.distillation.trainer import train
from compress.progress import Progress
from tests.tiny import tiny_model, tiny_token_rows

QUIET = Progress(quiet=True)
VOCAB, COUNT, UNSEEN, SEEDS = 24, 60, 60, range(3)
HEADER = CacheHeader("world", "tokenizer", "template", VOCAB, 3, 1.0)


def written_by(world, first, seed):
    """Rows that start with two tokens of ``first`` and go on as ``world`` says."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(*first, (COUNT + UNSEEN, 2), generator=generator)
    with torch.no_grad():
        for _ in range(8):
            chances = torch.softmax(world(input_ids=ids).logits[:, -1], -1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    row = tiny_token_rows(1)[0]
    return [dataclasses.replace(row, ids=tuple(line), answer=(0, 0) + (1,) * 8) for line in ids.tolist()]


def taught(context, name, target_fn, table, seed, kd_weight=1.0):
    """A student after 60 steps."""
    student = tiny_model(seed=seed, vocab=VOCAB)
    settings = TrainSettings(
        loss=LossWeights(kd_weight), steps=60, batch_tokens=128, learning_rate=5e-3, validation_share=0.0, keep="last"
    )
    ctx = context(f"{name} {seed}")
    train(student, target_fn, table, settings, ctx, ctx.work / "log.jsonl")
    return student


def distance(student, world, rows):
    """KL(world || student) on rows that neither training saw, nats per token."""
    batch = RowTable(rows, vocab=VOCAB).batch(np.arange(len(rows)))
    exact = OnlineTargets(world, vocab=VOCAB)(batch).narrow(0, len(batch.keep)).logprobs
    with torch.no_grad():
        learned = log_softmax(student(input_ids=batch.input_ids).logits.reshape(-1, VOCAB)[batch.keep], -1)
    return float((exact.exp() * (exact - learned)).sum(-1).mean())


def test_draws_teach_as_well_as_the_whole_distribution_and_a_cut_off_top_k_does_not(context, tmp_path):
    """At about equal bytes: 12 draws, and the top 3 made to add up to 1, the negative control."""
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        world = tiny_model(seed=20 + seed, scale=0.2, vocab=VOCAB, layers=1)
        rows = written_by(world, (5, VOCAB), seed)
        table, online = RowTable(rows[:COUNT], vocab=VOCAB), OnlineTargets(world, vocab=VOCAB)
        ways = {"dense": online}
        draws = dataclasses.replace(HEADER, codec="sample", top_k=0, samples=12, seed=seed)
        for name, header in (("draws", draws), ("cut off", HEADER)):
            cache = TargetCache(tmp_path / f"{name} {seed}", header)
            fill_cache(cache, table, online, QUIET)
            ways[name] = CachedTargets(cache, table)
        cached = ways["cut off"]

        def renormalised(batch, cached=cached):
            top = cached(batch)
            logprobs = top.logprobs - top.logprobs.logsumexp(-1, keepdim=True)
            return Sparse(top.ids, logprobs, torch.full_like(top.log_tail, -torch.inf))

        ways["cut off"] = renormalised
        for name, target_fn in ways.items():
            student = taught(context, name, target_fn, table, seed)
            found.setdefault(name, []).append(distance(student, world, rows[COUNT:]))
        alone = taught(context, "labels", None, table, seed, kd_weight=0.0)
        found.setdefault("labels", []).append(distance(alone, world, rows[COUNT:]))
    means = {name: statistics.mean(values) for name, values in found.items()}
    assert means["draws"] < means["dense"] * 1.15, found
    assert means["cut off"] > means["dense"] * 1.3, found
    assert all(a < 0.8 * b for a, b in zip(found["draws"], found["labels"], strict=True)), found


def test_two_specialists_teach_more_than_either_when_each_teaches_its_own_rows(context):
    """Even weights are the control: what each says of the other's rows spoils the lesson; the wrong way is worst."""
    found: dict[str, list[float]] = {}
    for seed in SEEDS:
        worlds = [tiny_model(seed=30 + 2 * seed + at, scale=0.2, vocab=VOCAB, layers=1) for at in range(2)]
        kinds = [written_by(world, first, seed) for world, first in zip(worlds, ((5, 14), (14, VOCAB)), strict=True)]
        table = RowTable([*kinds[0][:COUNT], *kinds[1][:COUNT]], vocab=VOCAB)
        experts = [OnlineTargets(world, vocab=VOCAB) for world in worlds]
        scores = torch.stack([row_scores(expert, table, "loss", QUIET) for expert in experts], dim=1)
        by_loss = routed([1.0, 1.0], scores, 0.05)
        ways = {
            "first": experts[0],
            "second": experts[1],
            "even": MixedTargets(experts, shared_out([1.0, 1.0], len(table))),
            "routed": MixedTargets(experts, by_loss),
            "wrong": MixedTargets(experts, by_loss.flip(1)),
        }
        for name, target_fn in ways.items():
            student = taught(context, name, target_fn, table, seed)
            parts = [distance(student, world, kind[COUNT:]) for world, kind in zip(worlds, kinds, strict=True)]
            found.setdefault(name, []).append(sum(parts) / 2)
    for name in ("first", "second", "even", "wrong"):
        assert all(a < b for a, b in zip(found["routed"], found[name], strict=True)), found
    assert statistics.mean(found["wrong"]) > statistics.mean(found["even"]), found
    assert statistics.mean(found["routed"]) < 0.9 * statistics.mean(found["even"]), found
