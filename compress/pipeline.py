"""Runs a plan: `run` takes a profile through all of its stages and gives back the record of the run.

A stage whose artifact stands in the store is skipped, and its code is not even imported; every other one runs in
this process, writes into a temporary folder, and is committed whole or not at all. The record (``run.json``) is
written after each stage, also when a stage fails, the run is interrupted or the gate says no. `plan` is in
``compress.plans``. Knows no stage by name.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from compress.context import StageContext
from compress.errors import UserError
from compress.estimates import Estimate, estimate
from compress.lineage import lineage
from compress.metering import Meter
from compress.plans import Node, Outside, Plan, named_teachers, plan
from compress.progress import Progress
from compress.recording import Recorder
from compress.run_record import RunRecord, close_dead
from compress.scratch import held
from compress.stages import STAGES, Stage, load_function
from compress.store import Read, Store

if TYPE_CHECKING:
    from compress.profile import Profile
    from compress.teachers import Teacher

__all__ = ["Plan", "default_store", "plan", "run"]

log = logging.getLogger(__name__)


def default_store() -> Path:
    """Where artifacts and runs are kept: ``$EDGESTILL_STORE``, or ``.edgestill`` in the current folder.

    Raises:
        UserError: the variable is there and empty.
    """
    place = os.environ.get("EDGESTILL_STORE", ".edgestill")
    if not place.strip():
        raise UserError("EDGESTILL_STORE", f"got {place!r}", "a folder", "Give one, or unset it for .edgestill here.")
    return Path(place)


def run(
    profile: Profile,
    *,
    store: Store | None = None,
    table: Sequence[Stage] = STAGES,
    until: str | None = None,
    verify: bool = False,
    progress: Progress | None = None,
) -> RunRecord:
    """Run ``profile`` and give back its record, which also stands in ``STORE/runs/ID/run.json``.

    A gate that says no is told by the record (``gate.passed``, status ``gate_failed``), not by an exception.

    Args:
        store: where artifacts are kept; see `default_store`.
        table: the stages that exist; tests give their own.
        until: the last step to run, as for `plan`.
        verify: check the digest of every file of an artifact that is taken from the store.
        progress: where bars and lines go; standard error when left out.

    Raises:
        UserError: the profile, data, model or target is wrong, or the bundle cannot fit the target.
        EdgestillError: a stage failed.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the same call goes on from there.
    """
    progress = progress or Progress()
    store = store or Store(default_store(), say=progress.say)
    with _terminable():
        planned = plan(profile, store=store, table=table, until=until, fetch=True)
        foretold = None
        if table is STAGES:  # other stages have other parameters, of which nothing can be foretold
            foretold = estimate(planned)
            foretold.refuse_misfit()
        executor = _Executor(planned, store, verify=verify, progress=progress)
        return executor.run(foretold)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work the way Ctrl-C does, so that the record is closed and exit code 130 given."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers; Python's own stay
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:  # SIGHUP is ignored under nohup, and stays so
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _place(found: Outside, spec: str | None) -> Path | str:
    """What opens a teacher: its folder once it is here, else the endpoint's address as it is written."""
    return found.path if spec is None or "://" not in spec else spec


class _Executor:
    """Runs a plan's nodes one by one; keeps the folders of those that stand and the teacher once it is loaded."""

    def __init__(self, planned: Plan, store: Store, *, verify: bool, progress: Progress) -> None:
        self.planned, self.store, self.verify, self.progress = planned, store, verify, progress
        self.folders: dict[str, Path] = {}  # artifact key -> folder
        self.checked: set[str] = set()  # keys whose digests were found right in this run
        self._teacher: Teacher | None = None
        self._teachers: dict[str, Teacher] = {}

    def run(self, foretold: Estimate | None) -> RunRecord:
        """Run all nodes and close the record whatever happens."""
        started = time.perf_counter()
        moment = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        run_id = f"{moment}-{self.planned.profile.name}-{secrets.token_hex(2)}"
        recorder = Recorder(self.planned, self.store.root / "runs" / run_id, run_id)
        if foretold is not None:
            recorder.record["estimates"] = foretold.records()
        recorder.write()
        self.store.sweep()
        close_dead(self.store.root)
        with held(recorder.folder):  # a record whose run is dead is known by this
            return self._run(recorder, started)

    def _run(self, recorder: Recorder, started: float) -> RunRecord:
        try:
            at = 0
            while at < len(self.planned.nodes):
                at = self.execute(at, recorder)
        except KeyboardInterrupt as error:
            recorder.close("interrupted", time.perf_counter() - started, error)
            raise
        except BaseException as error:
            recorder.close("failed", time.perf_counter() - started, error)
            raise
        gate = recorder.record["gate"]
        passed = gate is None or gate["passed"]
        recorder.record["report"] = str(recorder.folder / "report.html")
        recorder.close("done" if passed else "gate_failed", time.perf_counter() - started)
        from compress.report import write_report  # loads Jinja, when everything else is done

        write_report(recorder.record, recorder.folder / "report.html")
        return recorder.record

    def execute(self, at: int, recorder: Recorder) -> int:
        """Run node ``at``, or take it from the store; return the node to go on with.

        That is the next one, or one before: what ``at`` is to be made from is read and compared with its digests
        first, for damage would go on into everything that follows.
        """
        node = self.planned.nodes[at]
        label = f"[{at + 1}/{len(self.planned.nodes)}] {node.name}"
        found = self._lookup(node, verify=self.verify)
        cached = found is not None
        if found is None:
            damaged = [source for source in node.inputs.values() if isinstance(source, Node)
                       and self._lookup(source, verify=True) is None]  # fmt: skip
            if damaged:
                return min(self.planned.nodes.index(source) for source in damaged)
            self.progress.say(f"{label}: running")
            recorder.started(at)
            found = self._make(node, label)
        self.folders[node.key] = found
        figures = self.store.record(node.key) or {}
        recorder.finished(at, found, figures, cached=cached)
        for note in figures.get("notes", []):
            self.progress.say(f"{label}: {note}")
        self.progress.say(f"{label}: in the store" if cached else f"{label}: {figures.get('seconds', 0.0):.1f} s")
        return at + 1

    def _lookup(self, node: Node, *, verify: bool) -> Path | None:
        """The artifact of ``node``; with ``verify`` its digests are compared, once in a run."""
        verify = verify and node.key not in self.checked
        found = self.store.lookup(node.key, verify=verify, read=self._read(node))
        if found is not None and verify:
            self.checked.add(node.key)
        return found

    def _read(self, node: Node) -> Read:
        """What the inputs of ``node`` hold now."""
        sources = {slot: source.key for slot, source in node.inputs.items() if isinstance(source, Node)}
        renewed = any(self.store.was_damaged(key) for key in sources.values())
        return Read({slot: self.store.content(key) for slot, key in sources.items()}, renewed)

    def _make(self, node: Node, label: str) -> Path:
        """Run the stage of ``node`` and commit its artifact; figures are kept beside it."""
        function = load_function(node.stage)
        with self.store.begin(node.key, node.facts, verify=self.verify, read=self._read(node)) as draft:
            if not draft.cached:
                with Meter() as meter:
                    result = function(node.params, self._context(node, draft.out, draft.work, label))
                draft.record.update(
                    metrics=result.metrics,
                    notes=result.notes,
                    seconds=round(meter.seconds, 3),
                    peak_memory_bytes=meter.peak_memory_bytes,
                )
        if self.verify or not draft.cached:
            self.checked.add(node.key)
        return draft.path

    def _context(self, node: Node, out: Path, work: Path, label: str) -> StageContext:
        facts = self.planned.facts
        return StageContext(
            name=node.stage.name,
            inputs={slot: self._folder(source) for slot, source in node.inputs.items()},
            out=out,
            work=work,
            seed=node.seed,
            progress=Progress(stream=self.progress.stream, quiet=self.progress.quiet, prefix=f"{label}: "),
            teacher=self.teacher() if node.stage.wants_teacher else None,
            teachers={name: self.named_teacher(name) for name in named_teachers(node.params)},
            target=facts.target if "target" in node.stage.uses else None,
            threads=facts.threads,
            processes=facts.profile.hardware.processes,
            sharding=facts.profile.hardware.sharding,
            lineage=lineage(self.planned, node, self.folders),
        )

    def _folder(self, source: Node | Outside) -> Path:
        return source.path if isinstance(source, Outside) else self.folders[source.key]

    def teacher(self) -> Teacher | None:
        """The teacher, opened once per run."""
        facts = self.planned.facts
        if self._teacher is None and facts.teacher is not None:
            from compress.teachers import open_teacher  # loads when a stage that uses it really runs

            self._teacher = open_teacher(_place(facts.teacher, facts.profile.teacher), threads=facts.threads)
        return self._teacher

    def named_teacher(self, name: str) -> Teacher:
        """One of the profile's ``teachers``, opened once per run."""
        facts = self.planned.facts
        if name not in self._teachers:
            from compress.teachers import open_teacher  # as above

            place = _place(facts.teachers[name], facts.profile.teachers[name])
            self._teachers[name] = open_teacher(place, threads=facts.threads)
        return self._teachers[name]
