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
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from compress import processes
from compress.errors import ModelError, ParityError, UserError
from compress.files import json_text, sync_folder, write_whole
from compress.json_reader import read_table, required
from compress.progress import Progress
from compress.scratch import scratch
from compress.store import check_outside
from deploy.bundle import BESIDE, BUNDLE_FILE, Bundle, open_bundle, write_bundle
from deploy.bundle_runner.run import AFFINITIES, cores, processors
from deploy.params import PROMPTS, TuneParams
from deploy.runners import GenaiRunner
from deploy.tune_search import Judges, NotMeasurable, Rules, Setting, Timing, Trial, search
from deploy.variants import MODEL_FILE, accuracy_copy
from evaluators.agreement import compare

GENAI_CONFIG = "genai_config.json"
SPINNING = "session.intra_op.allow_spinning"
_THREADS = ("intra_op_num_threads", "inter_op_num_threads")
_SET = {  # all that a tune may set in the runtime's config
    "session": (*_THREADS, SPINNING, AFFINITIES),
    "search": ("past_present_share_buffer", "chunk_size"),
}
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

    Links are followed. In place, files that ``bundle.json`` does not list are kept; else the bundle's alone are copied.

    Raises:
        ModelError: the bundle is damaged or does not run here.
        UserError: ``out`` is taken, or lies in a store or in the bundle.
        ParityError: the tuned bundle computes something else.
    """
    say = (progress or Progress(quiet=True)).say
    bundle, out = bundle.resolve(), out.resolve()
    _check_leftover(bundle, out, say)
    opened = open_bundle(bundle)
    opened.need("onnx")
    _check_place(bundle, out)
    context = int(opened.info["onnx"]["context_tokens"])
    if params.prompt_tokens + params.new_tokens > context:
        got = f"prompt_tokens {params.prompt_tokens} and new_tokens {params.new_tokens}"
        raise UserError("tune", got, f"at most {context} together, the bundle's context")
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch(out.parent) as temporary:
        untuned = _copy_untuned(opened, temporary / "base")
        start = starting_point(untuned)
        with Workers(untuned.folder, params) as workers:
            quality = _Quality(workers, params.max_kl, start.accuracy_level)
            best, trials, figures = _find(start, params, workers, quality, say)
        made = temporary / "made"
        measured = figures | {"candidates": [trial.facts() for trial in trials]}
        numeric = _write(untuned, made, best, {"device": device, "measured": measured})
        limit = None if numeric and best.accuracy_level != 4 else params.max_kl if numeric else _SAME_KL
        _note_kl(made, _hold_quality(untuned.folder, made, limit))
        if out == bundle:
            _keep_others(bundle, made)
        _put(made, out)
    return Tuned(out, best, trials, measured)


def starting_point(bundle: Bundle) -> Setting:
    """The setting of an untuned bundle on this machine."""
    search_part = _parts(read_table(bundle.folder / GENAI_CONFIG, ModelError), bundle.folder)["search"]
    return Setting(
        threads=cores(),
        share_buffer=bool(search_part.get("past_present_share_buffer", False)),
        accuracy_level=4 if int(bundle.info["onnx"]["accuracy_level"]) == 4 else 1,
    )


def values(start: Setting, prompt_tokens: int, most: int) -> dict[str, list[Any]]:
    """What is worth trying per knob, in the order of what it usually brings.

    ``start`` has a thread for each core; ``most`` threads may be of use, where cores have siblings.
    """
    cores = start.threads
    counts = {most, cores, cores - 1, cores // 2, *(1 << power for power in range(cores.bit_length()))}
    found: dict[str, list[Any]] = {
        "threads": sorted((count for count in counts if count >= 1), reverse=True),
        "accuracy_level": [4, 1],
        "spinning": [True, False],
    }
    if start.share_buffer:  # the export says where it may be
        found["share_buffer"] = [True, False]
    if max(counts) > 1 and hasattr(os, "sched_getaffinity"):
        found["pinned"] = [False, True]
    chunks = [size for size in (512, 256, 128, 64, 32) if size < prompt_tokens]
    if chunks:
        found["prefill_chunk"] = [None, *chunks]
    return found


def _space(start: Setting, params: TuneParams, workers: Workers) -> dict[str, list[Any]]:
    """What may be tried with this bundle here."""
    groups = processors()
    most = start.threads if start.threads < len(groups) else sum(map(len, groups))  # fewer: a quota holds
    found = values(start, params.prompt_tokens, most)
    if workers.graph(1 if start.accuracy_level == 4 else 4) == workers.base:  # nothing in the graph that it changes
        del found["accuracy_level"]
    return found


def _find(
    start: Setting, params: TuneParams, workers: Workers, quality: _Quality, say: Callable[[str], None]
) -> tuple[Setting, list[Trial], dict[str, Any]]:
    """Search within the budget and time start against winner once more."""
    ends = time.monotonic() + params.budget_s
    say(f"searching for {params.budget_s:g} s")
    judges = Judges(workers.measure, quality.refuse, lambda: time.monotonic() >= ends)
    rules = Rules(params.new_tokens, params.rounds, params.margin)
    try:
        workers.measure(start)
    except NotMeasurable as error:
        raise ModelError(str(workers.base), f"does not run here: {error}") from error
    best, trials = search(start, _space(start, params, workers), rules, judges)
    best, pairs, died = _compare(start, best, workers, params.rounds)
    if died:
        say(f"the winner does not run dependably ({died}): the bundle keeps the settings it had")
    figures = {
        "before": _rates([before for before, _ in pairs], params),
        "after": _rates([after for _, after in pairs], params),
        "prompt_tokens": params.prompt_tokens,
        "new_tokens": params.new_tokens,
        "load_average": os.getloadavg()[0],
    }
    return best, trials, figures | ({"winner_died": died} if died else {})


def _compare(
    start: Setting, best: Setting, workers: Workers, rounds: int
) -> tuple[Setting, list[tuple[Timing, Timing]], str]:
    """Time ``start`` and ``best`` in pairs; a ``best`` that dies gives way to ``start``, and the reason is told."""
    died = ""
    while True:
        try:
            return best, [(workers.measure(start), workers.measure(best)) for _ in range(rounds)], died
        except NotMeasurable as error:
            if error.setting == start:
                raise ModelError(str(workers.base), f"does not run here dependably: {error}") from error
            best, died = start, str(error)


def _rates(timings: Sequence[Timing], params: TuneParams) -> dict[str, float]:
    prefill, decode = (float(np.median([getattr(t, name) for t in timings])) for name in ("prefill_s", "decode_s"))
    return {"prefill_tokens_per_s": params.prompt_tokens / prefill, "decode_tokens_per_s": 1 / decode}


def session_entries(setting: Setting) -> dict[str, str]:
    """The runtime's session entries for ``setting``; none where its own defaults are meant."""
    found = {} if setting.spinning else {SPINNING: "0"}
    if setting.pinned and setting.threads > 1:  # one place for each thread but the caller's
        groups = processors()
        order = [group[0] for group in groups] + [sibling for group in groups for sibling in group[1:]]
        found[AFFINITIES] = ";".join(str(place + 1) for place in order[1 : setting.threads])  # counted from 1 here
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
            raise NotMeasurable(setting, self._stop(setting)) from None
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
        process = subprocess.Popen(  # noqa: S603 - our own module, arguments as a list
            processes.python("-m", "deploy.tune_worker", json.dumps(request)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=processes.environment(),
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
            raise NotMeasurable(setting, self._stop(setting))
        found: dict[str, Any] = json.loads(line)  # our own process
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


def _hold_quality(base: Path, made: Path, limit: float | None) -> float:
    """Return the divergence of the finished bundle from the untuned one; more exact arithmetic has no ``limit``."""
    found = divergence(base, made)
    if limit is not None and not found <= limit:
        raise ParityError(
            "tune",
            f"the tuned bundle diverges by {found:.3g} nats per token",
            f"at most {limit:g}",
            "Nothing was written",
        )
    return found


def _copy_untuned(bundle: Bundle, folder: Path) -> Bundle:
    """Copy the files that ``bundle.json`` lists and undo what an earlier tune set; the copy has no ``bundle.json``."""
    folder.mkdir()
    for form in ("", *(form for form in BESIDE if form in bundle.formats and (bundle.folder / form).is_dir())):
        (folder / form).mkdir(exist_ok=True)
        for name in bundle.info[f"{form}_files" if form else "files"]:
            shutil.copy2(bundle.folder / form / name, folder / form / name)
    info = json.loads(json.dumps(dict(bundle.info)))
    before = info.pop("tuned", None)
    if not before:
        return Bundle(folder, info)
    was = before.get("was") or {}  # bundles tuned before there was one keep what cannot be known
    for part in _SET:
        if was.get(part) is not None:
            required(was, part, dict, f"{bundle.folder / BUNDLE_FILE}: tuned.was", ModelError)
    path = folder / GENAI_CONFIG
    config = read_table(path, ModelError)
    for part, entries in _parts(config, folder).items():
        for name in _SET[part]:
            if was or name != "past_present_share_buffer":
                entries.pop(name, None)
        old = was.get(part) or {}
        entries.update({name: old[name] for name in _SET[part] if name in old})
    _write_json(path, config)
    if was.get("accuracy_level") in (0, 1, 4):
        _set_level(folder, was["accuracy_level"])
        info["onnx"]["accuracy_level"] = was["accuracy_level"]
    if was.get("parity_shipped"):
        info["parity"] = {**(info.get("parity") or {}), "shipped": was["parity_shipped"]}
    return Bundle(folder, info)


def _parts(config: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """The parts of the runtime's config in ``folder`` that a tune sets; ModelError where one is missing."""
    where, part = str(folder / GENAI_CONFIG), config
    for name in ("model", "decoder", "session_options"):
        part = required(part, name, dict, where, ModelError)
    return {"session": part, "search": required(config, "search", dict, where, ModelError)}


def _set_level(folder: Path, level: int) -> bool:
    """Let the model in ``folder`` compute at accuracy ``level``; False when it does already."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        changed = accuracy_copy(folder, Path(temporary), level)
        if changed:
            (Path(temporary) / MODEL_FILE).replace(folder / MODEL_FILE)
    return changed


def _write(untuned: Bundle, made: Path, best: Setting, facts: dict[str, Any]) -> bool:
    """Write the tuned bundle into ``made``; return whether its arithmetic changed."""
    shutil.copytree(untuned.folder, made)
    numeric = _set_level(made, best.accuracy_level)
    path = made / GENAI_CONFIG
    config = read_table(path, ModelError)
    parts, entries = _parts(config, made), session_entries(best)
    was: dict[str, Any] = {
        part: {name: have[name] for name in _SET[part] if name in have} for part, have in parts.items()
    }
    threads = dict(zip(_THREADS, (best.threads, 1), strict=True))
    # the places of threads fit one count of threads alone, so who opens the bundle adds them with that count
    parts["session"] |= threads | {name: value for name, value in entries.items() if name != AFFINITIES}
    parts["search"] |= search_entries(best)
    _write_json(path, config)
    info = {key: value for key, value in untuned.info.items() if key not in ("edgestill", "files", "gptq_files")}
    was["accuracy_level"] = info["onnx"]["accuracy_level"]
    if numeric:
        info["onnx"] = info["onnx"] | {"accuracy_level": best.accuracy_level}
        proof = dict(info.get("parity") or {})  # what was proven of the arithmetic that shipped is no longer so
        was["parity_shipped"] = proof.pop("shipped", None)
        info |= {"parity": proof} if proof else {}
    setting = {key: value for key, value in asdict(best).items() if key not in ("spinning", "pinned", "accuracy_level")}
    write_bundle(made, info | {"tuned": {**setting, "config_entries": entries, "was": was, **facts}})
    return numeric


def _note_kl(made: Path, kl: float) -> None:
    """Note in ``bundle.json`` the divergence from the untuned bundle, in nats per token."""
    path = made / BUNDLE_FILE
    info = read_table(path, ModelError)
    info["tuned"]["kl"] = kl
    _write_json(path, info)


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json_text(value, indent=1) + "\n")


def _keep_others(old: Path, made: Path) -> None:
    """Copy into ``made`` what lies in ``old`` without being part of the bundle."""
    for path in old.iterdir():
        place = made / path.name
        if place.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, place, symlinks=True)
        else:
            shutil.copy2(path, place, follow_symlinks=False)


def _aside(folder: Path) -> Path:
    """Where the old bundle stands while the new one takes its place in two steps."""
    return folder.with_name(f".{folder.name}-before-tune")


def _check_leftover(bundle: Path, out: Path, say: Callable[[str], None]) -> None:
    """Bring back a bundle that a killed tune left aside; refuse to tune over one whose place is taken."""
    aside = _aside(bundle)
    if aside.is_dir() and not bundle.exists():
        aside.rename(bundle)
        say(f"restored {bundle} from {aside.name}, which an interrupted tune left")
    elif aside.exists() and out == bundle:
        do = f"Remove it if {bundle} is the bundle that you want, else put it back in its place"
        raise UserError(str(aside), "an interrupted tune left it", "no such folder", do)


def _check_place(bundle: Path, out: Path) -> None:
    """Refuse to write over something, or into a store."""
    check_outside(out)
    if bundle in out.parents:
        do = "Give a folder outside of it with --out, or --in-place"
        raise UserError(str(out), f"lies in the bundle {bundle}", "a folder outside of it", do)
    if out != bundle and out.exists():
        raise UserError(str(out), "exists already", "a new folder", "Give another one with --out, or remove it")


def _put(made: Path, out: Path) -> None:
    """Move the finished folder to its place; one that stands there is swapped out in the same step."""
    sync_folder(made)
    if not out.exists():
        made.rename(out)
        return
    if not _exchange(made, out):  # two steps where the system has no exchange; the old one stays beside it until then
        aside = _aside(out)
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
