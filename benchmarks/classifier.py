"""What a teacher wins for a small classifier with few labels, and what its attributions add, at equal steps.

    python -m benchmarks.classifier SNIPS [--seeds 3] [--steps 150] [--labels 3] [--rows 300] [--teacher-rows 1500]
        [--teacher-steps 200] [--points 32] [--only NAME ...]

SNIPS is the folder of the intent data (``train_*.json``, ``validate_*.json``). The teacher is trained here, from
random weights, on the labels of ``--teacher-rows`` rows; the students see ``--labels`` labels per class and ``--rows``
rows without. Every line has the same start, steps and order, drawn by the seed; lines with ``few`` never see the rows
without a label. The controls learn from attributions whose tokens were shuffled within each row, or from a teacher
whose classes were shuffled among the rows; ``40 % wrong`` gives that share of the rows the scores of other classes.
Prints a Markdown table: on rows that no step saw, accuracy, macro F1, agreement with the teacher, calibration error,
and the cosine of the student's and the teacher's attributions (on the first 140).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from compress.context import StageContext
from compress.data.rows import Row, make_row, write_rows
from compress.encoding import load_tokenizer
from compress.model.checkpoint import load_model
from compress.model.distillation.classifier import stage
from compress.model.distillation.classifier.attributions import attribution_distance
from compress.model.distillation.classifier.model import calibration_error
from compress.model.distillation.classifier.params import ClassifierParams
from compress.model.distillation.classifier.rows import ClassTable, Questions, read_questions
from compress.model.distillation.classifier.scoring import attention_scores, class_scores
from compress.model.distillation.classifier.teacher import Taught, Teacher, explain, teach
from compress.progress import Progress
from compress.teachers import open_teacher

FEW, WRONG = "few", 0.4
WAYS: dict[str, dict[str, Any]] = {
    "labels, few": {"kd_weight": 0.0},
    "labels, few, attributions": {"kd_weight": 0.0, "attribution_weight": 1.0},
    "labels, few, shuffled attributions": {"kd_weight": 0.0, "attribution_weight": 1.0},
    "soft labels, few": {"kd_weight": 0.9},
    "teacher's classes as labels": {"kd_weight": 0.0, "unlabelled": "teacher"},
    "soft labels": {"kd_weight": 0.9},
    "soft labels, attributions": {"kd_weight": 0.9, "attribution_weight": 1.0},
    "soft labels, shuffled attributions": {"kd_weight": 0.9, "attribution_weight": 1.0},
    "soft labels, shuffled teacher": {"kd_weight": 0.9},
    "teacher's classes as labels, 40 % wrong": {"kd_weight": 0.0, "unlabelled": "teacher"},
    "soft labels, 40 % wrong": {"kd_weight": 0.9},
}
SPECIAL = ("<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "<|bos|>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANSWERS = {
    "AddToPlaylist": "add to playlist", "BookRestaurant": "book restaurant", "GetWeather": "get weather",
    "PlayMusic": "play music", "RateBook": "rate book", "SearchCreativeWork": "search work",
    "SearchScreeningEvent": "search screening",
}  # fmt: skip


def read_snips(folder: Path, split: str) -> list[Row]:
    """Rows of all intents, one after the other in turn, each text once."""
    by_class = []
    for path in sorted(folder.glob(f"{split}_*.json")):
        name = path.stem.removeprefix(f"{split}_")
        talks = json.loads(path.read_text(encoding="utf-8", errors="replace"))[name]
        texts = dict.fromkeys("".join(part["text"] for part in talk["data"]).strip() for talk in talks)
        by_class.append([make_row(text=text, label=name) for text in texts if text])
    return [row for rows in zip(*by_class, strict=False) for row in rows]


def new_teacher(folder: Path, texts: list[str]) -> None:
    """Save a tokenizer of 1024 entries, trained on ``texts``, and a random model of 4 layers."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|end|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=plain.get_vocab_size(), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=4, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def run(
    params: ClassifierParams, data: Path, teacher: Path, out: Path, *, seed: int, start: Path | None = None
) -> None:
    """Train one model into ``out``."""
    work = out.with_suffix(".work")
    work.mkdir(parents=True)
    out.mkdir()
    inputs = {"data": data} | ({} if start is None else {"model": start})
    ctx = StageContext(
        name="model.distillation.classifier", inputs=inputs, out=out, work=work, seed=seed,
        progress=Progress(quiet=True), teacher=open_teacher(teacher), threads=1,
    )  # fmt: skip
    stage.distill(params, ctx)


def spoiled(way: str, seed: int, known: dict[Any, Taught]) -> Any:
    """`teach`, with what it heard shuffled where ``way`` says so."""

    def heard(teacher: Teacher, questions: Questions, table: ClassTable, *rest: Any) -> Taught:
        key = teacher.params.attribution_weight, table.flat.tobytes()
        if key not in known:  # the same for several lines
            known[key] = teach(teacher, questions, table, *rest)
        return replace(known[key], scores=known[key].scores.clone())

    def wrong(teacher: Teacher, questions: Questions, table: ClassTable, *rest: Any) -> Taught:
        taught = heard(teacher, questions, table, *rest)
        draw = np.random.default_rng(seed)
        if "wrong" in way:
            scores = taught.scores.clone()
            for row in draw.choice(len(table), round(WRONG * len(table)), replace=False):
                scores[row] = scores[row].roll(int(draw.integers(1, table.classes)))
            return replace(taught, scores=scores)
        if "shuffled teacher" in way:
            return replace(taught, scores=taught.scores[torch.from_numpy(draw.permutation(len(table)))])
        assert taught.attributions is not None, "this control is of attributions"
        flat = taught.attributions.clone()
        for first, length in zip(table.starts, table.lengths, strict=True):
            own = first + np.flatnonzero(table.flat[4, first : first + length])
            flat[torch.from_numpy(own)] = flat[torch.from_numpy(draw.permutation(own))]
        return replace(taught, attributions=flat)

    return wrong if "shuffled" in way or "wrong" in way else heard


class Exam:
    """The test rows and what the teacher says of them."""

    def __init__(self, folder: Path, teacher: Path, params: ClassifierParams) -> None:
        tokenizer = load_tokenizer(teacher)
        self.questions = read_questions(folder, tokenizer, params)
        self.table = ClassTable(self.questions.asked, len(self.questions.classes))
        self.labels, self.vocab = torch.from_numpy(self.questions.labels), len(tokenizer)
        asked = Teacher(load_model(teacher), tokenizer, self.vocab, params)
        self.scores = asked.all_scores(self.table)
        self.tree = self.table.batch(np.arange(140))
        self.why, difference = explain(asked, self.tree, self.scores[:140].argmax(1))
        self.gap = float((self.why.sum(1) - difference).abs().sum() / difference.abs().sum())

    def grade(self, folder: Path) -> list[float]:
        """Accuracy, macro F1, agreement, calibration error, cosine; all in per cent but the last."""
        model = load_model(folder)
        scores = Teacher(model, load_tokenizer(folder), self.vocab, ClassifierParams()).all_scores(self.table)
        chosen = scores.argmax(1)
        right = (chosen == self.labels).float()
        both = [((chosen == k) & (self.labels == k)).sum() for k in range(scores.shape[1])]
        sides = [((chosen == k).sum() + (self.labels == k).sum()).clamp_min(1) for k in range(scores.shape[1])]
        f1 = float(np.mean([2 * int(a) / int(b) for a, b in zip(both, sides, strict=True)]))
        agree = float((chosen == self.scores.argmax(1)).float().mean())
        error = calibration_error(torch.softmax(scores, 1).amax(1), right)
        with torch.no_grad():
            heard = class_scores(model, self.tree, vocab=self.vocab, inner=True)
            assert heard.inner is not None, "asked for"
            own = attention_scores(model, heard.inner, self.tree)
        cosine = 1 - 2 * float(attribution_distance(own, self.why, self.tree.content).mean())
        return [100 * float(right.mean()), 100 * f1, 100 * agree, 100 * error, cosine]


def prepare(given: argparse.Namespace, place: Path) -> Path:
    """Train the teacher; returns its folder. Its rows are none of the students'."""
    rows = given.pool[-given.teacher_rows :]
    save(rows, place / "teacher-data")
    new_teacher(place / "random", [row.text for row in rows])
    params = ClassifierParams(
        init="checkpoint", kd_weight=0.0, answers=ANSWERS, steps=given.teacher_steps, learning_rate=2e-3,
        batch_tokens=2048, validations=2,
    )  # fmt: skip
    run(params, place / "teacher-data", place / "random", place / "teacher", seed=0, start=place / "random")
    return place / "teacher"


def save(rows: list[Row], folder: Path) -> Path:
    """Write ``rows`` as a data artifact."""
    folder.mkdir()
    write_rows(folder, rows)
    return folder


def measure(given: argparse.Namespace, place: Path, teacher: Path, exam: Exam) -> dict[str, list[list[float]]]:
    """Train and grade every way with every seed."""
    found: dict[str, list[list[float]]] = {name: [] for name in given.only or WAYS}
    known: dict[Any, Taught] = {}
    apart = given.pool[: -given.teacher_rows]
    for seed in range(given.seeds):
        draw = np.random.default_rng(seed)
        groups = [apart[7 * i : 7 * i + 7] for i in range(len(apart) // 7)]  # one of each class
        groups = [groups[i] for i in draw.permutation(len(groups))]
        few = [row for group in groups[: given.labels] for row in group]
        rest = [replace(row, label=None) for group in groups[given.labels :] for row in group][: given.rows]
        folders = save(few, place / f"few{seed}"), save(few + rest, place / f"all{seed}")
        for name, grades in found.items():
            begun = time.process_time()
            stage.teach = spoiled(name, seed, known)  # type: ignore[assignment]
            params = ClassifierParams(
                init="scratch", layers=2, heads=2, kv_heads=2, head_dim=16, hidden=32, ffn=64, steps=given.steps,
                learning_rate=given.rate, batch_tokens=2048, answers=ANSWERS, classes=sorted(ANSWERS),
                validation_rows=0, keep="last", attribution_points=given.points, **WAYS[name],
            )  # fmt: skip
            out = place / f"{name.replace(' ', '_')}-{seed}"
            run(params, folders[FEW not in name], teacher, out, seed=seed)
            grades.append(exam.grade(out))
            print(seed, name, [round(x, 2) for x in grades[-1]], f"{time.process_time() - begun:.0f} s", flush=True)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("snips", type=Path)
    for name, value in (
        ("seeds", 3), ("steps", 150), ("labels", 3), ("rows", 300), ("teacher-rows", 1500), ("teacher-steps", 200),
        ("points", 32),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--only", nargs="*", choices=list(WAYS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.pool = read_snips(given.snips, "train")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        teacher = prepare(given, place)
        known = {row.text for row in given.pool}
        test = save([row for row in read_snips(given.snips, "validate") if row.text not in known], place / "test")
        exam = Exam(test, teacher, ClassifierParams(answers=ANSWERS, attribution_points=given.points))
        print(f"{len(given.pool)} rows, {len(exam.table)} test rows; gap of the attributions {exam.gap:.2%}")
        lines = {"the teacher": [exam.grade(teacher)]} | measure(given, place, teacher, exam)
    print("\n| way | accuracy | by seed | macro F1 | agreement | calibration error | cosine |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, figures in lines.items():
        mean = np.mean(figures, axis=0)
        seeds = ", ".join(f"{one[0]:.1f}" for one in figures)
        print(f"| {name} | {mean[0]:.1f} | {seeds} | {mean[1]:.1f} | {mean[2]:.1f} | {mean[3]:.1f} | {mean[4]:.2f} |")


if __name__ == "__main__":
    main()
