"""Does a student that learns from its own text write what its teacher finds likely? At equal steps and equal time.

    python -m benchmarks.on_policy MODEL TEXTS --warm 300 --steps 60 [--only NAME ...]

MODEL is a checkpoint folder, TEXTS a file of stories with <|endoftext|> between them. Every way starts from the same
student of half the teacher's size, distilled for ``--warm`` steps on the rows, and gets the same rows, steps and rate;
``X, time of Y`` is X for as many steps as fit into the time of Y. ``gkd, forward`` takes KL(teacher || student) on the
student's own text too, ``gkd, replay`` takes half of the student's texts from those kept, ``gkd, adaptive share``
begins without such texts and judges its held-out loss every third step. ``shuffled`` is GKD towards a teacher of
shuffled layers, the negative control.
For each: the held-out KL to its teacher, and the true teacher's loss on 128 texts that the student then writes, nats
per token. Times are of the processor, one thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compress.context import StageContext
from compress.data.rows import make_row, write_rows
from compress.encoding import load_tokenizer, stop_ids
from compress.model.checkpoint import load_model, save_model
from compress.model.distillation.on_policy_params import GkdParams, MiniLlmParams, SpeculativeParams
from compress.model.distillation.on_policy_stage import gkd, minillm, speculative
from compress.model.distillation.params import LogitsParams
from compress.model.distillation.rollouts import Ask, Drawing, Rollout, sample
from compress.model.distillation.stage import distill
from compress.progress import Progress
from compress.teachers import open_teacher

PROMPT, NEW, TEXTS, ROWS = 8, 100, 128, 1500


def written(student: Any, rows: list[tuple[int, ...]], stops: tuple[int, ...], vocab: int) -> list[Rollout]:
    """What the student writes after the beginnings of unseen texts."""
    asks = [Ask(ids[:PROMPT], NEW, 0, row) for row, ids in enumerate(rows)]
    return sample(student, asks, Drawing(vocab, stops, seed=77))


@torch.inference_mode()
def teacher_loss(teacher: Any, made: list[Rollout]) -> float:
    """Mean negative log-probability of the written tokens under the teacher."""
    total, count = 0.0, 0
    for text in made:
        logits = teacher(input_ids=torch.tensor([text.ids])).logits[0, text.start - 1 : -1]
        picked = torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(text.ids[text.start :])[:, None])
        total, count = total - float(picked.sum()), count + len(picked)
    return total / count


def shuffled(model: Path, folder: Path) -> Path:
    """The model with its layers in another order: of the same size, and no teacher."""
    broken = load_model(model)
    layers = broken.model.layers
    broken.model.layers = torch.nn.ModuleList([layers[i] for i in (2, 0, 3, 1, *range(4, len(layers)))])
    save_model(broken, folder, tokenizer_from=model)
    return folder


def one(
    root: Path, name: str, way: Any, params: Any, *, teacher: Path, seed: int, start: Path | None = None
) -> tuple[Path, float, dict[str, Any]]:
    """Run a way; its folder, training seconds and figures."""
    out, work = root / f"{name}-{seed}", root / f"{name}-{seed}-work"
    out.mkdir()
    work.mkdir()
    ctx = StageContext(
        name=f"model.distillation.{name}",
        inputs={"data": root / "data"} | ({} if start is None else {"model": start}),
        out=out,
        work=work,
        seed=seed,
        progress=Progress(quiet=True),
        teacher=open_teacher(teacher),
        threads=1,
    )
    began = time.process_time()
    result = way(params, ctx)
    return out, time.process_time() - began, result.metrics


def ways(base: dict[str, Any], own: dict[str, Any]) -> dict[str, tuple[Any, type[LogitsParams], dict[str, Any]]]:
    """Name -> stage function, its parameters' model, and the parameters."""
    with_own = base | own
    rising = {"on_policy_share": 0.0, "share_schedule": "adaptive", "validations": base["steps"] // 3}
    return {
        "logits": (distill, LogitsParams, base),
        "gkd, forward": (gkd, GkdParams, with_own | {"made_divergence": "forward_kl"}),
        "gkd": (gkd, GkdParams, with_own),
        "gkd, replay": (gkd, GkdParams, with_own | {"replay_share": 0.5}),
        "gkd, adaptive share": (gkd, GkdParams, with_own | rising),
        "speculative": (speculative, SpeculativeParams, with_own),
        "minillm": (minillm, MiniLlmParams, with_own),
        "shuffled": (gkd, GkdParams, with_own),
    }


SAME_TIME = {  # name -> what is run, and whose time it gets
    "logits, time of gkd": ("logits", "gkd"),
    "logits, time of speculative": ("logits", "speculative"),
    "logits, time of minillm": ("logits", "minillm"),
    "gkd, replay, time of gkd": ("gkd, replay", "gkd"),
}


def arguments(known: Sequence[str]) -> argparse.Namespace:
    """The command line; ``only`` holds what is run, with all that it hangs on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warm", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--only", nargs="+", choices=known, default=list(known))
    args = parser.parse_args()
    args.only = {*args.only, *(name for late in args.only for name in SAME_TIME.get(late, ()))}
    return args


def prepare(root: Path, args: argparse.Namespace) -> list[str]:
    """Write the rows into ``root``; the stories that no student sees."""
    text = args.texts.read_text(encoding="utf-8")
    stories = [part.strip() for part in text.split("<|endoftext|>") if part.strip()]
    (root / "data").mkdir()
    write_rows(root / "data", [make_row(text=text) for text in stories[TEXTS : TEXTS + ROWS]])
    return stories[:TEXTS]


def show(found: dict[str, list[tuple[float, float, float]]]) -> None:
    """Means, and the losses of the seeds."""
    for name, values in found.items():
        means = [sum(column) / len(values) for column in zip(*values, strict=True)]
        losses = ", ".join(f"{value[0]:.3f}" for value in values)
        print(f"{name:28} teacher's loss {means[0]:.3f} ({losses}), KL {means[1]:.3f}, {means[2]:.1f} s", flush=True)


class Judge:
    """The true teacher, and what a student writes for it."""

    def __init__(self, model: Path, stories: Sequence[str]) -> None:
        tokenizer = load_tokenizer(model)
        self.unseen = [(1, *tokenizer(text, add_special_tokens=False)["input_ids"]) for text in stories]
        self.teacher, self.stops, self.vocab = load_model(model), stop_ids(tokenizer), len(tokenizer)

    def loss(self, student: Any) -> float:
        """The teacher's loss on what ``student`` writes."""
        return teacher_loss(self.teacher, written(student, self.unseen, self.stops, self.vocab))


def main() -> None:
    """Print a line for every way and seed, then the means."""
    own: dict[str, Any] = {"prompt_tokens": PROMPT, "max_new_tokens": NEW}
    args = arguments([*ways({"steps": 60}, own), *SAME_TIME])
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp())
    judge = Judge(args.model, prepare(root, args))
    no_teacher = shuffled(args.model, root / "shuffled")
    common = {"batch_tokens": 2048, "max_tokens": 128, "truncate": True, "kd_weight": 1.0, "targets": "online"}
    cold = {"steps": args.warm, "learning_rate": 4e-3, "validations": 2, "prune_ratio": 0.5, "multiple_of": 4}
    warm = LogitsParams.model_validate(common | cold)
    start, took, figures = one(root, "start", distill, warm, teacher=args.model, seed=99)
    loss = judge.loss(load_model(start))
    print(f"the start: teacher's loss {loss:.3f}, KL {figures['validation_kl']:.3f}, {took:.1f} s", flush=True)
    base = common | {"steps": args.steps, "learning_rate": args.rate, "validations": 4, "init": "checkpoint",
                     "keep": "last"}  # fmt: skip
    known = ways(base, own | {"on_policy_share": args.share})
    found: dict[str, list[tuple[float, float, float]]] = {}
    for seed in args.seeds:
        seconds: dict[str, float] = {}
        for name in [name for name in (*known, *SAME_TIME) if name in args.only]:
            what, whose = SAME_TIME.get(name, (name, name))
            way, kind, chosen = known[what]
            steps = args.steps if what == name else max(1, round(args.steps * seconds[whose] / seconds[what]))
            params = kind.model_validate(chosen | {"steps": steps})
            guide = no_teacher if name == "shuffled" else args.model
            out, took, figures = one(root, name, way, params, teacher=guide, seed=seed, start=start)
            seconds[name], loss = took, judge.loss(load_model(out))
            found.setdefault(name, []).append((loss, figures["validation_kl"], took))
            line = {"way": name, "seed": seed, "teacher_loss": round(loss, 4), "kl": round(figures["validation_kl"], 4),
                    "seconds": round(took, 1), "steps": figures["steps"], "own": figures.get("own_tokens"),
                    "made_steps": figures.get("made_steps"), "share": figures.get("on_policy_share")}  # fmt: skip
            print(json.dumps(line), flush=True)
        show(found)
    print(f"the teacher's own texts: {judge.loss(judge.teacher):.3f}")


if __name__ == "__main__":
    main()
