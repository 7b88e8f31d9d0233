"""The hub's cache: a name means its main branch, a revision what it says, and an incomplete snapshot is refused."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from compress import hub, hub_cache
from compress.data.rows import read_source
from compress.errors import DataError, ModelError
from compress.plans import Facts
from compress.profile import load_profile
from compress.recording import Recorder
from compress.store import Store
from compress.teachers import fetch_hub_model, open_teacher

OLD, NEW, THIRD = "a" * 40, "b" * 40, "abc" + "d" * 37


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of acme/small whose main is the older of three commits."""
    folder = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    fill(folder / "models--acme--small", {"config.json": '{"name": %r}', "model.safetensors": "weights"})
    fill(folder / "datasets--acme--rows", {"train.jsonl": '{"text": %r}\n', "README.md": "---\nlicense: mit\n---\n"})
    return folder


def fill(base: Path, files: dict[str, str]) -> None:
    """Blobs, and links to them, as the hub's client writes them."""
    (base / "blobs").mkdir(parents=True)
    for age, commit in enumerate((OLD, NEW, THIRD)):
        folder = base / "snapshots" / commit
        folder.mkdir(parents=True)
        for name, content in files.items():
            blob = base / "blobs" / f"{commit[:3]}-{name}"
            blob.write_text((content % commit[:3] if "%r" in content else content).replace("'", '"'))
            (folder / name).symlink_to(os.path.relpath(blob, folder))
        os.utime(folder, (time.time() + age, time.time() + age))
    for ref, commit in {"main": OLD, "v0.1": NEW, "refs/pr/1": THIRD, "gone": "e" * 40}.items():
        path = base / "refs" / ref
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)


@pytest.mark.parametrize(
    ("spec", "commit"),
    [
        ("acme/small", OLD),
        ("acme/small@main", OLD),
        ("acme/small@v0.1", NEW),
        ("acme/small@refs/pr/1", THIRD),
        (f"acme/small@{NEW}", NEW),
        ("acme/small@bbbbbbb", NEW),
        ("acme/small@bbbb", None),  # too short for a commit
        ("acme/small@gone", None),
        ("acme/small@v9", None),
        ("acme/other", None),
    ],
)
def test_the_revision_that_is_meant_is_read(cache: Path, spec: str, commit: str | None) -> None:
    folder = hub.local_folder(spec)
    assert (folder and folder.name) == commit
    if commit is not None:
        assert hub_cache.commit_of_folder(fetch_hub_model(spec)) == commit
        config = hub.config_at_hand(spec)
        assert config == {"name": commit[:3]}
        assert open_teacher(spec).folder == folder
    else:
        with pytest.raises(
            ModelError, match=r"cannot be fetched from the hub .*; the cache .* holds of acme/"
        ) as error:
            fetch_hub_model(spec)
        if spec.startswith("acme/small"):
            assert "gone (eeeeeee, not fetched), main (aaaaaaa), refs/pr/1 (abcdddd), v0.1 (bbbbbbb)" in str(
                error.value
            )


def test_without_a_main_nothing_is_guessed(cache: Path) -> None:
    (cache / "models--acme--small/refs/main").unlink()
    assert hub.local_folder("acme/small") is None
    with pytest.raises(ModelError, match=f"holds of acme/small: .*commit {OLD[:12]}"):
        fetch_hub_model("acme/small")


def test_what_begins_several_commits_is_none(cache: Path) -> None:
    (cache / "models--acme--small/snapshots" / ("b" * 39 + "0")).mkdir()
    assert hub_cache.commit_of("acme/small@bbbbbbb") is None


@pytest.mark.parametrize("damage", ["weights", "link", "shard"])
def test_an_incomplete_snapshot_is_refused_by_what_it_lacks(cache: Path, damage: str) -> None:
    folder = cache / "models--acme--small/snapshots" / OLD
    lacks = "model.safetensors"
    if damage == "weights":
        (folder / lacks).unlink()
    elif damage == "link":
        (cache / "models--acme--small/blobs/aaa-model.safetensors").unlink()
    else:
        lacks = "model-00002-of-00002.safetensors"
        (folder / "model-00001-of-00002.safetensors").write_text("weights")
        weights = {"x": "model-00001-of-00002.safetensors", "y": lacks}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    assert not hub.is_whole(folder)
    with pytest.raises(ModelError, match=lacks):
        fetch_hub_model("acme/small")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/x/hub"}, "/x/hub"),
        ({"HF_HOME": "/y"}, "/y/hub"),
        ({"HF_HUB_CACHE": "", "HF_HOME": "/y"}, "/y/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "/z"}, "/z"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub_cache.cache_folder() == Path(expected)


def test_the_run_record_names_the_commit(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "p.yaml").write_text(
        "edgestill: 1\nname: p\nteacher: acme/small@v0.1\ndata: {pool: rows.jsonl}\n"
        "steps: [{data.selection: {method: dedup}}]\n"
    )
    profile, store = load_profile(tmp_path / "p.yaml"), Store(tmp_path / "store")

    class Planned:
        """What the recorder reads of a plan."""

        nodes = ()
        facts = Facts(profile, store)

    Planned.profile = profile  # type: ignore[attr-defined]
    record = Recorder(Planned, tmp_path / "run", "x").record  # type: ignore[arg-type]
    assert (record["teacher"]["name"], record["teacher"]["commit"]) == ("acme/small@v0.1", NEW)


# ---------------------------------------------------------------------------------- data sets


@pytest.mark.parametrize(
    ("name", "commit"), [("acme/rows", OLD), ("acme/rows@v0.1", NEW), (f"acme/rows@{THIRD}", THIRD)]
)
def test_rows_of_the_cache_are_of_the_revision_that_is_meant(cache: Path, name: str, commit: str) -> None:
    found = read_source(name)
    assert ([row.text for row in found.rows], found.rows[0].source) == ([commit[:3]], name)
    assert found.notes == [f"acme/rows: read at commit {commit}, the files that the hub's cache holds of it"]


def test_rows_that_the_cache_lacks_are_refused(cache: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be loaded .* holds of acme/rows: .*main \(aaaaaaa\)"):
        read_source("acme/rows@v9")
    folder = cache / "datasets--acme--rows/snapshots" / OLD
    (folder / "data-00000-of-00002.jsonl").write_text('{"text": "half"}\n')
    with pytest.raises(DataError, match=r"lacks data-00001-of-00002\.jsonl"):
        read_source("acme/rows")


def test_another_revision_that_was_prepared_last_is_no_stand_in(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network ``datasets`` takes what it prepared last, and says so in a log line alone."""
    import datasets
    from datasets import load as module

    class Prepared(list[Any]):
        cache_files = ({"filename": f"/cache/acme___rows/default/0.0.0/{NEW}/rows-train.arrow"},)

    def fall_back(path: str, *, revision: str | None) -> Any:
        module.logger.warning(f"Using the latest cached version of the dataset since {path} couldn't be found")
        return {"train": Prepared([{"text": "b"}])}

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", fall_back)
    with pytest.raises(DataError, match=f"of acme/rows only {NEW} is prepared here; .*main"):
        read_source("acme/rows")
    found = read_source("acme/rows@v0.1")
    assert ([row.text for row in found.rows], found.notes) == (["b"], [f"acme/rows: read at commit {NEW}"])
    with pytest.raises(DataError, match="only"):
        read_source("acme/unknown")
