"""Impossible Distillation: a weak model's samples in pairs, kept where both say the same in other words.

Jung et al. 2023, section 2: sentences sampled after one context lie close together, so that some pairs among them are
paraphrases although the model cannot paraphrase; filters find those. Kept is a pair whose sides entail each other,
share few words in order and are about as long. The paper's NLI model is a judge's prompt here. For the second round
(self-distillation) name the trained student as the teacher. Knows nothing of weights.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from compress.context import StageContext, StageResult
from compress.data.asking import Asker
from compress.data.funnel import finish
from compress.data.rows import Row, canonical_json, chat_row, read_rows
from compress.data.selection.near_duplicates import normal_text
from compress.data.synthesis.params import ImpossibleParams

SOURCE = "impossible"
CHUNK = 64  # contexts sampled and judged between two checkpoints
EXAMPLES = 20  # rejected pairs kept per reason
REJECTED = "rejected.jsonl"
ONE_WAY, FULL, KNOWN = "not entailed both ways", "context has its pairs", "pair is known"
Pair = dict[str, str]  # first, second, reject


def impossible(params: ImpossibleParams, ctx: StageContext) -> StageResult:
    """Add the pairs that pass behind the pool's rows; source ``impossible``, the context's id in ``meta``.

    Samples and judgements are kept under ``ctx.work``, so that a killed run goes on where it was and gives the same
    rows. ``rejected.jsonl`` holds some of the refused pairs of each reason; the figures count them all.

    Raises:
        UserError: there is no teacher.
    """
    asker = Asker(ctx)
    rows = read_rows(ctx.inputs["data"])
    contexts = [row for row in rows if row.user.strip() or row.text.strip()] if params.pairs_per_row else []
    added: list[Row] = []
    seen: set[tuple[str, str]] = set()
    rejected, examples = Counter[str](), dict[str, list[Pair]]()
    with ctx.progress.bar("impossible", len(contexts)) as bar:
        for number, start in enumerate(range(0, len(contexts), CHUNK)):
            chunk = contexts[start : start + CHUNK]
            groups = _judged(_samples(chunk, params, asker, _seed(ctx.seed, number), start), params, asker, start)
            for row, pairs in zip(chunk, groups, strict=True):
                kept = 0
                for pair in pairs:
                    key = (normal_text(pair["first"]), normal_text(pair["second"]))
                    late = FULL if kept >= params.pairs_per_row else KNOWN if key in seen else ""
                    if reason := pair["reject"] or late:
                        rejected[reason] += 1
                        examples.setdefault(reason, []).append(pair)
                        continue
                    kept += 1
                    seen |= {key, key[::-1]}
                    user = params.request.replace("{text}", pair["first"])
                    added.append(chat_row(user, pair["second"], source=SOURCE, context=row.id))
            bar.advance(len(chunk))
    _write_examples(ctx, examples)
    metrics = {
        "rows_in": len(rows),
        "added": len(added),
        "pairs": len(added) + sum(rejected.values()),
        "rejected": dict(sorted(rejected.items())),
    }
    often = ", ".join(f"{reason}: {count}" for reason, count in rejected.most_common(3))
    notes = [f"no pair passed ({often or 'no two different samples'})"] if contexts and not added else []
    return finish(ctx, [*rows, *added], [], do="", metrics=metrics, notes=notes + asker.notes())


def overlap(first: str, second: str) -> float:
    """ROUGE-L F1 of the words, case ignored: twice the longest common subsequence over both lengths; 0 to 1."""
    one, two = first.lower().split(), second.lower().split()
    if not one or not two:
        return 0.0
    line = [0] * (len(two) + 1)
    for word in one:
        before = 0
        for at, other in enumerate(two, start=1):
            before, line[at] = line[at], before + 1 if word == other else max(line[at], line[at - 1])
    return 2 * line[-1] / (len(one) + len(two))


def misfit(first: str, second: str, params: ImpossibleParams) -> str:
    """Why a pair is no training pair before anyone is asked what it means; empty when it may be one."""
    short, long = sorted((len(first.split()), len(second.split())))
    if short < params.min_words:
        return "side too short"
    if short < params.min_length_ratio * long:
        return "lengths differ"
    return "too alike" if overlap(first, second) > params.max_overlap else ""


def says_yes(text: str) -> bool:
    """Whether a judge's answer begins with the word yes."""
    return (text.lower().split() or [""])[0].strip(".,!:;\"'*") == "yes"


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"impossible/{seed}/{number}".encode()).digest()[:4], "little") >> 1


def _samples(rows: Sequence[Row], params: ImpossibleParams, asker: Asker, seed: int, start: int) -> list[list[str]]:
    """Different finished samples of every context, in the order drawn; each draw has its own seed.

    ``start`` is the number of the first of ``rows``, which tells this call from the others.
    """
    asked = [
        [{"role": "user", "content": params.context.replace("{text}", (row.user or row.text).strip())}] for row in rows
    ]
    found: list[dict[str, str]] = [{} for _ in rows]
    for draw in range(params.samples):
        replies = asker.answers(
            asked,
            place=f"samples/{start}/{draw}",
            max_new_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            seed=(seed + draw) % 2**31,
        )
        for texts, reply in zip(found, replies, strict=True):
            text = reply.text.strip()
            if reply.finished and text:
                texts.setdefault(normal_text(text), text)
    return [list(texts.values()) for texts in found]


def _judged(samples: Sequence[Sequence[str]], params: ImpossibleParams, asker: Asker, start: int) -> list[list[Pair]]:
    """All pairs of every context; the judge is asked about those alone that fit. ``start`` as for `_samples`."""
    groups: list[list[Pair]] = [
        [{"first": a, "second": b, "reject": misfit(a, b, params)} for a, b in combinations(texts, 2)]
        for texts in samples
    ]
    fitting = [pair for group in groups for pair in group if not pair["reject"]]
    for one, two in (("first", "second"), ("second", "first")):
        open_pairs = [pair for pair in fitting if not pair["reject"]]
        if not open_pairs:
            break
        asked = [[{"role": "user", "content": "".join(_question(params, p[one], p[two]))}] for p in open_pairs]
        replies = asker.answers(asked, place=f"judged/{start}/{one}", max_new_tokens=params.max_judge_tokens)
        for pair, reply in zip(open_pairs, replies, strict=True):
            pair["reject"] = "" if says_yes(reply.text) else ONE_WAY
    return groups


def _question(params: ImpossibleParams, premise: str, claim: str) -> Iterator[str]:
    """The judge's prompt in pieces; split first, so that a text that holds a placeholder stays as it is."""
    for at, part in enumerate(params.judge.split("{premise}")):
        if at:
            yield premise
        yield claim.join(part.split("{claim}"))


def _write_examples(ctx: StageContext, examples: dict[str, list[Pair]]) -> None:
    lines: list[Any] = [{**p, "reject": why} for why, pairs in sorted(examples.items()) for p in pairs[:EXAMPLES]]
    (ctx.out / REJECTED).write_text("".join(canonical_json(line) + "\n" for line in lines), encoding="utf-8")
