"""Benchmarks over adb, where no device is: a program called adb replays a conversation and refuses any other word."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from compress.errors import EdgestillError, TargetError
from compress.files import file_sha256
from deploy.bench import OnDevice, bench_bundle
from deploy.bundle import BUNDLE_FILE, RUNNER, open_bundle
from deploy.remote.places import parse_place
from deploy.remote.sync import DEVICE_SIDE, Remote, copy_bundle
from deploy.remote.transport import open_device, words

FOLDER = "/data/local/tmp/edgestill/b"
PUSHED = "1 file pushed, 0 skipped. 30.1 MB/s (28308 bytes in 0.001s)\n"
# A file in a temporary folder, of whatever name, is the REST of a broken copy.
FAKE = """\
#!{python}
import json, pathlib, sys
folder = pathlib.Path({folder!r})
talk = json.loads((folder / "talk.json").read_text())
told = folder / "at"
at = int(told.read_text()) if told.exists() else 0
said = ["REST" if pathlib.Path(word).name == "rest" else word for word in sys.argv[1:]]
if at >= len(talk) or said != talk[at]["said"]:
    wanted = talk[at]["said"] if at < len(talk) else "nothing more"
    (folder / "unexpected").write_text(f"step {{at}}: got {{said}}, expected {{wanted}}")
    sys.exit("unexpected words")
told.write_text(str(at + 1))
if sys.argv[3] == "push":
    (folder / f"pushed{{at}}").write_bytes(pathlib.Path(sys.argv[4]).read_bytes())
sys.stdout.write(talk[at].get("out", ""))
sys.stderr.write(talk[at].get("err", ""))
sys.exit(talk[at].get("rc", 0))
"""


class Conversation:
    """The recorded exchanges, in order; at the end all of them must have been used and no other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.exchanges = folder, []  # type: ignore[var-annotated]

    def expect(self, *said: str, out: str = "", err: str = "", rc: int = 0) -> None:
        """The next thing that adb will be asked, and its answer."""
        self.exchanges.append({"said": ["-s", "R58M", *said], "out": out, "err": err, "rc": rc})
        (self.folder / "talk.json").write_text(json.dumps(self.exchanges), encoding="utf-8")

    def finished(self) -> bool:
        """Whether everything was said, and nothing else."""
        unexpected = self.folder / "unexpected"
        assert not unexpected.exists(), unexpected.read_text(encoding="utf-8")
        return (self.folder / "at").read_text(encoding="utf-8") == str(len(self.exchanges))

    def tools(self) -> None:
        """The runner and the script that looks around are sent."""
        for source in (RUNNER, DEVICE_SIDE):
            self.expect("shell", f"mkdir -p {FOLDER}.edgestill-tools")
            self.expect("push", str(source), f"{FOLDER}.edgestill-tools/{source.name}", out=PUSHED)

    def file(self, source: Path) -> None:
        """A whole file is sent under the name of an unfinished one."""
        self.expect("shell", f"mkdir -p {FOLDER}")
        self.expect("push", str(source), f"{FOLDER}/.{source.name}.part", out=PUSHED)


@pytest.fixture
def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Conversation:
    """A conversation, and the program that replays it as the only adb."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "adb").write_text(FAKE.format(python=sys.executable, folder=str(folder)), encoding="utf-8")
    (folder / "adb").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Conversation(folder)


def digests(bundle: Path) -> dict[str, str]:
    """SHA-256 of every file that is copied, in the order of the copy."""
    names = [*open_bundle(bundle).shipped, BUNDLE_FILE]
    return {name: file_sha256(bundle / name) for name in names}


def asked(action: str, bundle: Path) -> str:
    """The command by which the device is asked."""
    request = json.dumps({"folder": FOLDER, "files": digests(bundle)})
    return words(["python3", f"{FOLDER}.edgestill-tools/device_side.py", action, request])


def seen(bundle: Path, *, right: bool, part: dict[str, Any] | None = None, **packages: Any) -> str:
    """What the device answers."""
    names = digests(bundle)
    files = {name: {"bytes": (bundle / name).stat().st_size, "sha256": sha} for name, sha in names.items()}
    return json.dumps(
        {
            "python": "3.11.9",
            "executable": "/data/local/tmp/py/bin/python3",
            "packages": {"onnxruntime-genai": "0.18.0", "numpy": "2.3.1"} | packages,
            "folder": FOLDER,
            "free_bytes": 10**10,
            "files": files if right else dict.fromkeys(names),
            "taken": [*names] if right else [],
            "ours": right,
            "parts": dict.fromkeys(names) | (part or {}),
        }
    )


def device_of(talk: Conversation) -> OnDevice:
    """The phone at the other end."""
    return OnDevice(open_device(parse_place("adb://R58M")), folder=FOLDER)


def test_a_bundle_is_pushed_checked_and_measured(bundle: Path, talk: Conversation) -> None:
    short: dict[str, Any] = {"prompt_tokens": 8, "new_tokens": 4, "repeats": 1, "bandwidth": False}
    here = bench_bundle(bundle, **short).facts()  # what the device would print is not invented
    record = {name: value for name, value in here.items() if name != "where"}
    talk.tools()
    talk.expect("shell", asked("look", bundle), out=seen(bundle, right=False))
    for name in digests(bundle):
        talk.file(bundle / name)
    talk.expect("shell", asked("settle", bundle), out=seen(bundle, right=True))
    run = f"python3 {FOLDER}.edgestill-tools/run.py --bundle {FOLDER}"
    run += " --prompt-tokens 8 --new-tokens 4 --repeats 1 --warmup 1"
    talk.expect("shell", f"{run} --bench --stop-on-eof --no-bandwidth", out=json.dumps(record) + "\n")
    found = bench_bundle(bundle, **short, threads=None, on=device_of(talk))
    assert talk.finished()
    assert found.facts() == record | {"where": "adb://R58M"}


def test_a_broken_push_goes_on_with_the_rest(bundle: Path, talk: Conversation) -> None:
    model, names = bundle / "model.onnx", digests(bundle)
    half = model.read_bytes()[:30_000]
    (talk.folder / "half").write_bytes(half)
    part = {"model.onnx": {"bytes": len(half), "sha256": file_sha256(talk.folder / "half")}}
    answer = json.loads(seen(bundle, right=True, part=part))
    answer["files"]["model.onnx"] = None
    talk.tools()
    talk.expect("shell", asked("look", bundle), out=json.dumps(answer))
    talk.expect("shell", f"mkdir -p {FOLDER}")
    device = open_device(parse_place("adb://R58M"))
    at = len(talk.exchanges)
    talk.expect("push", "REST", f"{FOLDER}/.model.onnx.part.rest", out=PUSHED)
    rest = f"{FOLDER}/.model.onnx.part.rest"
    talk.expect("shell", f"cat {rest} >> {FOLDER}/.model.onnx.part && rm {rest}")
    talk.expect("shell", asked("settle", bundle), out=seen(bundle, right=True))
    copied = copy_bundle(Remote(device, FOLDER), open_bundle(bundle))
    assert talk.finished()
    assert (copied.sent, copied.resumed) == ([], ["model.onnx"])
    assert half + (talk.folder / f"pushed{at}").read_bytes() == model.read_bytes()
    assert len(copied.kept) == len(names) - 1


@pytest.mark.parametrize(
    "line",
    [
        "adb: device 'R58M' not found",
        "error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set",
        "adb: device offline",
    ],
)
def test_a_device_that_is_not_there_is_told(bundle: Path, talk: Conversation, line: str) -> None:
    talk.expect("shell", f"mkdir -p {FOLDER}.edgestill-tools", err=line + "\n", rc=1)
    with pytest.raises(TargetError, match=r"adb://R58M: cannot be reached .*See: adb devices"):
        copy_bundle(Remote(device_of(talk).device, FOLDER), open_bundle(bundle))
    assert talk.finished()


def test_a_push_that_fails_is_told_with_its_reason(bundle: Path, talk: Conversation) -> None:
    talk.expect("shell", f"mkdir -p {FOLDER}.edgestill-tools")
    full = "adb: error: failed to copy 'run.py' to 'x': remote couldn't write: No space left on device\n"
    talk.expect("push", str(RUNNER), f"{FOLDER}.edgestill-tools/run.py", err=full, rc=1)
    with pytest.raises(EdgestillError, match=r"the copy of run\.py broke off .*No space left on device") as caught:
        copy_bundle(Remote(device_of(talk).device, FOLDER), open_bundle(bundle))
    assert caught.value.exit_code == 1
    assert talk.finished()


def test_a_phone_without_python_hears_of_termux(bundle: Path, talk: Conversation) -> None:
    talk.tools()
    talk.expect("shell", asked("look", bundle), err="/system/bin/sh: python3: inaccessible or not found\n", rc=127)
    with pytest.raises(TargetError, match=r"no Python called 'python3' there .*Termux .*ssh://USER@PHONE:8022"):
        copy_bundle(Remote(device_of(talk).device, FOLDER), open_bundle(bundle))
    assert talk.finished()


def test_a_machine_without_adb_hears_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match=r"the program adb is not installed. Install .*apt-get install adb"):
        open_device(parse_place("adb://R58M"))


def test_the_replay_refuses_other_words(bundle: Path, talk: Conversation) -> None:
    talk.expect("shell", "mkdir -p /elsewhere")
    with pytest.raises(EdgestillError, match="unexpected words"):
        copy_bundle(Remote(device_of(talk).device, FOLDER), open_bundle(bundle))
    with pytest.raises(AssertionError, match="step 0: got"):
        talk.finished()
