"""The command ``edgestill``: parses arguments, calls the core, shows the result, maps errors to exit codes.

Exit codes: 0 fine, 1 the work failed, 2 the input is wrong, 3 the gate failed, 130 interrupted. An error is one
message on standard error and never a traceback, unless ``EDGESTILL_DEBUG=1``. Everything heavy is imported inside
the handlers, so that ``--help`` takes a fraction of a second. Holds no logic that a caller from Python would miss.
"""

from __future__ import annotations

if __name__ == "__main__":  # by python -m: begin where the command begins, before anything else is imported
    import importlib

    importlib.import_module("compress.entry").main()  # which loads this file again, as the module that it is
    raise SystemExit(0)

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from compress import interrupts
from compress.errors import EdgestillError, GateFailed, UserError, printable, safe_to_show

if TYPE_CHECKING:
    from compress.progress import Progress
    from compress.store import Store


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("EDGESTILL_DEBUG", "") not in ("", "0")


def complain(message: str) -> None:
    """One message on standard error."""
    print(f"edgestill: error: {safe_to_show(message)}", file=sys.stderr)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn errors into a message and an exit code."""
    try:
        yield
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on from where it stood")
        raise typer.Exit(interrupts.INTERRUPTED) from None
    except EdgestillError as error:
        if debugging():
            raise
        complain(str(error))
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        if debugging() or isinstance(error, BrokenPipeError):
            raise
        complain(f"{error.filename or 'operating system'}: {error.strerror or error}")
        raise typer.Exit(1) from None
    except MemoryError:
        complain("out of memory. Use smaller batches or a smaller model; edgestill plan PROFILE gives the need")
        raise typer.Exit(1) from None
    except Exception as error:
        if debugging() or hasattr(error, "exit_code"):  # typer's own: usage errors, Exit
            raise
        complain(f"{type(error).__name__}: {error}. This is a fault in edgestill; EDGESTILL_DEBUG=1 shows where")
        raise typer.Exit(1) from None


def refuse_empty(arguments: Sequence[str]) -> None:
    """Refuse an empty value: no option or argument has a use for one, and an empty path would be the current folder.

    Raises:
        UserError: which option it was given to, or which place on the line.
    """
    for at, text in enumerate(arguments):
        option, _, value = text.partition("=") if text.startswith("--") else ("", "", text)
        if option and "=" not in text:
            continue
        if not value.strip():
            before = arguments[at - 1] if at and arguments[at - 1].startswith("-") else f"argument {at + 1}"
            do = "An unset variable of a shell gives one."
            raise UserError(option or before, f"got {value!r}, an empty value", "a value", do)


@contextmanager
def own_output() -> Iterator[None]:
    """Show what libraries wrote in the meantime once the command is done, however it ends."""
    try:
        yield
    finally:
        if "compress.library_output" in sys.modules:  # loaded by commands that work
            sys.modules["compress.library_output"].end()


class Group(TyperGroup):
    """The command group, with errors mapped for every command alike."""

    def make_context(self, info_name: str | None, args: list[str], *others: Any, **extra: Any) -> Any:
        """Read the command line."""
        with exit_codes():
            refuse_empty(args)
        return super().make_context(info_name, args, *others, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        with exit_codes(), own_output():
            interrupts.hand_over()
            return super().invoke(ctx)


app = typer.Typer(
    cls=Group,
    name="edgestill",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: rich's markdown alone would take half of the 0.3 s
    pretty_exceptions_enable=False,
    help="Distill, prune and quantize a language model for an edge device, with the quality of what ships proven.",
)

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a value; may be given many times.")
]
StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Folder of artifacts and runs; else $EDGESTILL_STORE, else .edgestill")
]
TeacherOption = Annotated[
    str | None,
    typer.Option(metavar="TEACHER", help="A model folder, hub name, http://HOST/v1#MODEL or recorded replies."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def open_store(folder: Path | None) -> Store:
    """The store at ``folder`` or the default place."""
    from compress.pipeline import default_store
    from compress.store import Store

    return Store(folder or default_store())


def progress(quiet: bool = False) -> Progress:
    """Progress on standard error, on which libraries write nothing until the command ends."""
    from compress import library_output
    from compress.progress import Progress

    return Progress(quiet=quiet, stream=library_output.begin())


def show(text: str) -> None:
    """A line on standard output, without the control characters of what comes from a file or a device."""
    print(printable(text))


def show_json(value: Any) -> None:
    """``value`` as JSON on standard output; control characters in it are escaped as JSON has it."""
    from compress.files import json_text

    text = json_text(value, indent=1)
    print("".join(x if x.isprintable() or x == "\n" else json_text(x, ascii_only=True)[1:-1] for x in text))


@app.command()
def run(
    profile: Annotated[str, typer.Argument(help="A profile file, or the name of a built-in one.")],
    *,
    overrides: SetOption = None,
    store: StoreOption = None,
    until: Annotated[str | None, typer.Option(help="Stop after this step: its index, stage or stage.method.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the digest of every file taken from the store.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a profile from the pool of data to the judged and timed bundle."""
    from compress.pipeline import run as run_profile
    from compress.profile import load_profile

    record = run_profile(
        load_profile(profile, overrides=overrides or []),
        store=open_store(store),
        until=until,
        verify=verify,
        progress=progress(quiet=as_json),
    )
    if as_json:
        show_json(record)
    else:
        from compress import terminal

        terminal.show_run(record, terminal.console())
    if record["gate"] is not None and not record["gate"]["passed"]:
        raise GateFailed("gate", record["verdict"])


@app.command()
def plan(
    profile: Annotated[str, typer.Argument(help="A profile file, or the name of a built-in one.")],
    overrides: SetOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what would run, what is in the store, and what it would take and give. Runs nothing."""
    from compress.estimates import estimate
    from compress.pipeline import plan as plan_profile
    from compress.profile import load_profile

    opened = open_store(store)
    planned = plan_profile(load_profile(profile, overrides=overrides or []), store=opened)
    foretold = estimate(planned)
    rows = [
        {"name": node.name, "key": node.key, "cached": opened.lookup(node.key) is not None, "seconds": seconds}
        for node, seconds in zip(planned.nodes, foretold.seconds, strict=True)
    ]
    if as_json:
        show_json({"stages": rows, "estimates": foretold.records(), "notes": foretold.notes})
    else:
        from compress import terminal

        terminal.show_plan(rows, foretold.records(), terminal.console())
        for note in foretold.notes:
            show(note)
    foretold.refuse_misfit()


@app.command()
def step(
    stage: Annotated[str, typer.Argument(help="The stage, such as data.selection; see: edgestill ls stages")],
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder to write, or FILE.jsonl / FILE.parquet for rows.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--in", metavar="[SLOT=]PATH", help="Rows, a model folder, a bundle; evaluation.NAME=FOLDER."),
    ] = None,
    overrides: SetOption = None,
    teacher: TeacherOption = None,
    teachers: Annotated[
        list[str] | None, typer.Option("--teachers", metavar="NAME=TEACHER", help="More teachers, for a mixture.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The device, where the stage uses one.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all randomness.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; else all.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run one stage alone, on files: step data.selection --in pool.jsonl --out kept.jsonl --set method=dedup"""
    from compress.single import Request, parse_inputs, parse_teachers, run_stage, stage_and_params

    line, params = stage_and_params(stage, overrides or [])
    result = run_stage(
        Request(
            stage=line,
            params=params,
            inputs=parse_inputs(inputs or [], line),
            out=out,
            teacher=teacher,
            teachers=parse_teachers(teachers or []),
            target=_target(target),
            seed=seed,
            threads=threads,
        ),
        progress(quiet=as_json),
    )
    _show_result(result.metrics, result.notes, as_json=as_json)
    if not as_json:
        show(f"wrote {out}")
    if line.writes == "verdict" and not result.metrics["passed"]:
        raise GateFailed("gate", "a limit is not kept", do=f"Each limit and what was measured: {out / 'verdict.json'}")


@contextmanager
def _unpacked(subject: Path) -> Iterator[Path]:
    """A bundle's folder, also of a packed one; a model folder as it is."""
    if not subject.name.endswith(".tar.zst"):
        yield subject
        return
    from deploy.archive import bundle_folder

    with bundle_folder(subject) as folder:
        yield folder


def _target(name: str | None) -> Any:
    if name is None:
        return None
    from deploy.targets import load_target

    return load_target(name)


def _show_result(metrics: dict[str, Any], notes: list[str], *, as_json: bool) -> None:
    if as_json:
        show_json({"metrics": metrics, "notes": notes})
        return
    from compress import terminal

    terminal.show_figures(metrics, terminal.console())
    for note in notes:
        show(f"note: {safe_to_show(note)}")


class Backend(StrEnum):
    """Who draws the ONNX graph."""

    builder = "builder"
    optimum = "optimum"


class Format(StrEnum):
    """Export formats."""

    onnx = "onnx"
    gptq = "gptq"
    gguf = "gguf"


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A Hugging Face model folder, quantized by edgestill or not.")],
    *,
    target: Annotated[
        str | None, typer.Option(help="The device that it must fit; see: edgestill ls targets. Left out: any device.")
    ] = None,
    formats: Annotated[list[Format] | None, typer.Option("--format", help="May be given several times.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; else MODEL-TARGET or MODEL-bundle here.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Rows whose prompts prove parity.")] = None,
    backend: Annotated[Backend, typer.Option(help="Who draws the ONNX graph.")] = Backend.builder,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint into a bundle for a device, and prove that it computes the same."""
    from compress.single import Request, run_stage, stage_and_params

    chosen = ", ".join(one.value for one in formats or [Format.onnx])
    line, params = stage_and_params(
        "deploy.export", [f"formats=[{chosen}]", f"backend={backend.value}", *(overrides or [])]
    )
    place = out or Path(f"{model.resolve().name}-{'bundle' if target is None else Path(target).stem}")
    inputs = {"model": model, **({"data": data} if data is not None else {})}
    result = run_stage(Request(line, params, inputs, place, target=_target(target)), progress(quiet=as_json))
    _show_result(result.metrics, result.notes, as_json=as_json)
    if not as_json:
        show(f"wrote {place}")


@app.command()
def bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle, as written by export or run, or packed as .tar.zst.")],
    *,
    on: Annotated[str, typer.Option("--on", metavar="PLACE", help="local, ssh://user@host[:port], adb://serial")]
    = "local",
    target: Annotated[str | None, typer.Option(help="The device whose facts the figures are held against.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; else as tuned, else all cores.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for bench.json.")] = None,
    remote_python: Annotated[str, typer.Option(help="The Python on the device, such as ~/venv/bin/python")]
    = "python3",
    remote_folder: Annotated[
        str | None, typer.Option(help="Where the bundle goes on the device; else its cache, by digest.")
    ] = None,
    ssh_config: Annotated[Path | None, typer.Option(help="For ssh -F, instead of your own.")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Time a bundle here or on a device: prefill, decode, first token, peak memory, energy where the device tells."""
    from compress import benching

    place = benching.Where(on, remote_python, remote_folder, ssh_config)
    device = _target(target)
    with _unpacked(bundle) as folder:
        result = benching.bench(
            folder, place, overrides or [], target=device, threads=threads, out=out, progress=progress(quiet=as_json)
        )
    if as_json:
        _show_result(result.metrics, result.notes, as_json=True)
        return
    from compress import terminal

    measured = dict(result.metrics)

    local, foretold = measured.pop("local_estimate", None), measured.pop("target_estimate", None)
    _show_result(measured, result.notes, as_json=False)
    if local is not None:
        terminal.show_local(measured, local, terminal.console())
    if foretold is not None:
        terminal.show_target(measured, foretold, terminal.console())


@app.command()
def tune(
    bundle: Annotated[Path, typer.Argument(help="A bundle, as written by export or run.")],
    *,
    budget: Annotated[float, typer.Option(min=1, help="Seconds to search.")] = 120.0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write; else BUNDLE-tuned here.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Change the bundle itself.")] = False,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt of a typical request.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Answer of a typical request.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Find the settings under which a bundle is fastest on this machine, and write a bundle that has them."""
    from compress import doctor
    from deploy.params import TuneParams
    from deploy.tune import tune as tune_bundle

    if in_place and out is not None:
        raise UserError("--in-place", "given with --out", "one of the two")
    params = TuneParams(budget_s=budget, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    place = bundle if in_place else out or Path(f"{bundle.resolve().name}-tuned")
    device = str(doctor.machine()["cpu"])
    inside = in_place and Path.cwd().is_relative_to(bundle.resolve())
    found = tune_bundle(bundle, place, params, device=device, progress=progress(quiet=as_json))
    if as_json:
        show_json({"setting": asdict(found.setting), **found.measured})
        return
    from compress import terminal

    terminal.show_tuned(asdict(found.setting), found.measured, terminal.console())
    if found.measured["load_average"] > doctor.cores():
        print("note: the machine was busy; tune again when it is idle, for threads above all depend on it")
    show(f"wrote {found.folder if inside else place}")
    if inside:
        show(f"note: this folder is the old one, which is gone; go to the new one with: cd {found.folder}")


@app.command()
def pack(
    bundle: Annotated[Path, typer.Argument(help="A bundle, as written by export or run.")],
    *,
    out: Annotated[Path | None, typer.Option("--out", help="FILE.tar.zst; else NAME.tar.zst here.")] = None,
    run_name: Annotated[
        str | None,
        typer.Option("--run", metavar="RUN", help="Put what this run measured into it: an id, a folder, or latest"),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Make one file of a bundle, the same bytes each time; bench and eval take it as it is."""
    from compress import run_record
    from compress.listings import find_run
    from compress.shipping import figures_of_run
    from deploy.archive import SUFFIX
    from deploy.archive import pack as pack_bundle

    added = None
    if run_name is not None:
        added = figures_of_run(run_record.read(find_run(run_name, open_store(store).root)), bundle)
    place = out or Path(bundle.resolve().name + SUFFIX)
    size = pack_bundle(bundle, place, added=added)
    show(f"wrote {place} ({size:,} bytes)")


@app.command("eval")
def evaluate(
    subject: Annotated[Path, typer.Argument(help="A model folder, a bundle, or a bundle packed as .tar.zst.")],
    *,
    data: Annotated[Path, typer.Option(help="Test rows.")],
    tasks: Annotated[str, typer.Option(help="Comma between: function_call, perplexity, agreement.")] = "perplexity",
    teacher: TeacherOption = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Use this many rows.")] = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model, or a bundle in the runtime of the device, on test rows."""
    from compress.single import Request, guess_slot, run_stage, stage_and_params

    slot = "bundle" if subject.name.endswith(".tar.zst") else guess_slot(subject)
    if slot == "data":
        raise UserError(str(subject), "neither a model folder nor a bundle", "config.json or bundle.json in it")
    values = [f"tasks=[{tasks}]", *([] if rows is None else [f"rows={rows}"])]
    line, params = stage_and_params(f"evaluate.{slot}", [*values, *(overrides or [])])
    if "agreement" in params.model_dump()["tasks"] and teacher is None:
        raise UserError("--teacher", "missing; agreement compares with it", "the teacher's model folder")
    with _unpacked(subject) as folder:
        request = Request(line, params, {slot: folder, "test": data}, teacher=teacher)
        result = run_stage(request, progress(quiet=as_json))
    if as_json:
        show_json({"metrics": result.metrics, "notes": result.notes})
        return
    from compress import terminal

    rows_shown = [(name, terminal.quality(value)) for name, value in result.metrics["metrics"].items()]
    terminal.show_rows(("metric", "value [95 % interval]"), rows_shown, terminal.console())
    for note in result.notes:
        print(f"note: {note}")


targets = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Devices: list, show, measure.")
app.add_typer(targets, name="targets")


@targets.command("list")
def list_targets(as_json: JsonOption = False) -> None:
    """List the built-in targets, as ls targets does."""
    listing(Listed.targets, as_json=as_json)


@targets.command("show")
def show_target(name: Annotated[str, typer.Argument(help="A built-in target's name, or a target file.")]) -> None:
    """Print a target's file: every figure with where it comes from."""
    from deploy.targets import find_target, load_target

    load_target(name)
    show(find_target(name).read_text(encoding="utf-8").removesuffix("\n"))


@targets.command("measure")
def measure_target(
    name: Annotated[str, typer.Option(help="The target's name, in lower case.")] = "this-machine",
    out: Annotated[Path | None, typer.Option("--out", help="File to write; else NAME.yaml here.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; else all that may be used.")] = None,
) -> None:
    """Measure this machine in the runtime and write a target file of it; leave it idle for the ten seconds."""
    from compress import listings

    place = out or Path(f"{name}.yaml")
    show(listings.measured_target(name, place, threads).removesuffix("\n"))
    print(printable(f"wrote {place}"), file=sys.stderr)


class Listed(StrEnum):
    """What ``ls`` lists."""

    stages = "stages"
    targets = "targets"
    profiles = "profiles"
    runs = "runs"


@app.command("ls")
def listing(
    what: Annotated[Listed, typer.Argument(help="What to list.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """List stages, targets, profiles or runs."""
    from compress import listings

    heads, rows = listings.rows_of(what.value, open_store(store).root if what is Listed.runs else None)
    if as_json:
        show_json([dict(zip(heads, row, strict=True)) for row in rows])
        return
    from compress import terminal

    terminal.show_rows(heads, rows, terminal.console())


@app.command()
def report(
    run_name: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's id, its folder or run.json, or: latest")
    ] = "latest",
    store: StoreOption = None,
) -> None:
    """Write the HTML report of a run anew and say where it is."""
    from compress import run_record
    from compress.listings import find_run
    from compress.report import write_report

    path = find_run(run_name, open_store(store).root)
    record = run_record.read(path)
    place = path.with_name("report.html")
    write_report(record, place)
    show(str(place))


@app.command()
def doctor(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show versions, cores, instruction sets, memory, disk, and what is missing and how to install it."""
    from compress import doctor as examination
    from compress.pipeline import default_store

    findings = examination.examine(store or default_store())
    if as_json:
        show_json([{"what": f.what, "value": f.value, "state": f.state, "do": f.do} for f in findings])
    else:
        from compress import terminal

        terminal.show_findings(findings, terminal.console())
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no Unicode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked workers do not mix
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        from compress.model.distillation.parallel import as_launched  # loads torch

        as_launched(app)
    else:
        app()
