"""Benchmarks over SSH against a real server: copied once, resumed, checked there, and refused in one clear message."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from compress import cli
from compress.errors import EdgestillError, TargetError
from deploy.bench import OnDevice, bench_bundle
from deploy.bundle import BUNDLE_FILE, open_bundle, write_bundle
from deploy.remote import sync
from deploy.remote.places import parse_place
from deploy.remote.sync import Remote, copy_bundle
from deploy.remote.transport import open_device
from tests.deploy.sshd import Server, bare_python, free_port, running

SHORT: dict[str, Any] = {"prompt_tokens": 8, "new_tokens": 6, "repeats": 1, "bandwidth": False, "threads": None}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that knows one key, and a client that knows the server."""
    with running(tmp_path_factory.mktemp("sshd")) as found:
        yield found


def remote(server: Server, folder: Path, *, place: str | None = None, config: Path | None = None) -> Remote:
    """A folder on the server, with this very Python."""
    device = open_device(parse_place(place or server.place), ssh_config=config or server.config)
    return Remote(device, str(folder), sys.executable)


def files(folder: Path) -> dict[str, bytes]:
    """Name and content of every file, hidden ones too."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_command_copies_measures_and_brings_the_record_back(server: Server, bundle: Path, tmp_path: Path) -> None:
    options = ["--on", server.place, "--ssh-config", str(server.config), "--remote-python", sys.executable]
    short = ["--set", "repeats=1", "--set", "prompt_tokens=8", "--set", "new_tokens=6", "--out", str(tmp_path / "out")]
    first = CliRunner().invoke(cli.app, ["bench", str(bundle), *options, *short, "--target", "raspberry-pi-5"])
    assert first.exit_code == 0, first.output
    assert f"measured on {server.place}" in " ".join(first.stdout.split())
    assert f"note: {server.place} is not raspberry-pi-5: it is " in first.stdout
    record = json.loads((tmp_path / "out" / "bench.json").read_text(encoding="utf-8"))
    assert record["where"] == server.place
    assert record["prompt_tokens"] == 8
    assert record["decode_tokens_per_s"] > 0
    assert record["machine"]["cores"] >= 1
    assert record["machine"]["system"].startswith("Linux")
    places = sorted(path.name for path in (server.home / ".cache" / "edgestill").iterdir())
    assert len(places) == 2, "the bundle's folder and the tools beside it"
    assert files(server.home / ".cache" / "edgestill" / places[0]) == files(bundle)
    again = CliRunner().invoke(cli.app, ["bench", str(bundle), *options, *short])
    assert again.exit_code == 2
    assert "bench.json: is there already" in again.stderr
    as_json = CliRunner().invoke(cli.app, ["bench", str(bundle), *options, *short[:-2], "--json"])
    assert json.loads(as_json.stdout)["metrics"]["where"] == server.place


def test_what_is_there_and_right_is_not_sent_again(server: Server, bundle: Path, tmp_path: Path) -> None:
    opened, place = open_bundle(bundle), remote(server, tmp_path / "there")
    first = copy_bundle(place, opened)
    assert sorted(first.sent) == sorted(path.name for path in bundle.iterdir())
    assert first.bytes == opened.bytes
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "there").iterdir()}
    second = copy_bundle(place, opened)
    assert (second.sent, second.resumed, second.bytes) == ([], [], 0)
    assert sorted(second.kept) == sorted(first.sent)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "there").iterdir()}


def test_a_broken_copy_goes_on_and_a_wrong_one_starts_anew(server: Server, bundle: Path, tmp_path: Path) -> None:
    there, whole = tmp_path / "there", (bundle / "model.onnx").read_bytes()
    there.mkdir()
    (there / ".model.onnx.part").write_bytes(whole[:40_000])
    (there / ".tokenizer.json.part").write_bytes(b"of another file")
    (there / ".run.py.part").write_bytes((bundle / "run.py").read_bytes())  # whole, but never given its name
    copied = copy_bundle(remote(server, there), open_bundle(bundle))
    assert sorted(copied.resumed) == ["model.onnx", "run.py"]
    assert "tokenizer.json" in copied.sent
    assert copied.bytes == open_bundle(bundle).bytes - 40_000 - (bundle / "run.py").stat().st_size
    assert files(there) == files(bundle)


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer"])
def test_a_damaged_file_on_the_device_is_sent_anew(server: Server, bundle: Path, tmp_path: Path, damage: str) -> None:
    there = Path(shutil.copytree(bundle, tmp_path / "there"))
    data = (bundle / "model.onnx").read_bytes()
    changed = {"flipped": data[:99] + bytes([data[99] ^ 1]) + data[100:], "cut": data[:-1], "longer": data + b"x"}
    (there / "model.onnx").write_bytes(changed[damage])
    copied = copy_bundle(remote(server, there), open_bundle(bundle))
    assert copied.sent == ["model.onnx"]
    assert files(there) == files(bundle)


def test_damage_on_the_way_is_seen_and_told(
    server: Server, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, said = remote(server, tmp_path / "there"), []
    send = place.device.send

    def spoil(source: Path, target: str, *, offset: int = 0) -> None:
        send(source, target, offset=offset)
        if target.endswith(".model.onnx.part"):
            data = Path(target).read_bytes()
            Path(target).write_bytes(data[:5] + b"?" + data[6:])

    monkeypatch.setattr(place.device, "send", spoil)
    with pytest.raises(EdgestillError, match=r"model\.onnx arrived damaged twice \(SHA-256 differs\)"):
        copy_bundle(place, open_bundle(bundle), said.append)
    assert "model.onnx arrived damaged and will be sent again" in said
    assert not any("model.onnx" in name for name in files(tmp_path / "there"))


def test_a_copy_that_is_interrupted_leaves_nothing_that_counts(server: Server, bundle: Path, tmp_path: Path) -> None:
    """Ctrl-C in the midst of a large file; the same command then sends the rest."""
    large, there = Path(shutil.copytree(bundle, tmp_path / "large")), tmp_path / "there"
    with (large / "weights.bin").open("wb") as stream:
        for at in range(512):
            stream.write(bytes([at % 251]) * (256 << 10))
    info = json.loads((large / BUNDLE_FILE).read_text(encoding="utf-8"))
    write_bundle(large, {name: value for name, value in info.items() if name not in ("edgestill", "files")})
    command = [sys.executable, "-m", "compress.entry", "bench", str(large), "--on", server.place,
               "--ssh-config", str(server.config), "--remote-python", sys.executable,
               "--remote-folder", str(there), "--set", "repeats=1", "--set", "new_tokens=4"]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    part = there / ".weights.bin.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 1 << 20):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert b"interrupted; the same command goes on" in errors
    assert not (there / "weights.bin").exists()
    copied = copy_bundle(remote(server, there), open_bundle(large))
    assert "weights.bin" in copied.resumed
    assert copied.bytes < (large / "weights.bin").stat().st_size
    assert files(there) == files(large)


def test_an_unknown_host_key_is_refused(server: Server, bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "config"
    text = server.config.read_text(encoding="utf-8").replace(f"{server.folder}/known_hosts", str(tmp_path / "empty"))
    config.write_text(text, encoding="utf-8")
    user = server.place.removeprefix("ssh://").rpartition(":")[0]
    message = rf"host key is not known here. Connect once by hand and compare.*: ssh -p {server.port} {user}"
    with pytest.raises(TargetError, match=message):
        copy_bundle(remote(server, tmp_path / "there", config=config), open_bundle(bundle))
    assert not (tmp_path / "empty").exists(), "nothing is learnt behind the user's back"
    assert not (tmp_path / "there").exists()


def test_a_changed_host_key_is_refused(server: Server, bundle: Path, tmp_path: Path) -> None:
    other = (server.folder / "user_key.pub").read_text(encoding="utf-8")  # a key, but not the server's
    (tmp_path / "known").write_text(f"[127.0.0.1]:{server.port} {other}", encoding="utf-8")
    text = server.config.read_text(encoding="utf-8").replace(f"{server.folder}/known_hosts", str(tmp_path / "known"))
    (tmp_path / "config").write_text(text, encoding="utf-8")
    with pytest.raises(TargetError, match="another machine, or someone in between"):
        copy_bundle(remote(server, tmp_path / "there", config=tmp_path / "config"), open_bundle(bundle))


def test_a_key_that_the_device_does_not_know_is_told(server: Server, bundle: Path, tmp_path: Path) -> None:
    text = server.config.read_text(encoding="utf-8").replace("user_key", "host_key")
    (tmp_path / "config").write_text(text, encoding="utf-8")
    with pytest.raises(TargetError, match=r"lets no key of yours in .*passwords never: ssh-copy-id"):
        copy_bundle(remote(server, tmp_path / "there", config=tmp_path / "config"), open_bundle(bundle))


def test_a_wrong_port_is_told(server: Server, bundle: Path, tmp_path: Path) -> None:
    place = f"ssh://nobody@127.0.0.1:{free_port()}"
    with pytest.raises(TargetError, match=r"cannot be reached \(.*Connection refused\). See whether this works: ssh"):
        copy_bundle(remote(server, tmp_path / "there", place=place), open_bundle(bundle))


def test_a_python_without_the_runtime_is_told_with_the_command(server: Server, bundle: Path, tmp_path: Path) -> None:
    python = bare_python(tmp_path / "venv")
    on = OnDevice(remote(server, tmp_path / "there").device, str(python), str(tmp_path / "there"))
    message = (
        rf"has no onnxruntime-genai and no numpy. Run there: {python} -m pip install onnxruntime-genai==0\.\S+ numpy;"
    )
    with pytest.raises(TargetError, match=message):
        bench_bundle(bundle, on=on, **SHORT)
    assert not (tmp_path / "there").exists(), "nothing is copied to a device that cannot run it"


def test_a_python_that_is_not_there_is_told(server: Server, bundle: Path, tmp_path: Path) -> None:
    on = OnDevice(remote(server, tmp_path / "there").device, "~/no such/python", str(tmp_path / "there"))
    with pytest.raises(TargetError, match=r"no Python called '~/no such/python' there .*--remote-python PATH"):
        bench_bundle(bundle, on=on, **SHORT)


def test_a_full_disk_is_told_before_anything_is_copied(
    server: Server, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Remote.ask
    monkeypatch.setattr(sync.Remote, "ask", lambda self, *a: ask(self, *a) | {"free_bytes": 1000})
    with pytest.raises(TargetError, match=r"MB are to be copied and 0\.0 MB are free"):
        copy_bundle(remote(server, tmp_path / "there"), open_bundle(bundle))


def test_words_of_the_user_reach_the_device_as_they_are(server: Server, bundle: Path, tmp_path: Path) -> None:
    """A folder's name with blanks and signs of the shell is a name, nothing more."""
    odd = tmp_path / "a b'; touch $(pwd)x; echo 'c"
    copy_bundle(remote(server, odd), open_bundle(bundle))
    assert files(odd) == files(bundle)


def test_a_runner_that_fails_there_says_why(server: Server, bundle: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"not a graph")
    info = json.loads((broken / BUNDLE_FILE).read_text(encoding="utf-8"))
    write_bundle(broken, {name: value for name, value in info.items() if name not in ("edgestill", "files")})
    on = OnDevice(remote(server, tmp_path / "there").device, sys.executable, str(tmp_path / "there"))
    with pytest.raises(EdgestillError, match=rf"bench {server.place}: .*run.py: error: .*cannot open it"):
        bench_bundle(broken, on=on, **SHORT)
