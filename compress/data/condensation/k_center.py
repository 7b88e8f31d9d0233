"""k-center greedy: from many rows to few that leave no row far away.

`farthest_points` is the maths (Gonzalez 1985: at most twice the best possible radius; as used for core sets by Sener
and Savarese 2018 and in MoDS), `k_center` the stage: embeds the rows, selects to the budget, per label where wanted,
and reports the radius. Farthest points love outliers: put it behind the filters. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from compress.context import StageContext, StageResult
from compress.data.chunks import map_chunks
from compress.data.condensation.params import KCenterParams
from compress.data.embeddings import hashed, normalised
from compress.data.funnel import finish
from compress.data.quality.mixes import label_of
from compress.data.rows import Dropped, Row, read_rows
from compress.encoding import TokenRow, encode_prompt, encode_rows
from compress.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 512  # rows embedded between two checkpoints


@dataclass(frozen=True)
class Cover:
    """A selection and how well it covers the points.

    Attributes:
        chosen: indices of the centers in the order of choosing, (k,).
        radii: largest distance of any point to its nearest center after each choice, (k,); never rises.
        nearest: index of each point's nearest center, (n,).
        distance: distance to it, (n,).
    """

    chosen: NDArray[np.int64]
    radii: NDArray[np.float64]
    nearest: NDArray[np.int64]
    distance: NDArray[np.float32]

    @property
    def radius(self) -> float:
        """Largest distance of any point to its nearest center."""
        return float(self.radii[-1])


def farthest_points(points: NDArray[np.float32], count: int) -> Cover:
    """Choose ``count`` of ``points`` (n, d): first the one nearest to the mean, then always the farthest one.

    O(n * count * d) in float32, Euclidean; of equally far points the first. Distances are taken directly for the
    chosen row, by |a|² + |b|² - 2ab, so identical points may seem up to about 3e-4 apart.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    squares = np.einsum("nd,nd->n", points, points)
    offset = points - points.mean(axis=0, dtype=np.float64).astype(np.float32)
    center = int(np.argmin(np.einsum("nd,nd->n", offset, offset)))
    count = min(count, len(points))
    best = np.full(len(points), np.inf, dtype=np.float32)  # squared distance to the nearest center
    free = np.ones(len(points), dtype=bool)
    nearest = np.zeros(len(points), dtype=np.int64)
    chosen, radii = np.zeros(count, dtype=np.int64), np.zeros(count)
    for step in range(count):
        chosen[step], free[center] = center, False
        squared = squares + squares[center] - 2.0 * (points @ points[center])
        np.maximum(squared, 0.0, out=squared)
        squared[center] = 0.0
        closer = squared < best
        nearest[closer] = center
        np.minimum(best, squared, out=best)
        radii[step] = np.sqrt(best.max())
        center = int(np.argmax(np.where(free, best, -1.0)))  # never a point twice, even among identical ones
    return Cover(chosen, radii, nearest, np.sqrt(best))


def shares(sizes: Sequence[int], budget: int, how: str) -> list[int]:
    """Split ``budget`` over groups of these sizes, ``proportional`` or ``equal``; no group gets more than it has.

    Every group gets one as long as the budget lasts, the largest groups first. Proportional rounds by largest
    remainder; equal gives what small groups cannot use to the others.
    """
    budget = min(budget, sum(sizes))
    given = [0] * len(sizes)
    by_size = sorted(range(len(sizes)), key=lambda g: -sizes[g])
    for group in by_size[:budget]:
        given[group] = 1
    total = sum(sizes)
    for _ in range(budget - sum(given)):
        open_groups = [g for g in range(len(sizes)) if given[g] < sizes[g]]
        target = (lambda g: budget * sizes[g] / total) if how == "proportional" else (lambda _: budget / len(sizes))
        given[max(open_groups, key=lambda g: (target(g) - given[g], -g))] += 1
    return given


def k_center(params: KCenterParams, ctx: StageContext) -> StageResult:
    """Keep the budget's rows that cover all others best; the rest is dropped with its distance to a kept row.

    Kept rows stay in the order of the file; ``meta.scores`` holds the rank and the distance at which each was taken.

    Raises:
        UserError: the teacher's embedding is asked for and there is no teacher.
    """
    rows = read_rows(ctx.inputs["data"])
    budget = params.rows if params.rows is not None else max(round(params.share * len(rows)), 1)
    if budget >= len(rows):
        note = f"{len(rows)} rows are within the budget of {budget}: nothing dropped"
        return finish(ctx, rows, [], do="", metrics={"budget": budget, "radius": 0.0}, notes=[note])
    points = embed(rows, params, ctx)
    groups: dict[str | None, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(label_of(row) if params.stratify != "none" else None, []).append(index)
    members = [np.array(group) for group in groups.values()]
    budgets = shares([len(group) for group in members], budget, params.stratify)
    kept: dict[int, Row] = {}
    dropped: dict[int, Dropped] = {}
    radii = []
    for group, size in zip(members, budgets, strict=True):
        if size == 0:
            dropped.update({int(i): Dropped(rows[i], "outside the budget", "label without a share") for i in group})
            continue
        cover = farthest_points(points[group], size)
        radii.append(cover.radius)
        kept_here, dropped_here = _sort(rows, group, cover, stage=ctx.name)
        kept.update(kept_here)
        dropped.update(dropped_here)
    metrics = {"budget": budget, "radius": round(max(radii), 6), "groups": len(members), "embedding": params.embedding}
    return finish(
        ctx,
        [row for _, row in sorted(kept.items(), key=lambda item: item[0])],
        [lost for _, lost in sorted(dropped.items(), key=lambda item: item[0])],
        do="Raise the budget",
        metrics=metrics,
        notes=["no row has a label or calls a function: one selection over all"]
        if params.stratify != "none" and len(members) == 1
        else [],
    )


def _sort(
    rows: Sequence[Row], group: NDArray[np.int64], cover: Cover, *, stage: str
) -> tuple[dict[int, Row], dict[int, Dropped]]:
    """One group's rows, kept and dropped, by their numbers."""
    kept: dict[int, Row] = {}
    dropped: dict[int, Dropped] = {}
    for rank, chosen in enumerate(cover.chosen):
        index = int(group[chosen])
        at = round(float(cover.radii[rank - 1]), 6) if rank else None  # the first one is far from nothing
        kept[index] = rows[index].with_scores(stage, rank=rank, distance=at)
    for place, index in enumerate(group.tolist()):
        if index not in kept:
            center = rows[int(group[cover.nearest[place]])].id
            dropped[index] = Dropped(rows[index], "outside the budget", f"{cover.distance[place]:.3f} from {center}")
    return kept, dropped


def embed(rows: Sequence[Row], params: KCenterParams, ctx: StageContext) -> NDArray[np.float32]:
    """Points of length 1, (rows, width) float32, from the teacher or from hashed n-grams."""
    if params.embedding == "hashed":
        return hashed([_content(row, params.of) for row in rows], dims=params.dims)
    teacher = ctx.teacher
    if teacher is None:
        raise UserError(f"{ctx.name}.embedding", "teacher, but the profile names none", "hashed", "Or set teacher")

    def measure(chunk: Sequence[Row]) -> NDArray[np.float32]:
        return np.asarray(teacher.embed(_tokens(chunk, teacher.tokenizer, params)), dtype=np.float32)

    name, what = "embedding", "embed"
    found = map_chunks(rows, measure, folder=ctx.work, name=name, size=CHUNK, progress=ctx.progress, what=what)
    return normalised(found)


def _content(row: Row, of: str) -> str:
    if not row.is_chat:
        return row.text
    return "\n".join(m["content"] for m in (row.messages if of == "all" else row.prompt))


def _tokens(rows: Sequence[Row], tokenizer: PreTrainedTokenizerFast, params: KCenterParams) -> list[TokenRow]:
    """What the teacher embeds: texts whole, chats whole or up to the answer (which may then be missing)."""
    if params.of == "all":
        return encode_rows(rows, tokenizer, max_tokens=params.max_tokens, truncate=True)
    found = []
    for row in rows:
        if row.is_chat:
            ids = tuple(encode_prompt(row.prompt, tokenizer)[: params.max_tokens])
            found.append(TokenRow(row.id, ids, (0,) * len(ids)))
        else:
            found += encode_rows([row], tokenizer, max_tokens=params.max_tokens, truncate=True)
    return found
