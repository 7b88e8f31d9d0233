"""Instruction-driven synthesis: `magpie` lets the teacher invent requests and answer them.

Magpie (Xu et al. 2024, section 2.1): a chat model that is given nothing but its template up to the user's slot goes on
with what users ask; each request ends at the end-of-turn token and is then answered in a second, ordinary call. What
is kept must end, parse, be new and be answered with confidence; every draw that is not kept is counted by reason. The
paper filters by a reward model and an embedding distance; here the answer's own log probability and the Jaccard
similarity of letter trigrams stand in for them. Knows nothing of weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from compress.answers import Generation
from compress.context import StageContext, StageResult
from compress.data.funnel import finish
from compress.data.quality.mixes import NO_FUNCTION, count_groups, function_name, wanted_shares
from compress.data.rows import Row, canonical_json, chat_row, read_rows
from compress.data.selection.near_duplicates import normal_text
from compress.data.synthesis.novelty import Known
from compress.data.synthesis.params import MagpieParams
from compress.encoding import bare_user_prefix, decode, end_of_turn, special_ids
from compress.errors import ModelError, UserError
from compress.journal import Journal
from compress.teachers import Teacher

SOURCE = "magpie"
DRAWS_PER_ROW = 10
EXAMPLES = 20  # rejected draws kept per reason, for a look at what goes wrong
REJECTED = "rejected.jsonl"
Candidate = dict[str, Any]  # user, reject, and where it was answered: answer, logprob, finished


def magpie(params: MagpieParams, ctx: StageContext) -> StageResult:
    """Add up to ``params.rows`` invented rows behind the pool's; source ``magpie``, log probability in the scores.

    Rounds of draws are kept under ``ctx.work``, each with its own seed, so that a killed run goes on where it was and
    gives the same rows. ``rejected.jsonl`` holds some of the rejected draws of each reason.

    Raises:
        UserError: no teacher, or one that cannot continue tokens.
        ModelError: the chat template does not end a user's turn by a special token.
    """
    rows = read_rows(ctx.inputs["data"])
    author = _Author(params, _teacher(ctx))
    harvest = _Harvest.start(params, rows, stage=ctx.name)
    journal = Journal(ctx.work, "draws")
    most = params.draws if params.draws is not None else DRAWS_PER_ROW * params.rows
    with ctx.progress.bar("magpie", params.rows) as bar:
        for number, size in enumerate(_rounds(most, params.round_size)):
            before = len(harvest.added)
            candidates = journal.get(number)
            if candidates is None:
                started = time.monotonic()
                candidates = author.round(size, _seed(ctx.seed, number), harvest.known)
                journal.put(number, candidates)
                seconds = max(time.monotonic() - started, 1e-9)
                ctx.progress.say(f"magpie: round {number}, {size / seconds:.1f} draws/s, {before} rows so far")
            for candidate in candidates:
                harvest.take(candidate)
            bar.advance(len(harvest.added) - before)
            if harvest.complete:
                break
    _write_examples(ctx, harvest)
    return finish(ctx, [*rows, *harvest.added], [], do="", metrics=harvest.metrics(len(rows)), notes=harvest.notes())


def _teacher(ctx: StageContext) -> Teacher:
    if ctx.teacher is None:
        raise UserError(ctx.name, "needs a teacher, but the profile names none", "", "Set teacher in the profile")
    if "generate" not in ctx.teacher.can:
        raise UserError(
            ctx.name, "the teacher cannot continue a bare template", "a model folder", "Give a local model as teacher"
        )
    return ctx.teacher


def _rounds(most: int, size: int) -> Iterator[int]:
    for start in range(0, most, size):
        yield min(size, most - start)


def _seed(seed: int, number: int) -> int:
    """An independent seed for every round."""
    return int.from_bytes(hashlib.sha256(f"magpie/{seed}/{number}".encode()).digest()[:8], "little")


class _Author:
    """Samples requests and has those answered that are worth it."""

    def __init__(self, params: MagpieParams, teacher: Teacher) -> None:
        self.params, self.teacher = params, teacher
        self.prefix = bare_user_prefix(teacher.tokenizer)
        end = end_of_turn(teacher.tokenizer, "user")
        if end is None:
            raise ModelError(
                "chat template",
                "no special token follows the user's message, so an invented request would have no end",
                "a template that ends every turn by a special token",
            )
        self.end = end
        self.special = special_ids(teacher.tokenizer)

    def round(self, size: int, seed: int, known: Known) -> list[Candidate]:
        """``size`` draws; those that are well formed and not known yet are answered greedily."""
        params = self.params
        drawn = self.teacher.generate(
            [self.prefix] * size,
            max_new_tokens=params.max_user_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            stop_ids=[self.end],
            seed=seed,
            batch_size=params.batch_size,
        )
        found: list[Candidate] = []
        fresh: set[str] = set()  # texts to be answered in this round, once each
        for generation in drawn:
            text = decode(generation.ids, self.teacher.tokenizer).strip()
            reject = self._malformed(generation, text) or _familiar(known, text)
            if not reject and normal_text(text) in fresh:
                reject = "drawn before"
            if not reject:
                fresh.add(normal_text(text))
            found.append({"user": text, "reject": reject})
        self._answer([candidate for candidate in found if not candidate["reject"]])
        return found

    def _malformed(self, generation: Generation, text: str) -> str:
        if not generation.finished:
            return "request does not end"
        if self.special.intersection(generation.ids):
            return "special token in the request"
        if len(text) < self.params.min_chars:
            return "request too short"
        return "request is not whole characters" if "\ufffd" in text else ""

    def _answer(self, candidates: list[Candidate]) -> None:
        answers = self.teacher.answer(
            [[{"role": "user", "content": candidate["user"]}] for candidate in candidates],
            max_new_tokens=self.params.max_answer_tokens,
            batch_size=self.params.batch_size,
        )
        for candidate, answer in zip(candidates, answers, strict=True):
            candidate["answer"] = answer.text.strip()
            candidate["logprob"] = round(answer.mean_logprob, 6) if math.isfinite(answer.mean_logprob) else None
            candidate["finished"] = answer.finished


def _familiar(known: Known, text: str) -> str:
    """Why ``text`` is nothing new; empty when it is."""
    found = known.find(text)
    if found is None:
        return ""
    how, origin = found
    return f"{'near duplicate of one ' if how == 'near' else ''}{origin}"


@dataclass
class _Harvest:
    """What was kept and what was not; replaying the same candidates in the same order gives the same harvest."""

    params: MagpieParams
    stage: str
    known: Known
    limits: dict[str, int] | None  # function -> most rows; None: as they come
    labelled: bool
    added: list[Row] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Candidate]] = field(default_factory=dict)
    functions: Counter[str] = field(default_factory=Counter)
    drawn: int = 0

    @staticmethod
    def start(params: MagpieParams, rows: list[Row], *, stage: str) -> _Harvest:
        """Before the first draw: the pool's requests are known, the limits follow from the wanted mix."""
        known = Known(
            (row.user for row in rows if row.user), origin="in the pool", max_similarity=params.max_similarity
        )
        return _Harvest(params, stage, known, _limits(params, rows), any(row.label is not None for row in rows))

    @property
    def complete(self) -> bool:
        """Whether all rows are there."""
        return len(self.added) >= self.params.rows

    def take(self, candidate: Candidate) -> None:
        """Keep the candidate as a row, or count why not."""
        self.drawn += 1
        reason = candidate["reject"] or self._objection(candidate)
        if "answer" in candidate:  # answered once, never again
            self.known.add(candidate["user"], origin="drawn before", near=not reason)
        if reason:
            self.rejected[reason] += 1
            if self.rejected[reason] <= EXAMPLES:
                self.examples.setdefault(reason, []).append(candidate)
            return
        name = function_name(candidate["answer"]) if self.params.answer_format == "json" else NO_FUNCTION
        self.functions[name] += 1
        label = name if self.labelled and name != NO_FUNCTION else None
        row = chat_row(candidate["user"], candidate["answer"], label=label, source=SOURCE)
        self.added.append(row.with_scores(self.stage, logprob=candidate["logprob"]))

    def _objection(self, candidate: Candidate) -> str:
        answer = candidate["answer"]
        checks = (
            (self.complete, "not needed any more"),
            (not candidate["finished"], "answer does not end"),
            (not answer, "answer is empty"),
            (self.params.answer_format == "json" and not _is_object(answer), "answer does not parse"),
            (
                candidate["logprob"] is None or candidate["logprob"] < self.params.min_logprob,
                "answer is not confident",
            ),
        )
        plain = next((reason for failed, reason in checks if failed), "")
        # the last: another draw of the same round may have come first
        return plain or self._no_share(answer) or _familiar(self.known, candidate["user"])

    def _no_share(self, answer: str) -> str:
        if self.limits is None:
            return ""
        name = function_name(answer)
        if name not in self.limits:
            return "function is outside the mix"
        return "function has its share" if self.functions[name] >= self.limits[name] else ""

    def metrics(self, rows_in: int) -> dict[str, Any]:
        """Counts for the run record; ``drawn`` = ``added`` + all of ``rejected``."""
        return {
            "rows_in": rows_in,
            "added": len(self.added),
            "drawn": self.drawn,
            "rejected": dict(sorted(self.rejected.items())),
            "functions": dict(sorted(self.functions.items())) if self.params.answer_format == "json" else {},
        }

    def notes(self) -> list[str]:
        """What the user should know when rows are missing."""
        if self.complete:
            return []
        often = ", ".join(f"{reason}: {count}" for reason, count in self.rejected.most_common(3))
        return [f"{len(self.added)} of {self.params.rows} rows after {self.drawn} draws (most often {often})"]


def _limits(params: MagpieParams, rows: list[Row]) -> dict[str, int] | None:
    """Most rows per function, rounded up, so that together they always make ``rows``."""
    if params.mix == "free":
        return None
    counts = count_groups([name for row in rows if (name := function_name(row.answer)) != NO_FUNCTION])
    weights = params.weights if params.mix == "weights" else {k: float(v) for k, v in counts.items()}
    if not weights:
        raise UserError(SOURCE, f"mix: {params.mix}, but no answer of the pool names a function", "free or weights")
    shares = wanted_shares(weights, tempering=0.0 if params.mix == "uniform" else 1.0)
    return {name: math.ceil(round(share * params.rows, 9)) for name, share in shares.items()}


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _write_examples(ctx: StageContext, harvest: _Harvest) -> None:
    """The first few rejected draws of every reason."""
    lines = [
        canonical_json({"reason": reason, **{k: v for k, v in candidate.items() if k != "reject"}}) + "\n"
        for reason, candidates in sorted(harvest.examples.items())
        for candidate in candidates
    ]
    (ctx.out / REJECTED).write_text("".join(lines), encoding="utf-8")
