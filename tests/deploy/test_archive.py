"""Packed bundles: the same bytes each time, the same bundle back, and everything else refused before it does harm."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress import cli
from compress.errors import ModelError, UserError
from deploy.bundle import BUNDLE_FILE, GPTQ_FOLDER, open_bundle, write_bundle

zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed: make setup")

from deploy.archive import bundle_folder, pack, unpack  # noqa: E402 - it needs the package above


@pytest.fixture
def archive(bundle: Path, tmp_path: Path) -> Path:
    """The bundle as one file."""
    out = tmp_path / "b.tar.zst"
    assert pack(bundle, out) == out.stat().st_size
    return out


def content(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_there_and_back_and_the_same_bytes_twice(bundle: Path, archive: Path, tmp_path: Path) -> None:
    assert content(unpack(archive, tmp_path / "out")) == content(bundle)
    moved = Path(shutil.copytree(bundle, tmp_path / "elsewhere"))
    (moved / "model.onnx").touch()
    (moved / "notes.txt").write_text("mine", encoding="utf-8")  # not of the bundle
    pack(moved, tmp_path / "again.tar.zst")
    assert (tmp_path / "again.tar.zst").read_bytes() == archive.read_bytes()


def test_any_tar_opens_it(archive: Path) -> None:
    with zstandard.open(archive, "rb") as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
        entries = list(tar)
    assert entries[0].name == BUNDLE_FILE
    assert {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode, e.type) for e in entries} == {
        (0, 0, 0, "", "", 0o644, tarfile.REGTYPE)
    }


def test_a_checkpoint_alone_is_packed_too(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    (folder / GPTQ_FOLDER).mkdir(parents=True)
    (folder / GPTQ_FOLDER / "config.json").write_text("{}", encoding="utf-8")
    write_bundle(folder, {"formats": ["gptq"], "model": dict(open_bundle(bundle).model)})
    pack(folder, tmp_path / "b.tar.zst")
    assert content(unpack(tmp_path / "b.tar.zst", tmp_path / "out")) == content(folder)


def test_what_is_added_stands_in_the_archive_alone(bundle: Path, tmp_path: Path) -> None:
    before = content(bundle)
    pack(bundle, tmp_path / "b.tar.zst", added={"measured": {"bench": [1]}})
    assert content(bundle) == before
    with bundle_folder(tmp_path / "b.tar.zst") as folder:
        assert open_bundle(folder).info["measured"] == {"bench": [1]}
    assert not folder.exists()
    with pytest.raises(ModelError, match="has formats already"):
        pack(bundle, tmp_path / "c.tar.zst", added={"formats": []})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar.zst"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: b"no archive at all",
        lambda data: data[:-20],
        lambda data: data[: len(data) // 2],
        lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        lambda data: data + b"x",
        lambda data: data + data,
    ],
)
def test_a_damaged_archive_is_refused(archive: Path, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    archive.write_bytes(spoil(archive.read_bytes()))
    with pytest.raises(ModelError, match=r"b\.tar\.zst: .*(Pack the bundle again|copy the archive again)"):
        unpack(archive, tmp_path / "out")


def forged(bundle: Path, out: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> Path:
    """An archive whose entries ``change`` has had its way with."""
    entries = []
    for path in sorted(bundle.iterdir(), key=lambda path: (path.name != BUNDLE_FILE, path.name)):
        entry = tarfile.TarInfo(path.name)
        entry.size = path.stat().st_size
        entries.append((entry, path.read_bytes()))
    change(entries)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for entry, data in entries:
            tar.addfile(entry, io.BytesIO(data))
    out.write_bytes(zstandard.ZstdCompressor().compress(buffer.getvalue()))
    return out


def added(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    """One more entry."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry, b""


@pytest.mark.parametrize(
    "entry",
    [
        added("../evil"),
        added("/tmp/evil"),
        added("a/b"),
        added("extra"),
        added("model.onnx"),  # a second time
        added("x", tarfile.SYMTYPE, "/etc/passwd"),
        added("x", tarfile.LNKTYPE, BUNDLE_FILE),
        added("x", tarfile.CHRTYPE),
        added("x", tarfile.BLKTYPE),
        added("x", tarfile.FIFOTYPE),
        added("x", tarfile.DIRTYPE),
    ],
    ids=lambda entry: f"{entry[0].name}-{entry[0].type.decode()}",
)
def test_what_a_bundle_does_not_hold_is_refused(
    bundle: Path, tmp_path: Path, entry: tuple[tarfile.TarInfo, bytes]
) -> None:
    path = forged(bundle, tmp_path / "b.tar.zst", lambda entries: entries.append(entry))
    with pytest.raises(ModelError, match=r"which bundle\.json does not name as a file to come"):
        unpack(path, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "evil").exists()
    assert not Path("/tmp/evil").exists()


def test_a_link_in_the_place_of_a_file_is_refused(bundle: Path, tmp_path: Path) -> None:
    def swap(entries: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        at = next(i for i, (entry, _) in enumerate(entries) if entry.name == "model.onnx")
        entries[at] = added("model.onnx", tarfile.SYMTYPE, "/etc/passwd")

    with pytest.raises(ModelError, match=r"holds 'model\.onnx', not a plain file"):
        unpack(forged(bundle, tmp_path / "b.tar.zst", swap), tmp_path / "out")


def test_the_description_must_come_first_and_once(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"which bundle\.json does not name"):
        unpack(forged(bundle, tmp_path / "a.tar.zst", lambda entries: entries.reverse()), tmp_path / "a")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not in it"):
        unpack(forged(bundle, tmp_path / "b.tar.zst", lambda entries: entries.pop() and None), tmp_path / "b")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/b", "..", "a\\b", "gptq/../evil"])
def test_a_description_that_leads_elsewhere_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    def rename(entries: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        info = json.loads(entries[0][1])
        info["files"] = {name: {"bytes": 0, "sha256": ""}}
        data = json.dumps(info).encode()
        entries[0][0].size = len(data)
        entries[:] = [(entries[0][0], data), added(name)]

    with pytest.raises(ModelError, match="a plain name"):
        unpack(forged(bundle, tmp_path / "b.tar.zst", rename), tmp_path / "out")


def test_a_small_archive_that_swells_is_stopped(bundle: Path, tmp_path: Path) -> None:
    """A header of 200 MB packs into a few kB; it is never held."""

    def swell(entries: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        entries[1][0].pax_headers = {"comment": "x" * (200 << 20)}

    path = forged(bundle, tmp_path / "b.tar.zst", swell)
    assert path.stat().st_size < 200_000
    with pytest.raises(ModelError, match=r"more bytes than bundle\.json announces"):
        unpack(path, tmp_path / "out")


def test_another_size_than_described_is_refused(bundle: Path, tmp_path: Path) -> None:
    def shorten(entries: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        entries[1][0].size -= 1

    with pytest.raises(ModelError, match=r"has \d+ bytes; expected \d+ bytes"):
        unpack(forged(bundle, tmp_path / "b.tar.zst", shorten), tmp_path / "out")


def test_the_commands_take_it(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "b.tar.zst"
    done = CliRunner().invoke(cli.app, ["pack", str(bundle), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert f"wrote {out} ({out.stat().st_size:,} bytes)" in done.stdout
    short = ["--set", "repeats=1", "--set", "prompt_tokens=4", "--set", "new_tokens=4", "--json"]
    found = json.loads(CliRunner().invoke(cli.app, ["bench", str(out), *short]).stdout)
    assert found["metrics"]["decode_tokens_per_s"] > 0
    (tmp_path / "rows.jsonl").write_text('{"text": "turn on the light"}\n', encoding="utf-8")
    judged = CliRunner().invoke(cli.app, ["eval", str(out), "--data", str(tmp_path / "rows.jsonl"), "--json"])
    assert json.loads(judged.stdout)["metrics"]["metrics"]["perplexity"], judged.output
    again = CliRunner().invoke(cli.app, ["pack", str(bundle), "--out", str(out)])
    assert (again.exit_code, "is there already" in again.stderr) == (2, True)
    with pytest.raises(UserError, match=r"a name that ends in \.tar\.zst"):
        pack(bundle, tmp_path / "b.zip")


def test_a_missing_archive_is_told(tmp_path: Path) -> None:
    for command in (["bench"], ["eval", "--data", "x"]):
        done = CliRunner().invoke(cli.app, [command[0], str(tmp_path / "no.tar.zst"), *command[1:]])
        assert done.exit_code == 2, done.output
        assert "no.tar.zst" in done.stderr
        assert "no such file" in done.stderr
