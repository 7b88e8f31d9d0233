"""The script in every bundle: needs the runtime alone, answers as the evaluation does, and never invents a figure."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from compress.encoding import encode_text_prompt, load_tokenizer
from deploy.bundle import BUNDLE_FILE, RUNNER, RUNNER_FILE, write_bundle
from deploy.bundle_runner import run
from deploy.runners import GenaiRunner
from tests.tiny import END

ASK = "turn on the light in the kitchen"


def start(folder: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the bundle's own script, from another folder and with nothing of this project in reach."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(folder / RUNNER_FILE), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=clean, cwd="/", timeout=100, **options
    )


@pytest.fixture(scope="module")
def opened(bundle: Path) -> tuple[run.Runner, run.Text]:
    """The bundle, opened by the script's own code."""
    info = run.read_json(bundle / BUNDLE_FILE)
    runner = run.Runner(bundle, info, run.Settings(threads=1))
    return runner, run.Text(runner)


def greedy(bundle: Path, ids: list[int], most: int) -> list[int]:
    """What the evaluation's runtime answers."""
    return GenaiRunner(bundle, threads=1).generate([ids], most, {END})[0]


def streamed(text: run.Text, ids: list[int]) -> str:
    """Their text as it comes, token by token; a model of random weights also writes bytes that are no character."""
    stream = text.tokenizer.create_stream()
    return "".join(stream.decode(token) for token in ids)


def test_it_is_in_the_bundle_as_it_stands_here(bundle: Path) -> None:
    assert (bundle / RUNNER_FILE).read_bytes() == RUNNER.read_bytes()
    assert RUNNER_FILE in json.loads((bundle / BUNDLE_FILE).read_text(encoding="utf-8"))["files"]


def test_it_needs_the_runtime_and_numpy_alone() -> None:
    tree = ast.parse(RUNNER.read_text(encoding="utf-8"))
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in named} - set(sys.stdlib_module_names) == {"numpy", "onnxruntime_genai"}


def test_texts_become_the_tokens_that_the_model_was_trained_on(
    bundle: Path, opened: tuple[run.Runner, run.Text]
) -> None:
    tokenizer, text = load_tokenizer(bundle), opened[1]
    messages = [{"role": "user", "content": 'say "hé" 😀\n'}, {"role": "assistant", "content": "ok"}]
    asked = [*messages, {"role": "user", "content": ASK}]
    rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text.chat(asked) == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    for plain in (ASK, "", "<|bos|>a", "wörter 😀"):
        wanted = list(encode_text_prompt(plain, tokenizer))
        assert text.raw(plain) == wanted or plain == "<|bos|>a"
    assert text.raw("<|bos|>a").count(1) == 1
    assert streamed(text, text.raw("wörter 😀")) == "wörter 😀"


def test_one_answer_is_the_greedy_one(bundle: Path, opened: tuple[run.Runner, run.Text]) -> None:
    text = opened[1]
    for arguments, ids in (([ASK], text.chat([{"role": "user", "content": ASK}])), (["--raw", ASK], text.raw(ASK))):
        done = start(bundle, *arguments, "--max-new-tokens", "12", "--threads", "1")
        assert done.returncode == 0, done.stderr
        assert done.stdout == streamed(text, greedy(bundle, ids, 12)) + "\n"
    piped = start(bundle, "-", "--max-new-tokens", "12", "--threads", "1", input=ASK)
    assert piped.stdout == start(bundle, ASK, "--max-new-tokens", "12", "--threads", "1").stdout


def test_prompts_in_pieces_give_the_same_answer(bundle: Path, opened: tuple[run.Runner, run.Text]) -> None:
    ids = opened[1].raw(ASK * 3)
    info = run.read_json(bundle / BUNDLE_FILE)
    entries = {"session.intra_op.allow_spinning": "0"}
    info["tuned"] = {"threads": 1, "prefill_chunk": 5, "device": "x", "config_entries": entries, "measured": {}}
    settings = run.Settings.of(info, run.read_json(bundle / run.GENAI_CONFIG))
    assert settings == run.Settings(1, 5, entries)
    runner = run.Runner(bundle, info, settings)
    dialogue = run.Dialogue(runner)
    dialogue.read(ids, 12)
    assert list(dialogue.tokens(12)) == greedy(bundle, ids, 12)
    assert runner.answers([ids, ids[1:], ids], 12) == [greedy(bundle, each, 12) for each in (ids, ids[1:], ids)]


def test_settings_come_from_the_command_then_the_tuning_then_the_runtimes_config() -> None:
    config = {"model": {"decoder": {"session_options": {"intra_op_num_threads": 3}}}}
    tuned = {"tuned": {"threads": 2}}
    assert run.Settings.of(tuned, config, 5).threads == 5
    assert run.Settings.of(tuned, config).threads == 2
    assert run.Settings.of({}, config).threads == 3
    assert run.Settings.of({}, {}).threads == run.cores() >= 1


def test_cores_are_physical_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for cpu in range(4):
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n", encoding="utf-8")
    assert run.cores(tmp_path) == 2
    assert run.processors(tmp_path) == [[0, 2], [1, 3]]
    assert run.cores(tmp_path / "nothing") == 4
    old, new = tmp_path / "fs/cgroup/cpu", tmp_path / "fs/cgroup/cpu.max"
    old.mkdir(parents=True)
    for quota, expected in (("-1", 2), ("50000", 1)):
        (old / "cpu.cfs_quota_us").write_text(f"{quota}\n", encoding="utf-8")
        (old / "cpu.cfs_period_us").write_text("100000\n", encoding="utf-8")
        assert run.cores(tmp_path) == expected
    for quota, expected in (("max 100000", 2), ("100000 100000", 1), ("110000 100000", 2), ("900000 100000", 2)):
        new.write_text(f"{quota}\n", encoding="utf-8")
        assert run.cores(tmp_path) == expected


def test_a_conversation_keeps_its_turns_and_reads_only_what_is_new(
    bundle: Path, opened: tuple[run.Runner, run.Text], capsys: pytest.CaptureFixture[str]
) -> None:
    runner, text = opened
    chat = run.Conversation(runner, text, [], 8)
    messages: list[dict[str, str]] = []
    for asked in (ASK, "and in the hall", "dim it"):
        messages.append({"role": "user", "content": asked})
        ids = text.chat(messages)
        wanted = streamed(text, greedy(bundle, ids, 8))
        assert chat.ask(asked) == 0
        assert capsys.readouterr().out == wanted
        messages.append({"role": "assistant", "content": wanted})
        assert chat.turns == messages


def test_the_cache_is_as_long_as_what_is_asked_and_grows_by_doubling(
    bundle: Path,
    opened: tuple[run.Runner, run.Text],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runner, text = opened
    sizes: list[int] = []
    start = run.Runner.start

    def watched(self: run.Runner, max_length: int, rows: int = 1) -> Any:
        sizes.append(max_length)
        return start(self, max_length, rows)

    monkeypatch.setattr(run.Runner, "start", watched)
    ids = text.raw("dim it")
    run.answer(runner, text, ids, 4)
    assert sizes == [len(ids) + 4]
    chat, messages = run.Conversation(runner, text, [], 4), list[dict[str, str]]()
    sizes.clear()
    for at in range(6):
        messages.append({"role": "user", "content": f"dim it {at}"})
        before = len(text.chat(messages))
        chat.ask(f"dim it {at}")
        assert before + 4 <= sizes[-1] <= max(2 * (before + 4), 2 * sizes[0])
        messages.append(chat.turns[-1])
    assert sizes == sorted(set(sizes))
    assert 1 < len(sizes) < 6, "not anew for every turn"
    monkeypatch.setattr(run, "ROOM", 5)  # an answer that outgrows its cache goes on in a larger one
    sizes.clear()
    capsys.readouterr()
    run.answer(runner, text, ids, 60)
    assert sizes[0] < len(ids) + 60
    assert capsys.readouterr().out == streamed(text, greedy(bundle, ids, 60))


def test_answers_together_fill_no_more_memory_than_they_may(
    opened: tuple[run.Runner, run.Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, text = opened
    prompts = [text.raw(asked) for asked in ("dim it", "lock it", "dim it", ASK)]
    whole = runner.answers(prompts, 6)
    monkeypatch.setattr(run, "BATCH_BYTES", 2 * runner.position_bytes * (len(prompts[0]) + 6))
    rows: list[int] = []
    start = run.Runner.start

    def watched(self: run.Runner, max_length: int, many: int = 1) -> Any:
        rows.append(many)
        return start(self, max_length, many)

    monkeypatch.setattr(run.Runner, "start", watched)
    assert runner.answers(prompts, 6) == whole
    assert max(rows) <= 2
    with pytest.raises(run.Fault, match=r"the prompt has 300 tokens; expected 1 to 255, the bundle's context"):
        runner.answers([[5] * 300], 6)


def test_a_full_context_forgets_the_oldest_turns(opened: tuple[run.Runner, run.Text]) -> None:
    runner, text = opened
    chat = run.Conversation(runner, text, [{"role": "system", "content": "be brief"}], 16)
    forgotten = [chat.ask(f"{at} {ASK} and {ASK}") for at in range(12)]
    assert forgotten[0] == 0
    assert any(forgotten)
    assert set(forgotten) <= {0, 2, 4}
    assert chat.turns[-2]["content"].startswith("11 ")
    assert len(text.chat([*chat.head, *chat.turns])) <= runner.context
    kept = list(chat.turns)
    with pytest.raises(run.Fault, match=r"the message has \d+ tokens; at most 240 fit"):
        chat.ask(ASK * 60)
    assert chat.turns == kept


def test_the_chat_reads_lines_and_ends_with_its_input(bundle: Path) -> None:
    done = start(
        bundle, "--chat", "--max-new-tokens", "4", "--threads", "1", input=f"{ASK}\n\n/new\n{ASK}\n{ASK * 60}\n"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == lines[1], "after /new it is the same conversation again"
    assert lines[2].startswith("(the message has ")


def test_ctrl_c_stops_the_answer_and_then_the_chat(bundle: Path) -> None:
    """In a terminal of its own, as a person would."""
    ours, theirs = pty.openpty()
    command = [sys.executable, str(bundle / RUNNER_FILE), "--chat", "--threads", "1"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""
    while b"> " not in seen:
        seen += os.read(ours, 1000)
    assert b"Ctrl-C stops an answer" in seen
    for _ in range(10):  # one that comes before the line is read waits for a key
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert process.wait(timeout=5) == 0
            break
    process.kill()
    assert process.wait() == 0
    os.close(ours)


def test_an_interrupted_answer_is_not_kept(
    opened: tuple[run.Runner, run.Text], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = run.Conversation(*opened, [], 8)
    chat.ask(ASK)
    kept, lines = list(chat.turns), iter(["more", ASK])

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    def read(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        monkeypatch.setattr(chat, "ask", interrupted if line == "more" else type(chat).ask.__get__(chat))
        return line

    def interrupted(asked: str) -> int:
        with monkeypatch.context() as patch:
            patch.setattr(run, "say", stop)
            return run.Conversation.ask(chat, asked)

    monkeypatch.setattr("builtins.input", read)
    run.chat(chat)
    assert "(stopped)" in capsys.readouterr().out
    assert chat.turns[: len(kept)] == kept
    assert [turn["content"] for turn in chat.turns if turn["role"] == "user"] == [ASK, ASK]


def test_a_bundle_without_a_template_says_to_use_raw(bundle: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(bundle, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    done = start(bare, ASK)
    assert (done.returncode, done.stdout) == (1, "")
    assert "run.py: error: the bundle has no chat template that the runtime can render" in done.stderr
    assert "Use --raw" in done.stderr
    assert start(bare, "--raw", ASK, "--max-new-tokens", "2").returncode == 0


def test_check_finds_what_is_damaged(bundle: Path, tmp_path: Path) -> None:
    assert start(bundle, "--check").stdout == "0 damaged of 6 files\n"
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    data = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(data[:50] + b"?" + data[51:])
    (copy / "tokenizer.json").write_text("{}", encoding="utf-8")
    (copy / "tokenizer_config.json").unlink()
    done = start(copy, "--check")
    assert done.returncode == 1
    assert "model.onnx: its content changed" in done.stdout
    assert "tokenizer.json: 2 bytes, expected" in done.stdout
    assert "tokenizer_config.json: missing" in done.stdout
    assert done.stdout.endswith("3 damaged of 6 files\n")


def test_bench_prints_one_line_that_the_toolchain_reads(bundle: Path) -> None:
    lengths = ["--prompt-tokens", "8", "--new-tokens", "6", "--repeats", "2", "--threads", "1", "--no-bandwidth"]
    done = start(bundle, "--bench", *lengths)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    record = json.loads(line)
    assert record["threads"] == 1
    assert record["memory_bandwidth_bytes_per_s"] is None
    assert record["read_bound_share"] is None
    assert record["machine"]["memory_bytes"] > 1e8
    for what in ("energy", "temperature"):
        figures = [value for name, value in record[what].items() if name not in ("reason", "source")]
        assert None not in figures or record[what]["reason"], "what is not told has its reason"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give one of: a text, --chat, --bench, --check"),
        (["x", "--chat"], 2, "give one of"),
        (["--bench", "--prompt-tokens", "250", "--new-tokens", "20"], 1, "at most 256 together"),
        (["--bench", "--new-tokens", "1"], 1, "--new-tokens of 2 or more"),
        (["--bench", "--repeats", "0"], 2, "got 0, expected 1 or more"),
        (["--raw", "word " * 300], 1, "expected 1 to 255, the bundle's context"),
        (["x", "--bundle", "/nowhere"], 1, "/nowhere/bundle.json: cannot be read"),
    ],
)
def test_bad_input_is_one_message(bundle: Path, arguments: list[str], code: int, message: str) -> None:
    done = start(bundle, *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_graph_is_one_message(bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"not a graph")
    info = json.loads((broken / BUNDLE_FILE).read_text(encoding="utf-8"))
    write_bundle(broken, {name: value for name, value in info.items() if name not in ("edgestill", "files")})
    done = start(broken, ASK)
    assert (done.returncode, "onnxruntime-genai cannot open it" in done.stderr) == (1, True)


def test_a_python_without_the_runtime_hears_the_command(bundle: Path) -> None:
    command = [sys.executable, "-I", "-S", str(bundle / RUNNER_FILE), ASK]  # -S: no installed packages
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"Install it with: {sys.executable} -m pip install onnxruntime-genai==0." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_benchmark_ends_when_its_caller_is_gone(bundle: Path) -> None:
    command = [sys.executable, str(bundle / RUNNER_FILE), "--bench", "--repeats", "100000", "--stop-on-eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        time.sleep(1.5)
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=20) == 130


# -- sensors, on a tree of files as Linux shows them --


def write(root: Path, **files: str | int) -> None:
    """Write small files; ``__`` in a name is a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="utf-8")


def rapl(root: Path, zone: str, name: str, energy: int) -> None:
    """One RAPL zone."""
    write(root / "class/powercap" / zone, name=name, energy_uj=energy, max_energy_range_uj=1_000_000)


def battery(root: Path, status: str, **values: int) -> None:
    """One battery."""
    write(root / "class/power_supply/BAT0", type="Battery", status=status, **values)


def test_rapl_counts_the_packages_once_and_wraps_around(tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 900_000)
    rapl(tmp_path, "intel-rapl:1", "package-1", 100_000)
    rapl(tmp_path, "intel-rapl:0:0", "core", 500_000)  # part of package-0
    rapl(tmp_path, "intel-rapl:2", "psys", 500_000)  # holds the packages
    meter = run.EnergyMeter(tmp_path)
    assert (meter.source, meter.reason) == ("rapl", "")
    assert meter.joules() == 0
    rapl(tmp_path, "intel-rapl:0", "package-0", 100_000)  # beyond the end of its range
    rapl(tmp_path, "intel-rapl:1", "package-1", 150_000)
    assert meter.joules() == pytest.approx(0.2 + 0.05)
    assert meter.joules() == 0


def test_a_battery_counts_when_it_discharges(tmp_path: Path) -> None:
    battery(tmp_path, "Discharging", current_now=-500_000, voltage_now=4_000_000)  # 2 W
    now = iter([0.0, 3.0])
    meter = run.EnergyMeter(tmp_path, clock=lambda: next(now))
    assert meter.source == "battery"
    battery(tmp_path, "Discharging", current_now=1_000_000, voltage_now=4_000_000)  # 4 W
    assert meter.joules() == pytest.approx((2 + 4) / 2 * 3)


def test_where_no_energy_is_told_there_is_a_reason_and_no_figure(tmp_path: Path) -> None:
    meter = run.EnergyMeter(tmp_path)
    assert (meter.source, meter.joules()) == (None, None)
    assert meter.reason == "the device offers no RAPL counter and no battery's power"
    battery(tmp_path, "Charging", power_now=5_000_000)
    assert run.EnergyMeter(tmp_path).reason == "the battery is not discharging but Charging"
    write(tmp_path / "class/power_supply/AC", type="Mains", online=1)
    assert run.EnergyMeter(tmp_path).source is None


def test_a_counter_that_root_alone_reads_is_told(tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 1)
    path = tmp_path / "class/powercap/intel-rapl:0/energy_uj"
    path.unlink()
    path.mkdir()  # unreadable for root too
    meter = run.EnergyMeter(tmp_path)
    assert meter.source is None
    assert meter.reason.endswith("energy_uj cannot be read (on most systems by root alone)")


def test_energy_per_token_is_that_of_the_phase(tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 0)
    meter, lengths = run.EnergyMeter(tmp_path), run.Lengths(prompt_tokens=10, new_tokens=5)
    once = {"prefill_s": 0.5, "decode_s": 0.4, "prefill_j": 3.0, "decode_j": 8.0}
    found = run._energy(meter, [once, once | {"prefill_j": 5.0}], lengths)
    assert found == {"source": "rapl", "reason": None, "prefill_j_per_token": 0.4, "decode_j_per_token": 2.0}
    short = run._energy(meter, [once | {"prefill_s": 0.01}], lengths)
    assert short["prefill_j_per_token"] is None
    assert short["decode_j_per_token"] == 2.0
    uneven = run._energy(meter, [once, once | {"prefill_s": 0.01}], lengths)
    assert uneven["prefill_j_per_token"] is None
    assert short["reason"] == "prefill took 0.01 s in a repeat, and rapl tells nothing below 0.05 s"


def test_temperatures_have_their_sensors_names(tmp_path: Path) -> None:
    write(tmp_path / "class/hwmon/hwmon0", name="k10temp", temp1_input=45_500, temp1_label="Tctl", temp2_input="x")
    write(tmp_path / "class/hwmon/hwmon1", name="nvme", temp1_input=-1000)
    write(tmp_path / "class/thermal/thermal_zone0", type="cpu-thermal", temp=51_000)
    wanted = {"k10temp Tctl": 45.5, "nvme temp1": -1.0, "thermal_zone0 cpu-thermal": 51.0}
    assert run.temperatures(tmp_path) == wanted
    assert run.temperatures(tmp_path / "nothing") == {}


def test_a_record_holds_what_the_sensors_say(bundle: Path, tmp_path: Path) -> None:
    rapl(tmp_path, "intel-rapl:0", "package-0", 5)
    write(tmp_path / "class/thermal/thermal_zone0", type="cpu", temp=40_000)
    info = run.read_json(bundle / BUNDLE_FILE)
    lengths = run.Lengths(prompt_tokens=64, new_tokens=150, repeats=3)
    record = run.bench(bundle, info, run.Settings(1), lengths, bandwidth=False, sys_root=tmp_path)
    assert record["energy"]["source"] == "rapl"
    assert record["temperature"] == {
        "before_c": {"thermal_zone0 cpu": 40.0}, "after_c": {"thermal_zone0 cpu": 40.0}, "reason": None,
    }  # fmt: skip


def test_requests_are_served_as_lines_of_json(bundle: Path, opened: tuple[run.Runner, run.Text]) -> None:
    messages = [{"role": "user", "content": ASK}]
    asked = [
        {"op": "encode", "text": ASK},
        {"op": "encode", "text": ASK, "raw": False},
        {"op": "encode", "messages": messages},
        {"op": "encode"},
        {"op": "unknown"},
        [],
    ]
    done = start(bundle, "--serve", input="".join(json.dumps(one) + "\n" for one in asked) + "\nno JSON\n")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    text = opened[1]
    assert found[:3] == [{"ids": text.raw(ASK)}, {"ids": text.chat(messages)}, {"ids": text.chat(messages)}]
    assert [list(reply) for reply in found[3:]] == [["error"]] * 4
    assert done.returncode == 0
