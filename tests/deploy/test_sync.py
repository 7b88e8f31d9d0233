"""Copies to a device that is this machine: no server is needed to see what is sent, continued, kept and refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress import cli
from compress.errors import EdgestillError, TargetError
from deploy.bench import OnDevice, bench_bundle, remote_of
from deploy.bundle import BUNDLE_FILE, open_bundle
from deploy.remote import device_side
from deploy.remote.sync import Remote, copy_bundle
from deploy.remote.transport import GO_ON, Finished, Local, call


def content(folder: Path) -> dict[str, bytes]:
    """Name and content of every file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_copy_is_whole_or_under_another_name(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, place = open_bundle(bundle), Remote(Local(), str(tmp_path / "there"), sys.executable)
    send = Local.send

    def break_off(self: Local, source: Path, target: str, *, offset: int = 0) -> None:
        send(self, source, target, offset=offset)
        if target.endswith(".tokenizer.json.part"):
            Path(target).write_bytes(source.read_bytes()[:1000])
            raise EdgestillError("local", "the copy of tokenizer.json broke off")

    monkeypatch.setattr(Local, "send", break_off)
    with pytest.raises(EdgestillError, match="broke off"):
        copy_bundle(place, opened)
    assert all(name.startswith(".") and name.endswith(".part") for name in content(tmp_path / "there"))
    monkeypatch.setattr(Local, "send", send)
    copied = copy_bundle(place, opened)
    assert "tokenizer.json" in copied.resumed
    assert content(tmp_path / "there") == content(bundle)


def test_a_bundle_has_a_place_of_its_own_by_its_digest(bundle: Path, tmp_path: Path) -> None:
    named = remote_of(OnDevice(Local()), open_bundle(bundle)).folder
    other = tmp_path / "other"
    other.mkdir()
    for path in bundle.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    assert remote_of(OnDevice(Local()), open_bundle(other)).folder == named
    text = (other / BUNDLE_FILE).read_text(encoding="utf-8")
    (other / BUNDLE_FILE).write_text(text + "\n", encoding="utf-8")
    assert remote_of(OnDevice(Local()), open_bundle(other)).folder != named
    assert remote_of(OnDevice(Local(), folder="/x"), open_bundle(other)).folder == "/x"


def test_a_file_of_the_bundle_cannot_pass_for_a_module(bundle: Path, tmp_path: Path) -> None:
    """What lies in the bundle's folder is data: neither a json.py nor another run.py there is ever run."""
    there = tmp_path / "there"
    there.mkdir()
    shutil.copy(bundle / BUNDLE_FILE, there)
    for name in ("json.py", "numpy.py", "run.py"):
        (there / name).write_text("raise SystemExit('run!')", encoding="utf-8")
    on = OnDevice(Local(), sys.executable, str(there))
    record = bench_bundle(bundle, prompt_tokens=4, new_tokens=4, repeats=1, bandwidth=False, on=on)
    assert record.decode_tokens_per_s > 0
    assert (there / "json.py").read_text(encoding="utf-8") == "raise SystemExit('run!')"


def test_links_on_the_device_are_not_followed(bundle: Path, tmp_path: Path) -> None:
    there, outside = tmp_path / "there", tmp_path / "outside"
    there.mkdir()
    outside.write_bytes((bundle / "model.onnx").read_bytes())
    shutil.copy(bundle / BUNDLE_FILE, there)
    (there / "model.onnx").symlink_to(outside)
    copied = copy_bundle(Remote(Local(), str(there), sys.executable), open_bundle(bundle))
    assert "model.onnx" in copied.sent
    assert not (there / "model.onnx").is_symlink()


@pytest.mark.parametrize("name", ["run.py", "model.onnx", "bundle.json"])
def test_the_users_own_files_are_not_overwritten(bundle: Path, tmp_path: Path, name: str) -> None:
    there, beside = tmp_path / "project", tmp_path / "project.tools"
    for folder in (there, beside):
        folder.mkdir()
        (folder / name).write_text('{"mine": 1}', encoding="utf-8")
    remote = remote_of(OnDevice(Local(), sys.executable, str(there)), open_bundle(bundle))
    with pytest.raises(TargetError, match=f"{name} there would be overwritten"):
        copy_bundle(remote, open_bundle(bundle))
    assert content(there) == content(beside) == {name: b'{"mine": 1}'}
    (there / name).write_bytes((bundle / name).read_bytes())  # what is right already is no one else's
    copy_bundle(remote, open_bundle(bundle))
    assert content(there) == content(bundle)


def test_settling_keeps_what_is_right_and_drops_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / ".a.part").write_bytes(b"a")
    (tmp_path / ".b.part").write_bytes(b"wrong")
    sha = {"a": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb", "b": "0" * 64, "c": "0" * 64}
    device_side.settle(tmp_path, sha)
    assert content(tmp_path) == {"a": b"a"}
    found = device_side.look(tmp_path / "not" / "there", list(sha))
    assert found["files"] == dict.fromkeys(sha)
    assert found["free_bytes"] > 0


def test_an_answer_that_is_no_answer_is_told(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Local, "run", lambda *a, **k: Finished(0, "Welcome to the board!\n", ""))
    with pytest.raises(EdgestillError, match=r"local: the device's answer is not JSON: 'Welcome to the board!"):
        copy_bundle(Remote(Local(), str(tmp_path)), open_bundle(bundle))


def test_a_command_that_does_not_end_is_stopped() -> None:
    with pytest.raises(EdgestillError, match=r"not done after 0\.5 s.*fewer repeats"):
        call([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5)
    with pytest.raises(EdgestillError, match=r"not done after 0\.5 s.*goes on with what has arrived"):
        call([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.5, do=GO_ON)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--on", "pi@host"], "--on: got 'pi@host'; expected local, ssh://user@host"),
        (["--on", "ssh://pi:secret@host"], "--on: a password stands before the @"),
        (["--on", "ssh://h", "--remote-python", "-c"], "--remote-python: got '-c'"),
        (["--on", "ssh://h", "--remote-python", ""], "--remote-python: got ''"),
        (["--on", "ssh://h", "--remote-folder", "here"], "--remote-folder: got 'here'; expected an absolute path"),
        (["--on", "ssh://h", "--remote-folder", "/a/../etc"], "--remote-folder: got '/a/../etc'"),
        (["--on", "ssh://h", "--remote-folder", "/"], "--remote-folder: got '/'"),
        (["--on", "ssh://h", "--remote-folder", "/a\nb"], "--remote-folder: got"),
        (["--on", "adb://R58M", "--remote-folder", "~/x"], "--remote-folder: got '~/x', and adb has no home"),
        (["--on", "ssh://h", "--ssh-config", "/none"], "--ssh-config: no file /none"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_done(bundle: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(cli.app, ["bench", str(bundle), *options])
    assert done.exit_code == 2
    assert message in done.stderr
    assert "secret" not in done.stderr


def test_bench_json_is_written_where_it_is_asked_for(bundle: Path, tmp_path: Path) -> None:
    short = ["--set", "repeats=1", "--set", "prompt_tokens=4", "--set", "new_tokens=4"]
    done = CliRunner().invoke(cli.app, ["bench", str(bundle), "--out", str(tmp_path / "out"), *short])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))["where"] == "local"
