"""The report: every section from one record, nothing from outside, hostile text escaped, nothing half-written."""

import re

import pytest

from compress import charts
from compress.errors import StoreError
from compress.recording import local_estimates
from compress.report import render, write_report


def measure(mean, spread=0.01):
    """A measure with an interval."""
    return {"mean": mean, "low": mean - spread, "high": mean + spread, "n": 100}


def entry(step, parameters, size, quality, loss):
    """One ledger entry."""
    metrics = {"exact_match": measure(quality), "perplexity": measure(1.2)}
    ends = (None, None) if loss is None else (loss - 0.004, loss + 0.006)
    return {
        "step": step, "parameters": parameters, "bytes": size, "metrics": metrics,
        "loss": loss, "loss_low": ends[0], "loss_high": ends[1],
    }  # fmt: skip


def stage(name, seconds, *, cached=False):
    """One stage record."""
    return {
        "name": name, "stage": name, "method": "m", "step": 0, "key": "ab" * 32, "path": None, "state": "done",
        "cached": cached, "seconds": seconds, "peak_memory_bytes": 10**9, "metrics": {}, "notes": ["group size 32"],
        "params": {}, "inputs": {},
    }  # fmt: skip


def bench(subject, speed, bound):
    """One bench record."""
    return {
        "subject": subject, "runtime": "torch fp32", "device": "cpu", "threads": 2, "prompt_tokens": 32,
        "new_tokens": 64, "repeats": 5, "warmup": 1, "prefill_tokens_per_s": 9000.0, "decode_tokens_per_s": speed,
        "first_token_s": 0.0042, "peak_memory_bytes": 10**8, "weight_bytes": 10**6,
        "memory_bandwidth_bytes_per_s": 3e10, "read_bound_tokens_per_s": bound,
    }  # fmt: skip


@pytest.fixture
def record():
    """A whole run as the pipeline would write it."""
    entries = [
        entry("teacher", 6_100_000, 24_400_000, 0.985, None),
        entry("model.distillation.logits", 1_500_000, 6_000_000, 0.979, 0.006),
        entry("model.pruning.structured", 990_000, 3_960_000, 0.975, 0.004),
        entry("model.quantization.gptq", 990_000, 1_100_000, 0.974, 0.001),
        entry("bundle", 990_000, 1_050_000, 0.9745, -0.0005),
    ]
    limit = {
        "metric": "exact_match", "limit": "at most 0.02 below the teacher", "comparison": "max_drop",
        "limit_value": 0.02, "value": 0.011, "judged": 0.017, "low": 0.004, "high": 0.017, "measured": 0.974,
        "teacher": 0.985, "passed": True, "reason": "fine",
    }  # fmt: skip
    summary = {
        "subject": "bundle", "parameters": 990_000, "bytes": 1_050_000, "metric": "exact_match",
        "quality": measure(0.9745), "prefill_tokens_per_s": 9000.0, "decode_tokens_per_s": 2100.0,
        "first_token_s": 0.003, "peak_memory_bytes": 10**8,
    }  # fmt: skip
    return {
        "schema": 1, "id": "20261123-quickstart", "status": "done", "started": "2026-11-23T20:00:00Z",
        "finished": None, "seconds": 240.0,
        "profile": {"name": "quickstart", "path": "p", "description": "An assistant", "values": {"seed": 7}},
        "teacher": {"name": "t", "path": "t", "identity": "x", "parameters": 1, "bytes": 1},
        "target": {"name": "x86-laptop-avx2"}, "versions": {"edgestill": "0.1.0"},
        "device": {"cpu": "a cpu", "cores": 2, "threads": 2},
        "stages": [stage("data.selection.dedup", 1.5), stage("model.distillation.logits", 95.0, cached=True)],
        "funnel": [
            {"step": "dedup", "rows_in": 6000, "rows_out": 5200, "dropped": {"exact": 300, "near": 500}, "added": 0},
            {"step": "magpie", "rows_in": 5200, "rows_out": 6000, "dropped": {}, "added": 800},
        ],
        "ledger": {"metric": "exact_match", "higher_is_better": True, "entries": entries, "most_lost": "x"},
        "gate": {"passed": True, "limits": [limit], "most_lost": "model.distillation.logits"},
        "bench": [bench("teacher", 120.0, 1300.0), bench("bundle", 2100.0, 30000.0), bench("student", 800.0, 2000.0)],
        "summary": [summary],
        "estimates": [{"what": "bundle size", "unit": "bytes", "estimated": 1e6, "measured": 1.05e6}],
        "curves": [{"step": "model.distillation.logits", "path": "log.jsonl",
                    "points": [{"step": i, "loss": 2.0 / i, "kl": 1.0 / i} for i in range(1, 60)]}],
        "bundle": "b", "report": None, "verdict": "The bundle keeps 98.9 % of the teacher.", "error": None,
    }  # fmt: skip


def test_every_section_is_drawn_and_nothing_comes_from_outside(record):
    page = render(record)
    for heading in ("Gate", "Size against quality", "Loss ledger", "Data funnel", "Training:", "Speed on this machine"):
        assert heading in page
    assert page.count("<svg") == 6
    assert not re.search(r"(src|href)=|url\(|@import|<script|https?://", page)


def test_the_choice_of_bits_is_drawn_where_there_was_one(record):
    assert "Bits under a budget" not in render(record)
    frontier = [{"bytes": 1000 * step, "kl": 1 / step} for step in (2, 3, 4, 6)]
    record["stages"][-1]["metrics"] = {"allocation": {"frontier": frontier, "bytes": 4000, "foretold_kl": 0.25}}
    page = render(record)
    assert "Bits under a budget" in page
    assert ">chosen</text>" in page


def test_an_early_failure_still_gives_a_page(record):
    empty = record | {
        "ledger": None,
        "gate": None,
        "bench": [],
        "summary": [],
        "estimates": [],
        "curves": [],
        "funnel": [],
    }
    empty |= {"status": "failed", "stages": [], "target": None, "verdict": "Nothing ran."}
    empty["error"] = {"kind": "DataError", "message": "pool.jsonl:3: bad", "stage": None}
    page = render(empty)
    assert "Failed" in page
    assert "pool.jsonl:3: bad" in page


@pytest.mark.parametrize("gate", [None, {"passed": True, "limits": [], "most_lost": None}])
def test_a_run_of_which_nothing_was_judged_has_not_passed(record, gate):
    assert '<section class="verdict yes"><b>Passed.</b>' in render(record)
    page = render(record | {"gate": gate, "verdict": "Done; nothing was judged."})
    assert '<section class="verdict open"><b>Not judged.</b> Done; nothing was judged.' in page
    assert "Passed" not in page


def test_gate_table_tells_what_was_measured_beside_the_end_that_was_judged(record):
    page = render(record)
    row = re.search(r"<td>at most 0.02 below the teacher</td>(.*?)</tr>", page, re.DOTALL)[1]
    assert re.findall(r'<td class="n">([^<]*)</td>', row)[:3] == ["0.011", "0.0040 to 0.0170", "0.017"]


def test_estimates_stand_beside_what_was_measured_with_their_error(record):
    record["estimates"].append(
        {"what": "decode on raspberry-pi-5", "unit": "tokens/s", "estimated": 90.0, "measured": None}
    )
    bench_stage = stage("deploy.bench.local", 5.0) | {"stage": "deploy.bench"}
    bench_stage["metrics"] = {
        "prefill_tokens_per_s": 9000.0, "decode_tokens_per_s": 2000.0, "peak_memory_bytes": 80_000_000,
        "local_estimate": {
            "prefill_tokens_per_s": 18000.0, "decode_tokens_per_s": 1500.0, "peak_memory_bytes": 76_000_000,
        },
    }  # fmt: skip
    older = stage("deploy.bench.torch", 5.0) | {"stage": "deploy.bench", "metrics": {"decode_tokens_per_s": 9.0}}
    record["estimates"] += local_estimates([*record["stages"], older, bench_stage])
    page = render(record)
    rows = {
        row[0]: row[1:]
        for row in (re.findall(r"<td[^>]*>([^<]*)</td>", text) for text in page.split("<tr>"))
        if len(row) == 5
    }
    assert rows["bundle size"] == ["1 MB", "1.05 MB", "0.95", "-5 %"]
    assert rows["decode on raspberry-pi-5"] == ["90 tokens/s", "not measured", "", ""]
    assert rows["prefill of the bundle here"] == ["18,000 tokens/s", "9,000 tokens/s", "2.00", "+100 %"]
    assert rows["decode of the bundle here"] == ["1,500 tokens/s", "2,000 tokens/s", "0.75", "-25 %"]
    assert rows["peak memory of the bundle here"] == ["76 MB", "80 MB", "0.95", "-5 %"]


def test_text_from_the_user_is_escaped(record):
    record["profile"]["description"] = "<script>alert(1)</script>"
    record["ledger"]["entries"][1]["step"] = "<b>&"
    record["funnel"][0]["dropped"] = {"<img>": 3}
    page = render(record)
    assert "<script>" not in page
    assert "<b>&" not in page.replace("<b>&lt;", "")
    assert "<img>" not in page


def test_a_folder_that_cannot_be_written_is_an_error_and_leaves_nothing(record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Choose another place"):
        write_report(record, tmp_path / "file" / "report.html")
    write_report(record, tmp_path / "report.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "report.html"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.97, 0.98), (5, 5), (-3, 7), (1e-9, 2e-9), (0, 0)])
def test_ticks_cover_the_range_with_few_round_values(low, high):
    values = charts.ticks(low, high)
    assert values[0] <= low
    assert values[-1] >= high
    assert 1 <= len(values) <= 8


def test_labels_are_spread_apart_and_keep_their_order():
    moved = charts.spread([10.0, 11.0, 50.0, 10.5], 15)
    assert moved[0] < moved[3] < moved[1]
    assert moved[3] - moved[0] >= 15


@pytest.mark.parametrize(
    ("value", "words"), [(0, "0 B"), (999, "999 B"), (1_050_000, "1.05 MB"), (2.5e12, "2.5e+03 GB")]
)
def test_sizes(value, words):
    assert charts.size(value) == words
