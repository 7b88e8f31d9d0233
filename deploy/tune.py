"""Finds the settings under which a bundle runs fastest on this machine, and writes a bundle that has them.

`tune` measures in processes of their own, two at a time (`deploy.tune_search` says which), holds the quality against
the bundle as it was, and writes the winner into ``genai_config.json`` and into ``tuned`` of ``bundle.json``, where
`deploy.runners`, the benchmark and the bundle's own script find it. The new bundle takes its place in one rename: a
killed tune leaves what was there. Group sizes are those of the checkpoint's codes and stay. Imports no torch.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import ModelError, ParityError, UserError
from compress.progress import Progress
from compress.store import MANIFEST
from deploy.bundle import BUNDLE_FILE, Bundle, open_bundle, write_bundle
from deploy.params import PROMPTS, TuneParams
from deploy.runners import GenaiRunner
from deploy.tune_search import Judges, NotMeasurable, Rules, Setting, Timing, Trial, search
from deploy.variants import MODEL_FILE, accuracy_copy
from evaluators.agreement import compare

GENAI_CONFIG = "genai_config.json"
SPINNING, AFFINITIES = "session.intra_op.allow_spinning", "session.intra_op_thread_affinities"
_THREADS = ("intra_op_num_threads", "inter_op_num_threads")
_TIME_LIMIT_S = 300  # of one answer of a measuring process
_SAME_KL = 1e-4  # nats per token that a setting may cost which changes no arithmetic
_CHECKED_TOKENS = 64  # of each text on which the quality is held


@dataclass(frozen=True)
class Tuned:
    """What a tune found: the bundle it wrote, the setting, and the figures before and after."""

    folder: Path
    setting: Setting
    trials: list[Trial]
    measured: dict[str, Any]


def tune(bundle: Path, out: Path, params: TuneParams, *, device: str, progress: Progress | None = None) -> Tuned:
    """Tune the bundle in ``bundle`` for this machine (which ``device`` names) into ``out``, which may be ``bundle``.

    Raises:
        ModelError: the bundle is damaged or does not run here.
        UserError: ``out`` is taken, or lies in a store.
        ParityError: the tuned bundle computes something else.
    """
    opened = open_bundle(bundle)
    opened.need("onnx")
    _check_place(bundle, out)
    context = int(opened.info["onnx"]["context_tokens"])
    if params.prompt_tokens + params.new_tokens > context:
        got = f"prompt_tokens {params.prompt_tokens} and new_tokens {params.new_tokens}"
        raise UserError("tune", got, f"at most {context} together, the bundle's context")
    say = (progress or Progress(quiet=True)).say
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-tune-", dir=out.parent) as temporary:
        base = Path(temporary) / "base"
        _copy_untuned(opened, base)
        start = starting_point(opened)
        with Workers(base, params) as workers:
            quality = _Quality(workers, params.max_kl, start.accuracy_level)
            best, trials, figures = _find(start, params, workers, quality, say)
        made = Path(temporary) / "made"
        measured = figures | {"candidates": [trial.facts() for trial in trials]}
        _write(base, made, best, opened, {"device": device, "measured": measured})
        numeric = best.accuracy_level != start.accuracy_level
        _hold_quality(base, made, params.max_kl if numeric and best.accuracy_level == 4 else None, numeric)
        _put(made, out)
    return Tuned(out, best, trials, measured)


def starting_point(bundle: Bundle) -> Setting:
    """The setting of an untuned bundle on this machine."""
    config = json.loads((bundle.folder / GENAI_CONFIG).read_text(encoding="utf-8"))
    return Setting(
        threads=len(_cores()),
        share_buffer=bool(config["search"].get("past_present_share_buffer", False)),
        accuracy_level=4 if int(bundle.info["onnx"]["accuracy_level"]) == 4 else 1,
    )


def values(cores: int, prompt_tokens: int) -> dict[str, list[Any]]:
    """What is worth trying per knob on a machine of so many ``cores``, in the order of what it usually brings."""
    counts = {cores, cores - 1, cores // 2, *(1 << power for power in range(cores.bit_length()))}
    found: dict[str, list[Any]] = {
        "threads": sorted((count for count in counts if 1 <= count <= cores), reverse=True),
        "accuracy_level": [4, 1],
        "spinning": [True, False],
        "share_buffer": [True, False],
    }
    if cores > 1 and hasattr(os, "sched_getaffinity"):
        found["pinned"] = [False, True]
    chunks = [size for size in (512, 256, 128, 64, 32) if size < prompt_tokens]
    if chunks:
        found["prefill_chunk"] = [None, *chunks]
    return found


def _find(
    start: Setting, params: TuneParams, workers: Workers, quality: _Quality, say: Callable[[str], None]
) -> tuple[Setting, list[Trial], dict[str, Any]]:
    """Search within the budget and time start against winner once more."""
    ends = time.monotonic() + params.budget_s
    say(f"searching for {params.budget_s:g} s")
    judges = Judges(workers.measure, quality.refuse, lambda: time.monotonic() >= ends)
    rules = Rules(params.new_tokens, params.rounds, params.margin)
    space = values(len(_cores()), params.prompt_tokens)
    try:
        workers.measure(start)
    except NotMeasurable as error:
        raise ModelError(str(workers.base), f"does not run here: {error}") from error
    best, trials = search(start, space, rules, judges)
    pairs = [(workers.measure(start), workers.measure(best)) for _ in range(params.rounds)]
    figures = {
        "before": _rates([before for before, _ in pairs], params),
        "after": _rates([after for _, after in pairs], params),
        "prompt_tokens": params.prompt_tokens,
        "new_tokens": params.new_tokens,
        "load_average": os.getloadavg()[0],
    }
    return best, trials, figures


def _rates(timings: Sequence[Timing], params: TuneParams) -> dict[str, float]:
    prefill, decode = (float(np.median([getattr(t, name) for t in timings])) for name in ("prefill_s", "decode_s"))
    return {"prefill_tokens_per_s": params.prompt_tokens / prefill, "decode_tokens_per_s": 1 / decode}


def _cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def session_entries(setting: Setting) -> dict[str, str]:
    """The runtime's session entries for ``setting``; none where its own defaults are meant."""
    found = {} if setting.spinning else {SPINNING: "0"}
    if setting.pinned and setting.threads > 1:  # one place for each thread but the caller's; cores count from 1 here
        found[AFFINITIES] = ";".join(str(core + 1) for core in _cores()[1 : setting.threads])
    return found


def search_entries(setting: Setting) -> dict[str, Any]:
    """The runtime's search entries for ``setting``."""
    chunk = {} if setting.prefill_chunk is None else {"chunk_size": setting.prefill_chunk}
    return {"past_present_share_buffer": setting.share_buffer, **chunk}


class Workers:
    """Measuring processes over the bundle in ``base``; at most two live at a time, since each holds the model."""

    def __init__(self, base: Path, params: TuneParams) -> None:
        self.base, self.params = base, params
        self.live: dict[Setting, subprocess.Popen[str]] = {}
        self.graphs: dict[int, Path] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for setting in list(self.live):
            self._stop(setting)

    def graph(self, level: int) -> Path:
        """The folder whose model computes at accuracy ``level``."""
        if level not in self.graphs:
            folder = self.base.with_name(f"level-{level}")
            folder.mkdir()
            self.graphs[level] = folder if accuracy_copy(self.base, folder, level) else self.base
        return self.graphs[level]

    def measure(self, setting: Setting) -> Timing:
        """Time one request under ``setting``. Raises NotMeasurable when its process fails."""
        if setting not in self.live:
            while len(self.live) > 1:
                self._stop(next(iter(self.live)))
            self.live[setting] = self._start(setting)
        process = self.live[setting] = self.live.pop(setting)  # the one used last comes last
        assert process.stdin is not None, "opened with a pipe"
        try:
            process.stdin.write("\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise NotMeasurable(self._stop(setting)) from None
        return Timing(**self._answer(setting))

    def _start(self, setting: Setting) -> subprocess.Popen[str]:
        request = {
            "folder": str(self.graph(setting.accuracy_level).resolve()),
            "threads": setting.threads,
            "session": session_entries(setting),
            "search": search_entries(setting),
            "prompt_tokens": self.params.prompt_tokens,
            "new_tokens": self.params.new_tokens,
        }
        path = os.pathsep.join(p for p in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")) if p)
        process = subprocess.Popen(  # noqa: S603 - our own module, arguments as a list
            [sys.executable, "-P", "-m", "deploy.tune_worker", json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        self.live[setting] = process
        self._answer(setting)
        return process

    def _answer(self, setting: Setting) -> dict[str, Any]:
        process = self.live[setting]
        assert process.stdout is not None, "opened with a pipe"
        watch = threading.Timer(_TIME_LIMIT_S, process.kill)
        watch.start()
        try:
            line = process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            raise NotMeasurable(self._stop(setting))
        found: dict[str, Any] = json.loads(line)
        return found

    def _stop(self, setting: Setting) -> str:
        """End a process and return the last line that it said."""
        process = self.live.pop(setting)
        process.kill()
        _, said = process.communicate()
        lines = said.strip().splitlines()
        return lines[-1][:200] if lines else f"ended with exit code {process.returncode}"


class _Quality:
    """Refuses arithmetic that costs more than ``max_kl`` against the bundle's own; more exact arithmetic never does."""

    def __init__(self, workers: Workers, max_kl: float, own_level: int) -> None:
        self.workers, self.max_kl, self.own_level = workers, max_kl, own_level
        self.kl = cache(self._kl)

    def refuse(self, setting: Setting) -> str:
        """The reason against ``setting``, or ""."""
        if setting.accuracy_level in (self.own_level, 1):
            return ""
        kl = self.kl(setting.accuracy_level)
        return "" if kl <= self.max_kl else f"KL {kl:.3g} nats per token, more than {self.max_kl:g}"

    def _kl(self, level: int) -> float:
        return divergence(self.workers.base, self.workers.graph(level))


def divergence(reference: Path, candidate: Path) -> float:
    """Mean KL in nats per token of the bundle in ``candidate`` from ``reference``, on a few texts."""
    left = GenaiRunner(reference, threads=1, verify=False, on_huge_pages=False)
    right = GenaiRunner(candidate, verify=False, on_huge_pages=False)
    found = []
    for ids in left.encode(PROMPTS, _CHECKED_TOKENS):
        half = max(1, len(ids) // 2)
        found.append(compare(left.logits(ids, prefill=half), right.logits(ids, prefill=half)).kl)
        found.append(compare(left.next_logits(ids)[None], right.next_logits(ids)[None]).kl)
    if not found:
        raise ModelError(str(reference / "tokenizer.json"), "it gives no token for any of the texts", "a tokenizer")
    return float(np.concatenate(found).mean())


def _hold_quality(base: Path, made: Path, max_kl: float | None, numeric: bool) -> None:
    """Check the finished bundle against the untuned one; arithmetic that got more exact has no limit."""
    found = divergence(base, made)
    limit = max_kl if numeric else _SAME_KL
    if limit is not None and not found <= limit:
        raise ParityError(
            "tune",
            f"the tuned bundle diverges by {found:.3g} nats per token",
            f"at most {limit:g}",
            "Nothing was written",
        )


def _copy_untuned(bundle: Bundle, folder: Path) -> None:
    """Copy the bundle's files, without what an earlier tune set."""
    shutil.copytree(bundle.folder, folder)
    path = folder / GENAI_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    before = bundle.info.get("tuned") or {}
    session = config["model"]["decoder"]["session_options"]
    for name in (*(before.get("config_entries") or {}), *(_THREADS if before else ())):
        session.pop(name, None)
    if before:
        config["search"].pop("chunk_size", None)
        config["search"]["past_present_share_buffer"] = True
    _write_json(path, config)
    (folder / BUNDLE_FILE).unlink()


def _write(base: Path, made: Path, best: Setting, bundle: Bundle, facts: dict[str, Any]) -> None:
    """Write the tuned bundle into ``made`` from the untuned one in ``base``."""
    shutil.copytree(base, made)
    changed = made.with_name("changed")
    changed.mkdir()
    if accuracy_copy(base, changed, best.accuracy_level):
        (changed / MODEL_FILE).replace(made / MODEL_FILE)
    path = made / GENAI_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    entries = session_entries(best)
    threads = dict(zip(_THREADS, (best.threads, 1), strict=True))
    config["model"]["decoder"]["session_options"] |= threads | entries
    config["search"] |= search_entries(best)
    _write_json(path, config)
    info = {key: value for key, value in bundle.info.items() if key not in ("edgestill", "files", "gptq_files")}
    info["onnx"] = dict(info["onnx"]) | {"accuracy_level": best.accuracy_level}
    setting = {key: value for key, value in asdict(best).items() if key not in ("spinning", "pinned", "accuracy_level")}
    write_bundle(made, info | {"tuned": {**setting, "config_entries": entries, **facts}})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _check_place(bundle: Path, out: Path) -> None:
    """Refuse to write over something, or into a store."""
    place = out.resolve()
    for folder in (place, *place.parents):
        if (folder / MANIFEST).is_file():
            do = "Give another folder with --out"
            raise UserError(str(out), f"lies in the stored artifact {folder}", "a folder outside of a store", do)
    if place != bundle.resolve() and out.exists():
        raise UserError(str(out), "exists already", "a new folder", "Give another one with --out, or remove it")


def _put(made: Path, out: Path) -> None:
    """Move the finished folder to its place; one that stands there is swapped out in the same step."""
    if not out.exists():
        made.rename(out)
        return
    if not _exchange(made, out):  # two steps where the system has no exchange; the old one stays beside it until then
        aside = out.with_name(f".{out.name}-before-tune")
        out.rename(aside)
        made.rename(out)
        shutil.rmtree(aside)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders atomically (renameat2 with RENAME_EXCHANGE, Linux); False where that cannot be done."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return int(call(here, os.fsencode(first), here, os.fsencode(second), exchange)) == 0
