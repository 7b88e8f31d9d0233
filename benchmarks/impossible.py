"""Impossible Distillation by the quickstart's teacher: a model that only makes calls yields pairs of paraphrases.

    python -m benchmarks.impossible .edgestill [--seeds 0 1 2] [--contexts 500] [--steps 400]

The embedded teacher turns a request into a call; it has never seen a paraphrase. From the beginnings of requests in a
finished quickstart it writes requests on (``data.synthesis.impossible``), and judges a pair by its own calls: one
follows from the other where both have the same call, and that is not ``none``. What is true is known from the grammar
that the task was made with: a pair is one of paraphrases where the grammar reads the same call in both. Printed per
seed: the share of true pairs among all samples of a context, among those that pass overlap and length, among those
kept, and among the kept with their second sides dealt anew. The quickstart's distilled student then learns "say this in
other words" from as many kept, unfiltered and dealt pairs, from the labels alone, and in a second round from what it
writes itself, filtered in the same way (beside as many more steps on the first pairs): share of test requests that it
says with the same call by the grammar, and of these with a ROUGE-L of at most 0.7.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.quickstart import DATA, lines, newest
from compress.context import StageContext
from compress.data.rows import Row, chat_row, make_row, read_rows, write_rows
from compress.data.synthesis.impossible import impossible, misfit, overlap
from compress.data.synthesis.params import ImpossibleParams
from compress.encoding import bare_user_prefix, decode, end_of_turn
from compress.endpoint import Reply
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.stage import distill
from compress.progress import Progress
from compress.teachers import LocalTeacher
from profiles.quickstart.grammar import OUT_OF_SCOPE, PHRASINGS, PREFIXES, SLOT, SUFFIXES, call_json
from profiles.quickstart.slots import SLOTS, Value

ASK, JUDGE, FOLLOWS = "say this in other words: ", "judge: ", " => "
DRAWS, MOST, NEW = 20_000, 12, 40  # of a slot; pairs of a context; tokens of a request


@cache
def spellings(slot: str) -> dict[str, Value]:
    """Words of a slot -> its value."""
    draw = Random(0)
    return {words: value for value, words in (SLOTS[slot](draw) for _ in range(DRAWS))}


@cache
def patterns() -> list[tuple[str, list[str], re.Pattern[str]]]:
    """Function, slots in their order, and the expression of every line of phrasings."""

    def slot(found: re.Match[str]) -> str:
        if found.group(1) == "text":
            return "(.+?)"
        return f"({'|'.join(map(re.escape, sorted(spellings(found.group(1)), key=len, reverse=True)))})"

    before, after = ("|".join({part.strip() for part in parts}) for parts in (PREFIXES, SUFFIXES))
    found = []
    for function in PHRASINGS:
        for line in PHRASINGS[function] if function != OUT_OF_SCOPE else ():
            body = SLOT.sub(slot, line.replace("(", "(?:")).replace(" ", " *")
            found.append((function, SLOT.findall(line), re.compile(f"(?:{before}) *{body} *(?:{after})")))
    return found


@cache
def readings(text: str) -> frozenset[str]:
    """Calls that the grammar reads in a request; none where it knows no such sentence."""
    plain, found = " ".join(text.lower().strip(" .!?").split()), set()
    for function, slots, pattern in patterns():
        if match := pattern.fullmatch(plain):
            said = {name: words for name, words in zip(slots, match.groups(), strict=True) if words}
            known = {name: words if name == "text" else spellings(name)[re.sub(" +", " ", words)]
                     for name, words in said.items()}  # fmt: skip
            found.add(call_json(function, known))
    return frozenset(found)


def same(first: str, second: str) -> bool:
    """Whether the grammar reads one call in both."""
    return bool(readings(first) & readings(second))


class Talker:
    """A teacher for the stage: ``author`` writes, the embedded teacher judges by its calls."""

    can = frozenset({"answer"})
    folder = None

    def __init__(self, judge: LocalTeacher, author: LocalTeacher | None = None) -> None:
        self.judge, self.author = judge, author
        self.calls: dict[str, str] = {}
        self.written: dict[str, list[str]] = {}  # by context

    def call(self, texts: Sequence[str]) -> list[str]:
        """The embedded teacher's call of each request."""
        new = sorted({text for text in texts if text not in self.calls})
        replies = self.judge.answer([[{"role": "user", "content": text}] for text in new], max_new_tokens=64)
        self.calls |= {text: reply.text if reply.finished else "" for text, reply in zip(new, replies, strict=True)}
        return [self.calls[text] for text in texts]

    def answer(self, conversations: Sequence[Sequence[Any]], **how: Any) -> list[Reply]:
        """Judgements, or requests that begin as asked (or say what is asked in other words, of an ``author``)."""
        texts = [turns[-1]["content"] for turns in conversations]
        if texts and texts[0].startswith(JUDGE):
            sides = [text.removeprefix(JUDGE).split(FOLLOWS, 1) for text in texts]
            calls = self.call([side for pair in sides for side in pair])
            agreed = (a == b and a != call_json(OUT_OF_SCOPE, {}) for a, b in zip(calls[::2], calls[1::2], strict=True))
            return [Reply("yes" if yes else "no", 0.0, True) for yes in agreed]
        replies = self.author.answer(conversations, **how) if self.author else self._begun(texts, **how)
        for text, reply in zip(texts, replies, strict=True):
            if reply.finished and reply.text not in self.written.setdefault(text, []):
                self.written[text].append(reply.text)
        return replies

    def _begun(self, texts: Sequence[str], **how: Any) -> list[Reply]:
        tokenizer = self.judge.tokenizer
        prefix, end = bare_user_prefix(tokenizer), end_of_turn(tokenizer, "user")
        assert end is not None, "the template ends a turn by a token"
        prompts = [prefix + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        made = self.judge.generate(prompts, stop_ids=[end], **how)
        return [Reply(text + decode(g.ids, tokenizer), g.mean_logprob, g.finished)
                for text, g in zip(texts, made, strict=True)]  # fmt: skip


class Study:
    """One seed."""

    def __init__(self, root: Path, folders: dict[str, Path], args: argparse.Namespace, seed: int) -> None:
        self.root, self.args, self.seed, self.draw = root / str(seed), args, seed, Random(seed)
        self.root.mkdir()
        self.student = folders["model.distillation.logits"]
        self.judge = LocalTeacher(DATA / "teacher", threads=1, batch_size=256)
        self.requests = [row.user for row in read_rows(folders["data.quality.stabilize"])]
        tests = [row for row in lines("test.jsonl") if row["response"] != call_json(OUT_OF_SCOPE, {})]
        self.tests = [row for row in tests if row["response"] in readings(row["prompt"])][: args.rows]

    def context(self, name: str, teacher: Any, rows: Sequence[Row], **inputs: Path) -> StageContext:
        """A stage's context with ``rows`` as its data."""
        folders = [self.root / f"{name}-{kind}" for kind in ("data", "out", "work")]
        for folder in folders:
            folder.mkdir()
        write_rows(folders[0], rows)
        return StageContext("benchmark", {"data": folders[0], **inputs}, folders[1], folders[2], self.seed,
                            Progress(quiet=True), teacher=teacher, threads=1)  # fmt: skip

    def pairs(self, name: str, talker: Talker, contexts: Sequence[str], samples: int, ask: str) -> list[Row]:
        """The stage's new rows; prints what its filters do."""
        params = ImpossibleParams(pairs_per_row=MOST, samples=samples, context=ask + "{text}", request=ASK + "{text}",
                                  judge=JUDGE + "{premise}" + FOLLOWS + "{claim}", max_new_tokens=NEW)  # fmt: skip
        ctx = self.context(name, talker, [make_row(text=text) for text in contexts])
        began = time.process_time()
        figures = impossible(params, ctx).metrics
        kept = [row for row in read_rows(ctx.out) if row.source == "impossible"]
        every = [pair for texts in talker.written.values() for pair in combinations(texts, 2)]
        fit = [pair for pair in every if not misfit(*pair, params)]
        agreed = [(row.user.removeprefix(ASK), row.answer) for row in kept]
        dealt = list(zip([one for one, _ in agreed], self.draw.sample([two for _, two in agreed], len(agreed)),
                         strict=True))  # fmt: skip
        shares = {"unfiltered": every, "overlap and length": fit, "kept": agreed, "dealt": dealt}
        line = {what: [len(found), round(precision(found), 4)] for what, found in shares.items()}
        told = {"seed": self.seed, "round": name, "known_pairs_true": line, "rejected": figures["rejected"]}
        told |= {"functions": functions(agreed), "seconds": round(time.process_time() - began, 1)}
        print(json.dumps(told), flush=True)
        self.every, self.dealt = every, dealt
        return kept

    def taught(self, name: str, rows: Sequence[Row], start: Path) -> Path:
        """A student trained on the answers of ``rows``."""
        ctx = self.context(name, self.judge, rows, model=start)
        params = LogitsParams.model_validate(
            {"init": "checkpoint", "steps": self.args.steps, "batch_tokens": 1024, "learning_rate": 2e-3,
             "kd_weight": 0.0, "validation_share": 0.0, "keep": "last", "max_tokens": 128}
        )  # fmt: skip
        distill(params, ctx)
        return ctx.out

    def score(self, name: str, folder: Path) -> tuple[float, float]:
        """Share of test requests said again with the same call, and with the same call in other words."""
        asked = [[{"role": "user", "content": ASK + row["prompt"]}] for row in self.tests]
        replies = LocalTeacher(folder, threads=1).answer(asked, max_new_tokens=NEW)
        right = [row["response"] in readings(reply.text) for row, reply in zip(self.tests, replies, strict=True)]
        other = [yes and overlap(row["prompt"], reply.text) <= 0.7
                 for row, reply, yes in zip(self.tests, replies, right, strict=True)]  # fmt: skip
        found = statistics.mean(right), statistics.mean(other)
        told = {"seed": self.seed, "student": name, "same_call": found[0], "in_other_words": found[1]}
        examples = [[self.tests[i]["prompt"], replies[i].text] for i in range(3)]
        print(json.dumps(told | {"examples": examples}), flush=True)
        return found


def precision(found: Sequence[tuple[str, str]]) -> float:
    """Share of true pairs among those of which the grammar reads both sides."""
    known = [same(*pair) for pair in found if readings(pair[0]) and readings(pair[1])]
    return statistics.mean(known) if known else 0.0


def functions(found: Sequence[tuple[str, str]]) -> dict[str, int]:
    """How many pairs each function has, by the first side."""
    names = [json.loads(call)["name"] for first, _ in found for call in sorted(readings(first))[:1]]
    return {name: names.count(name) for name in sorted(set(names))}


def rows_of(found: Sequence[tuple[str, str]]) -> list[Row]:
    """Pairs as training rows."""
    return [chat_row(ASK + first, second) for first, second in found]


def one_seed(study: Study) -> dict[str, tuple[float, float]]:
    """Both rounds, and the students."""
    args, draw = study.args, study.draw
    begins = {" ".join(text.split()[: draw.choice((1, 2, 2, 3))]) for text in study.requests}
    contexts = draw.sample(sorted(begins), args.contexts)
    kept = study.pairs("first", Talker(study.judge), contexts, args.samples, "")
    unfiltered, dealt = draw.sample(study.every, len(kept)), study.dealt
    first = study.taught("kept", kept, study.student)
    found = {"not taught": study.score("not taught", study.student), "kept pairs": study.score("kept pairs", first)}
    for name, pairs in (("unfiltered pairs", unfiltered), ("dealt pairs", dealt)):
        found[name] = study.score(name, study.taught(name.replace(" ", "-"), rows_of(pairs), study.student))
    author = LocalTeacher(first, threads=1, batch_size=256)
    own = study.pairs("second", Talker(study.judge, author), draw.sample(study.requests, args.contexts), 8, ASK)
    again = study.taught("again", own, first) if own else first
    found["then its own filtered pairs"] = study.score("then its own filtered pairs", again)
    found["then the kept pairs once more"] = study.score("then once more", study.taught("more", kept, first))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="the store of a finished quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contexts", type=int, default=500)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=300, help="test rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            for name, scores in one_seed(Study(Path(scratch), newest(args.store)[0], args, seed)).items():
                found.setdefault(name, []).append(scores)
    print("\n| student | same call | seeds | same call in other words | seeds |\n|---|---|---|---|---|")
    for name, values in found.items():
        columns = [[value[which] for value in values] for which in (0, 1)]
        cells = [f"{statistics.mean(v):.1%} | {' '.join(f'{100 * x:.1f}' for x in v)}" for v in columns]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
