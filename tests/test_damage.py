"""Damage in the store does not live on in what was made from it, and a killed run is not listed as running."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress import listings, pipeline, run_record, single
from compress.cli import app
from compress.errors import StoreError
from compress.run_record import RunRecord
from compress.scratch import OWNER
from compress.store import Read, Store
from tests.fake_stages import CALLS, write_profile
from tests.test_pipeline import content, go, in_the_middle, start

CHAIN = ("data.selection.first", "data.selection.second", "model.distillation.fake", "model.quantization.fake")


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


@pytest.fixture
def profile_path(tmp_path: Path) -> Path:
    return write_profile(tmp_path / "p")


def folder_of(record: RunRecord, name: str) -> Path:
    return Path(next(stage["path"] or "" for stage in record["stages"] if stage["name"] == name))


def damage(folder: Path) -> None:
    """Other bytes of the same size: only the digest tells."""
    path = folder / "content.txt"
    path.write_text(path.read_text().swapcase())


def spread(monkeypatch: pytest.MonkeyPatch, profile: Path, store: Path, damaged: str, *, told: bool) -> RunRecord:
    """A store in which all that follows ``damaged`` was made from its damaged bytes, as older versions did it.

    ``told``: the manifests say what was read, which is what was really there.
    """
    good = go(profile, Store(store))
    damage(folder_of(good, damaged))
    at = [stage["name"] for stage in good["stages"]].index(damaged)
    for stage in good["stages"][at + 1 :]:
        shutil.rmtree(stage["path"] or "")
    with monkeypatch.context() as patch:
        whole = Store.lookup
        patch.setattr(Store, "lookup", lambda self, key, **_: whole(self, key))
        if told:
            said = Store.content
            key = folder_of(good, damaged).name
            patch.setattr(Store, "content", lambda self, one: "0" * 64 if one == key else said(self, one))
        go(profile, Store(store))
    if not told:
        for manifest in store.glob("artifacts/*/manifest.json"):
            values = json.loads(manifest.read_text())
            values.pop("read", None)
            manifest.write_text(json.dumps(values))
    return good


def files(record: RunRecord) -> dict[str, object]:
    return {name: json.loads(text)["files"] for name, text in content(record).items()}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("damaged", ["data.source.read of pool", *CHAIN])
def test_what_came_from_damage_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, profile_path: Path, tmp_path: Path, damaged: str, told: bool
) -> None:
    expected = files(go(profile_path, Store(tmp_path / "good")))
    spread(monkeypatch, profile_path, tmp_path / "store", damaged, told=told)
    found = go(profile_path, Store(tmp_path / "store"), verify=True)
    assert files(found) == expected
    CALLS.clear()
    assert files(go(profile_path, Store(tmp_path / "store"), verify=True)) == expected
    assert CALLS == [], "all is well now"


def test_children_of_damaged_bytes_go_though_the_source_was_made_again(
    monkeypatch: pytest.MonkeyPatch, profile_path: Path, tmp_path: Path
) -> None:
    """Their manifests say that they read other bytes; those made before the damage stay."""
    store = tmp_path / "store"
    expected = files(go(profile_path, Store(tmp_path / "good")))
    good = spread(monkeypatch, profile_path, store, "data.selection.second", told=True)
    shutil.rmtree(folder_of(good, "data.selection.second"))
    CALLS.clear()
    assert files(go(profile_path, Store(store))) == expected
    assert CALLS.count("model.distillation.fake") == 1
    assert "evaluate.teacher" not in CALLS
    assert "data.selection.first" not in CALLS


def test_nothing_is_made_from_damage(profile_path: Path, tmp_path: Path) -> None:
    """Also without --verify: what a stage is to be made from is read first."""
    store = tmp_path / "store"
    first = go(profile_path, Store(store))
    expected = files(first)
    damage(folder_of(first, "model.distillation.fake"))
    shutil.rmtree(folder_of(first, "model.quantization.fake"))
    CALLS.clear()
    said: list[str] = []
    found = go(profile_path, Store(store, say=said.append))
    assert files(found) == expected
    assert CALLS == ["model.distillation.fake", "model.quantization.fake"], "made before the damage: they stay"
    assert [line for line in said if "damaged (the content of content.txt was changed)" in line]
    assert all(stage["state"] == "done" for stage in found["stages"])


def test_an_artifact_tells_what_it_was_made_from(profile_path: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    record = go(profile_path, store)
    manifest = json.loads((folder_of(record, "data.selection.second") / "manifest.json").read_text())
    before = folder_of(record, "data.selection.first").name
    assert manifest["read"] == {"data": store.content(before)}
    key = folder_of(record, "data.selection.second").name
    assert store.lookup(key, read=Read({"data": store.content(before)})) is not None
    assert store.lookup(key, read=Read({"data": "another"})) is None
    with pytest.raises(StoreError, match="no such artifact"):
        store.content("0" * 64)


def test_a_step_refuses_a_damaged_artifact(profile_path: Path, tmp_path: Path) -> None:
    record = go(profile_path, Store(tmp_path / "store"))
    folder = folder_of(record, "data.selection.first")
    damage(folder)
    result = CliRunner().invoke(
        app, ["step", "data.selection.dedup", "--in", str(folder), "--out", str(tmp_path / "o")]
    )
    assert result.exit_code == 1
    assert "damaged (the content of content.txt was changed)" in result.stderr
    assert not (tmp_path / "o").exists()
    with pytest.raises(StoreError, match="damaged"):
        single.check_artifact(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="manifest is not readable"):
        single.check_artifact(folder)


def test_half_artifacts_of_other_keys_are_cleared(profile_path: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    go(profile_path, store)
    half = tmp_path / "store" / "artifacts" / f".new-{'a' * 64}-x"
    half.mkdir()
    (half / "file").write_text("x")
    going = tmp_path / "store" / "artifacts" / f".new-{'b' * 64}-x"
    going.mkdir()
    with store._locked("b" * 64):
        go(profile_path, Store(tmp_path / "store"))
        assert not half.exists()
        assert going.exists()


def test_a_killed_run_is_not_running(tmp_path: Path) -> None:
    path, store = write_profile(tmp_path / "p", steps=40), tmp_path / "store"
    process = start(path, store, at=in_the_middle(store, 40))
    (record,) = listings.run_files(store)
    assert listings.rows_of("runs", store)[1][0][1] == "running"
    process.kill()
    process.communicate()
    assert listings.rows_of("runs", store)[1][0][1:] == (
        "interrupted", "fake", "0.0", "killed; the same command goes on from where it stood",
    )  # fmt: skip
    assert run_record.read(record)["status"] == "interrupted"
    assert json.loads(record.read_text())["status"] == "running"
    go(path, Store(store))
    assert json.loads(record.read_text())["status"] == "interrupted", "the next run writes it down"
    assert not list(store.glob(f"runs/*/{OWNER}"))
    assert sorted(row[1] for row in listings.rows_of("runs", store)[1]) == ["done", "interrupted"]


def test_an_empty_store_variable_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for value in ("", " "):
        monkeypatch.setenv("EDGESTILL_STORE", value)
        result = CliRunner().invoke(app, ["ls", "runs"])
        assert result.exit_code == 2
        assert result.stderr.startswith("edgestill: error: EDGESTILL_STORE: got '")
    monkeypatch.delenv("EDGESTILL_STORE")
    assert pipeline.default_store() == Path(".edgestill")
