"""The report: ``run.json`` as one HTML file with plots, without scripts and without outside requests.

`write_report` is the only entry. It draws what the record holds and leaves out sections that have nothing to
show; it measures nothing and judges nothing. Plots are made by `compress.charts`, the page is a Jinja template.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, cast

from compress import charts
from compress.charts import BarRow, Line, Point, Segment, number, size
from compress.errors import StoreError
from compress.files import write_whole
from compress.run_record import CurveRecord, Ledger, LedgerEntry, RunRecord
from compress.scores import SHARES

TONES = ("a", "b", "c", "d", "e")


def quality_words(metric: str) -> Any:
    """How a value of ``metric`` is written: a share in per cent, anything else as a figure."""
    return (lambda v: f"{v * 100:z.1f} %") if metric in SHARES else (lambda v: f"{v:z.4g}")


def fixed(value: float) -> str:
    """A figure with four digits behind the point; what rounds to 0 has no sign."""
    return f"{value:z.4f}"


def change(share: float) -> str:
    """How far off an estimate is, in per cent."""
    return f"{share * 100:+z.0f} %"


def short(step: str) -> str:
    """A step's name as a label."""
    return step.removeprefix("model.").removeprefix("data.")


def measure_of(entry: LedgerEntry, metric: str) -> dict[str, Any] | None:
    """The entry's measure of ``metric``, if it has one."""
    return cast("dict[str, Any] | None", entry["metrics"].get(metric))


def size_quality(ledger: Ledger) -> str:
    """Bytes against the ledger's metric, one point per step."""
    points = []
    for i, entry in enumerate(ledger["entries"]):
        seen = measure_of(entry, ledger["metric"])
        if seen and entry["bytes"]:
            tone = TONES[min(i, len(TONES) - 1)]
            points.append(Point(short(entry["step"]), entry["bytes"], seen["mean"], seen["low"], seen["high"], tone))
    if len(points) < 2:
        return ""
    words = quality_words(ledger["metric"])
    return charts.scatter(
        points, title="Size against quality", x_name="bytes", y_name=ledger["metric"].replace("_", " "), y_words=words
    )


def ledger_plot(ledger: Ledger) -> str:
    """What each step cost."""
    points = [
        Point(short(entry["step"]), 0, entry["loss"], entry["loss_low"], entry["loss_high"])
        for entry in ledger["entries"][1:]
        if entry["loss"] is not None
    ]
    if not points:
        return ""
    metric = ledger["metric"]
    words = (lambda v: f"{v * 100:+z.2f} points") if metric in SHARES else (lambda v: f"{v:+z.4g}")
    return charts.differences(points, title=f"Loss ledger: {metric} given up by every step", words=words)


def funnel_plot(record: RunRecord) -> str:
    """Rows kept, added and dropped by reason, one bar per data stage."""
    rows = []
    for step in record["funnel"]:
        kept = step["rows_out"] - step["added"]
        segments = [Segment("kept", kept, "a")]
        if step["added"]:
            segments.append(Segment("added", step["added"], "good"))
        dropped = sorted(step["dropped"].items(), key=lambda item: -item[1])
        for i, (reason, count) in enumerate(dropped):
            segments.append(Segment(f"dropped, {reason}:", count, f"drop{i % 4}"))
        lost = sum(step["dropped"].values())
        note = (
            f"{step['rows_out']:,} out"
            + (f", -{lost:,}" if lost else "")
            + (f", +{step['added']:,}" if step["added"] else "")
        )
        rows.append(BarRow(short(step["step"]), tuple(segments), note))
    return charts.bars(rows, title="Data funnel") if rows else ""


def curve_plot(curve: CurveRecord) -> str:
    """The loss columns of one training log over its steps."""
    names = {k for p in curve["points"] for k in p if "loss" in k or k in ("ce", "kl", "validation")}
    drawn = []
    for i, name in enumerate(sorted(names)):
        points = tuple((p["step"], p[name]) for p in curve["points"] if p.get(name) is not None and "step" in p)
        if len(points) > 1:
            drawn.append(Line(name.replace("_", " "), points, TONES[i % len(TONES)]))
    return charts.lines(drawn, title=f"Training of {curve['step']}", x_name="step", y_name="loss") if drawn else ""


def allocation_plot(record: RunRecord) -> str:
    """Foretold divergence over bytes of the linears: the frontier of all choices of bits, and the chosen point."""
    for stage in record["stages"]:
        found = stage["metrics"].get("allocation")
        if found:
            frontier = tuple((point["bytes"], point["kl"]) for point in found["frontier"])
            lowest = min(point["kl"] for point in found["frontier"])
            chosen = ((found["bytes"], lowest), (found["bytes"], found["foretold_kl"]))  # a line up to the curve
            drawn = [Line("best choice of bits", frontier, "b"), Line("chosen", chosen, "a")]
            return charts.lines(drawn, title="Bits under a budget", x_name="bytes of the linears", y_name="KL, nats")
    return ""


def bench_plot(record: RunRecord) -> str:
    """Decode speed with the bound that memory reads alone would set."""
    rows = []
    for seen in record["bench"]:
        speed, bound = seen["decode_tokens_per_s"], seen["read_bound_tokens_per_s"]
        if speed is None:
            continue
        share = f", {speed / bound:.0%} of the read bound" if bound else ""
        segments = (Segment("decode tokens/s", speed, "a" if seen["subject"] != "teacher" else "c"),)
        note = f"{number(speed)} tok/s{share}"
        # a bound far off the scale would squeeze the bars to nothing: it is written, not drawn
        mark = bound if bound and bound < 6 * speed else None
        rows.append(BarRow(f"{seen['subject']} ({seen['runtime']})"[:34], segments, note, mark, "read bound"))
    return charts.bars(rows, title="Decode speed", label_width=230) if rows else ""


def stage_plot(record: RunRecord) -> str:
    """Seconds per stage; what came from the store is pale."""
    rows = [
        BarRow(
            short(stage["name"])[:34],
            (Segment("seconds", stage["seconds"], "pale" if stage["cached"] else "b"),),
            f"{stage['seconds']:.1f} s" + (" (from the store)" if stage["cached"] else ""),
        )
        for stage in record["stages"]
        if stage["seconds"] is not None
    ]
    return charts.bars(rows, title="Time per stage", label_width=230) if rows else ""


def headline(record: RunRecord) -> tuple[str, str]:
    """The first words of the verdict and its tone: a run of which nothing was judged has not passed anything."""
    words = {"gate_failed": "Gate failed", "failed": "Failed", "interrupted": "Interrupted", "running": "Running"}
    if record["status"] != "done":
        return words[record["status"]], "no"
    gate = record["gate"]
    return ("Passed", "yes") if gate is not None and gate["limits"] else ("Not judged", "open")


def render(record: RunRecord) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = resources.files("compress").joinpath("templates/report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"size": size, "number": number, "fixed": fixed, "change": change}
    ledger = record["ledger"]
    plots = {
        "size_quality": size_quality(ledger) if ledger else "",
        "ledger": ledger_plot(ledger) if ledger else "",
        "funnel": funnel_plot(record),
        "allocation": allocation_plot(record),
        "bench": bench_plot(record),
        "stages": stage_plot(record),
    }
    curves = [(curve["step"], Markup(svg)) for curve in record["curves"] if (svg := curve_plot(curve))]  # noqa: S704 - our own SVG, its text is escaped
    return environment.from_string(source).render(
        run=record,
        headline=headline(record),
        plots={name: Markup(svg) for name, svg in plots.items()},  # noqa: S704 - our own SVG, its text is escaped
        curves=curves,
        words=quality_words(ledger["metric"]) if ledger else number,
    )


def write_report(record: RunRecord, path: Path) -> None:
    """Draw ``record`` as the HTML file ``path``, whole or not at all.

    Raises:
        StoreError: the file cannot be written.
    """
    page = render(record)
    try:
        write_whole(path, page)
    except OSError as error:
        raise StoreError(str(path), error.strerror or str(error), do="Choose another place with --store.") from error
