"""What the command line shows: tables of a run, a plan, stages, findings. Rich on a terminal, plain text elsewhere.

Every function takes plain data and prints it; `human_bytes` and `rate` format figures. Loaded by command handlers
when they have something to show. Knows nothing of how figures came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compress.doctor import Finding
from compress.errors import printable
from compress.run_record import Measure, RunRecord, SummaryRow

NAMES = {"teacher": "teacher", "student": "student", "bundle": "student, quantized bundle"}
MARKS = {"ok": "green", "warning": "yellow", "problem": "red"}


def shown(text: str) -> str:
    """``text`` from outside (a file, a device) as rich's markup that prints it as it is, without control characters."""
    return escape(printable(text))


def console() -> Console:
    """Standard output; wide when it is not a terminal, so that lines in a log do not break."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=200)


def human_bytes(count: float | None) -> str:
    """``count`` bytes in B, kB, MB or GB (powers of 1000)."""
    if count is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def human_count(count: float | None) -> str:
    """``count`` with M or k."""
    if count is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def human_seconds(seconds: float | None) -> str:
    """A duration in s or min."""
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def rate(value: float | None) -> str:
    """Tokens per second."""
    return "-" if value is None else f"{value:,.0f}"


def quality(measure: Measure | None) -> str:
    """A mean with its interval."""
    if measure is None:
        return "-"
    if measure["low"] is None or measure["high"] is None:
        return f"{measure['mean']:.4g}"
    return f"{measure['mean']:.4g} [{measure['low']:.4g}, {measure['high']:.4g}]"


def summary_table(rows: Sequence[SummaryRow]) -> Table:
    """Teacher, student and bundle side by side."""
    metric = next((row["metric"] for row in rows if row["metric"]), None)
    table = Table(title=None)
    table.add_column("")
    for head in (
        "parameters",
        "size",
        metric or "quality",
        "prefill tok/s",
        "decode tok/s",
        "first token",
        "peak memory",
    ):
        table.add_column(head, justify="right")
    for row in rows:
        first = row["first_token_s"]
        table.add_row(
            NAMES[row["subject"]],
            human_count(row["parameters"]),
            human_bytes(row["bytes"]),
            quality(row["quality"]),
            rate(row["prefill_tokens_per_s"]),
            rate(row["decode_tokens_per_s"]),
            "-" if first is None else f"{first * 1000:.1f} ms",
            human_bytes(row["peak_memory_bytes"]),
        )
    return table


def show_run(record: RunRecord, out: Console) -> None:
    """The end of a run: summary, verdict, where things are."""
    if record["summary"]:
        out.print(summary_table(record["summary"]))
    gate = record["gate"]
    if gate is not None:
        for limit in gate["limits"]:
            mark = "[green]pass[/]" if limit["passed"] else "[red]FAIL[/]"
            out.print(f"  {mark}  {shown(limit['reason'])}")
    failed = record["status"] in ("failed", "gate_failed")
    colour = "red" if failed else "green" if gate is not None and gate["limits"] else "yellow"  # nothing was judged
    out.print(f"[{colour}]{shown(record['verdict'])}[/]")
    hits = sum(1 for stage in record["stages"] if stage["cached"])
    out.print(f"{len(record['stages'])} stages, {hits} from the store, {human_seconds(record['seconds'])}")
    for name in ("bundle", "report"):
        if record.get(name):
            out.print(f"{name}: {shown(str(record.get(name)))}", soft_wrap=True)


def show_plan(rows: Sequence[Mapping[str, Any]], estimates: Sequence[Mapping[str, Any]], out: Console) -> None:
    """What would run, and what it would give."""
    table = Table()
    table.add_column("#", justify="right")
    table.add_column("stage")
    table.add_column("state")
    table.add_column("estimated time", justify="right")
    for at, row in enumerate(rows, 1):
        state = "[green]in the store[/]" if row["cached"] else "to run"
        table.add_row(str(at), shown(row["name"]), state, human_seconds(row["seconds"]))
    out.print(table)
    for estimate in estimates:
        out.print(f"{estimate['what']}: {figure(estimate['estimated'], estimate['unit'])}")


def show_target(measured: Mapping[str, Any], foretold: Mapping[str, Any], out: Console) -> None:
    """A bundle's figures where they were measured, beside the estimate for a target."""
    name, where = foretold["target"], measured["where"]
    table = Table(
        "", f"measured on {'this machine' if where == 'local' else shown(where)}", f"estimate for {name}, not measured"
    )
    for what, unit in (("prefill", "tokens/s"), ("decode", "tokens/s")):
        key = f"{what}_tokens_per_s"
        table.add_row(f"{what} {unit}", rate(measured[key]), rate(foretold[key]))
    first = "first_token_s"
    table.add_row("first token", f"{measured[first] * 1000:.1f} ms", f"{foretold[first] * 1000:.1f} ms")
    peak = "peak_memory_bytes"
    usable = human_bytes(foretold["usable_memory_bytes"])
    table.add_row("peak memory", human_bytes(measured[peak]), f"{human_bytes(foretold[peak])} of {usable} usable")
    out.print(table)


def show_tuned(setting: Mapping[str, Any], measured: Mapping[str, Any], out: Console) -> None:
    """What was tried, what it did to the time of a request, and the rates before and after."""
    table = Table("knob", "value", "time against best so far", "prefill tok/s", "decode tok/s", "pairs", "")
    for trial in measured["candidates"]:
        timed = trial["ratio"] is not None
        cells = [
            f"{trial['ratio']:.3f}" if timed else "-",
            rate(measured["prompt_tokens"] / trial["prefill_s"]) if timed else "-",
            rate(1 / trial["decode_s"]) if timed else "-",
        ]
        table.add_row(shown(trial["knob"]), str(trial["value"]), *cells, str(trial["pairs"]), shown(trial["verdict"]))
    out.print(table)
    for what in ("prefill", "decode"):
        before, after = (measured[when][f"{what}_tokens_per_s"] for when in ("before", "after"))
        out.print(f"{what}: {rate(before)} to {rate(after)} tokens/s ({after / before:.2f} times)")
    out.print(", ".join(f"{knob} {value}" for knob, value in setting.items()))


def show_local(measured: Mapping[str, Any], foretold: Mapping[str, Any], out: Console) -> None:
    """A bundle's figures on this machine beside those reckoned from the machine's own rates, and the error."""
    table = Table("", "measured on this machine", "estimate from its measured rates", "error")
    for what, key, unit in (
        ("prefill tokens/s", "prefill_tokens_per_s", ""),
        ("decode tokens/s", "decode_tokens_per_s", ""),
        ("peak memory", "peak_memory_bytes", "bytes"),
    ):
        seen, reckoned = measured[key], foretold[key]
        words = human_bytes if unit else rate
        table.add_row(what, words(seen), words(reckoned), f"{reckoned / seen - 1:+.0%}")
    out.print(table)


def figure(value: float | None, unit: str) -> str:
    """A value with its unit, in a form that a person reads."""
    if value is None:
        return "-"
    if unit == "bytes":
        return human_bytes(value)
    if unit == "s":
        return human_seconds(value)
    return f"{human_count(value)} {unit}".strip()


def show_findings(findings: Sequence[Finding], out: Console) -> None:
    """The lines of ``edgestill doctor``."""
    table = Table(show_header=False)
    for finding in findings:
        table.add_row(
            f"[{MARKS[finding.state]}]{finding.state}[/]", finding.what, shown(finding.value), shown(finding.do)
        )
    out.print(table)


def show_rows(heads: Sequence[str], rows: Sequence[Sequence[str]], out: Console) -> None:
    """A plain table."""
    table = Table(*heads)
    for row in rows:
        table.add_row(*(shown(cell) for cell in row))
    out.print(table)
