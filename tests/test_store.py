"""The artifact store: keys, commits, kills at every point, several processes, damage, errors of the disk, gc."""

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import store as store_module
from compress.errors import DataError, StoreError
from compress.files import file_sha256
from compress.store import MANIFEST, Store, canonical_json

KEY, OTHER = Store.key({"n": 1}), Store.key({"n": 2})
ROOT = Path(__file__).parent.parent


@pytest.fixture
def said():
    return []


@pytest.fixture
def store(tmp_path, said):
    return Store(tmp_path / "store", say=said.append)


def make(store, key=KEY, text="content", **record):
    with store.begin(key, {"n": 1}) as draft:
        (draft.out / "sub").mkdir()
        (draft.out / "a.txt").write_text(text)
        (draft.out / "sub" / "b.bin").write_bytes(b"\0" * 100)
        draft.record.update(record)
    return draft


def fail(store, error, key=KEY):
    """Checkpoint, write half of the artifact, raise."""
    with store.begin(key) as draft:
        (draft.work / "checkpoint").write_text("step 3")
        (draft.out / "half").write_text("half")
        raise error


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- keys ----------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=6)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
FACTS = st.dictionaries(
    TEXT,
    st.recursive(SCALAR, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3), max_leaves=6),
    min_size=1,
    max_size=5,
)


def turned(value):
    """The same value with every mapping in the opposite order."""
    if isinstance(value, dict):
        return {key: turned(value[key]) for key in reversed(list(value))}
    return [turned(inner) for inner in value] if isinstance(value, list) else value


def changes(value):
    """``value`` with one leaf changed, one item dropped or one key renamed, each in turn."""
    if isinstance(value, dict):
        for key in value:
            rest = {name: value[name] for name in value if name != key}
            yield rest
            yield {**rest, key + "'": value[key]} if key + "'" not in rest else rest
            yield from ({**value, key: inner} for inner in changes(value[key]))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield value[:at] + value[at + 1 :]
            yield from ([*value[:at], inner, *value[at + 1 :]] for inner in changes(item))
        yield {"list": value}
    else:
        yield [value]
        yield str(value) if not isinstance(value, str) else value + "x"
        if isinstance(value, int) and not isinstance(value, bool):
            yield value + 1
        if isinstance(value, bool):
            yield int(value)


@settings(max_examples=80, deadline=None)
@given(FACTS)
def test_key_is_blind_to_order_and_changed_by_everything_else(facts):
    key = Store.key(facts)
    assert len(key) == 64
    assert Store.key(turned(facts)) == key
    for changed in changes(facts):
        assert Store.key(changed) != key


def test_key_is_a_fixed_function():
    facts = {"stage": "data.selection", "params": {"keep": 0.5, "names": ("a", "ü")}, "seed": 7, "teacher": None}
    text = '{"params":{"keep":0.5,"names":["a","ü"]},"seed":7,"stage":"data.selection","teacher":null}'
    assert canonical_json(facts) == text
    assert Store.key(facts) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("facts", [{1: "a"}, {"a": {None: 1}}, {"a": [{2.5: 1}]}])
def test_keys_of_facts_are_strings(facts):
    with pytest.raises(TypeError, match="keys of canonical JSON are strings"):
        Store.key(facts)


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), ValueError), (Path("a"), TypeError), ({1, 2}, TypeError)])
def test_facts_are_json(value, kind):
    with pytest.raises(kind, match=r"Out of range float|not JSON serializable"):
        Store.key({"a": value})


@pytest.mark.parametrize("key", ["", "../../etc", "A" * 64, "a" * 63, "a" * 63 + "/", "a" * 64 + "\n"])
def test_no_key_leads_out_of_the_store(store, key):
    with pytest.raises(StoreError, match="is no artifact key"):
        store.lookup(key)
    with pytest.raises(StoreError, match="is no artifact key"), store.begin(key):
        raise AssertionError("never reached")
    assert not store.root.exists()


# --- making and finding --------------------------------------------------------------------------------------------


def test_make_and_find(store, said):
    assert store.lookup(KEY) is None
    assert not store.root.exists()  # a look leaves nothing
    draft = make(store, seconds=1.5)
    assert not draft.cached
    assert store.lookup(KEY) == store.lookup(KEY, verify=True) == draft.path == store.path(KEY)
    assert tree(draft.path) == ["a.txt", MANIFEST, "sub/b.bin"]
    manifest = json.loads((draft.path / MANIFEST).read_text())
    assert manifest == {
        "schema": 1,
        "key": KEY,
        "facts": {"n": 1},
        "files": {
            name: {"size": (draft.path / name).stat().st_size, "sha256": file_sha256(draft.path / name)}
            for name in ("a.txt", "sub/b.bin")
        },
    }
    assert store.record(KEY) == {"seconds": 1.5}
    assert store.record(OTHER) is None
    assert store.keys() == [KEY]
    assert tree(store.root / "work") == []
    assert said == []


def test_same_content_gives_the_same_bytes(tmp_path):
    first, second = Store(tmp_path / "1"), Store(tmp_path / "2")
    make(first, seconds=1.0)
    make(second, seconds=2.0)
    for name in tree(first.path(KEY)):
        assert (first.path(KEY) / name).read_bytes() == (second.path(KEY) / name).read_bytes()


def test_odd_figures_do_not_cost_the_artifact(store):
    make(store, loss=float("nan"), rows=np.int64(3), rate=np.float32(0.5), place=Path("/x"))
    record = store.record(KEY)
    assert record == {"loss": None, "rows": 3, "rate": 0.5, "place": "/x"}
    assert store.lookup(KEY, verify=True) is not None


def test_an_empty_artifact_is_one(store):
    with store.begin(KEY):
        pass
    assert store.lookup(KEY, verify=True) is not None


@pytest.mark.parametrize(
    "error", [DataError("rows", "none"), KeyboardInterrupt("rows: none"), MemoryError("rows: none")]
)
def test_a_failure_leaves_only_its_scratch(store, error):
    with pytest.raises(type(error), match="rows: none"):
        fail(store, error)
    assert store.lookup(KEY) is None
    assert tree(store.root) == [f"locks/{KEY}", f"work/{KEY}/checkpoint"]
    with store.begin(KEY) as draft:
        assert (draft.work / "checkpoint").read_text() == "step 3"
        assert list(draft.out.iterdir()) == []
    assert not draft.work.exists()


def link(out):
    (out / "x").symlink_to("/etc/passwd")


def folder_link(out):
    (out / "x").symlink_to("/etc")


def pipe(out):
    os.mkfifo(out / "x")


def manifest(out):
    (out / MANIFEST).write_text("{}")


@pytest.mark.parametrize("odd", [link, folder_link, pipe, manifest])
def test_odd_files_are_refused(store, odd):
    with pytest.raises(StoreError, match=r"a link or special file|belongs to the store"), store.begin(KEY) as draft:
        odd(draft.out)
    assert store.lookup(KEY) is None


# --- damage --------------------------------------------------------------------------------------------------------


def truncate(path):
    (path / "a.txt").write_text("cont")


def remove(path):
    (path / "a.txt").unlink()


def flip(path):
    (path / "a.txt").write_text("CONTENT")


def add(path):
    (path / "sub" / "more.txt").write_text("x")


def half_manifest(path):
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:50])


def foreign_manifest(path):
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace(KEY, OTHER))


def escaping_manifest(path):
    (path / MANIFEST).write_text((path / MANIFEST).read_text().replace("a.txt", "../a.txt"))


def binary_manifest(path):
    (path / MANIFEST).write_bytes(b"\xff\xfe")


def list_manifest(path):
    (path / MANIFEST).write_text("[]")


def no_manifest(path):
    (path / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "plain", "message"),
    [
        (truncate, False, "a.txt has 4 bytes, not 7"),
        (remove, False, "a.txt: No such file"),
        (flip, True, "the content of a.txt was changed"),
        (add, True, "sub/more.txt was added"),
        (half_manifest, False, "its manifest is not readable"),
        (foreign_manifest, False, "of another store"),
        (escaping_manifest, False, "of another store"),
        (binary_manifest, False, "its manifest is not readable"),
        (list_manifest, False, "its manifest is not readable"),
        (no_manifest, False, None),
    ],
)
def test_damage_is_found_said_and_mended(store, said, damage, plain, message):
    path = make(store).path
    damage(path)
    assert (store.lookup(KEY) is not None) is plain
    assert store.lookup(KEY, verify=True) is None
    assert store.lookup(KEY) is None  # what verify found is not forgotten
    assert len(said) == (message is not None)  # said once
    if message:
        assert message in said[0]
        assert said[0].endswith("it is made again")
    draft = make(store)
    assert not draft.cached
    assert store.lookup(KEY, verify=True) == path
    assert sorted(p.name for p in (store.root / "artifacts").iterdir()) == [KEY]


def test_damage_goes_to_the_log_when_nobody_listens(tmp_path, caplog):
    store = Store(tmp_path)
    truncate(make(store).path)
    with caplog.at_level(logging.WARNING):
        assert store.lookup(KEY) is None
    assert "has 4 bytes, not 7" in caplog.text


# --- kills ---------------------------------------------------------------------------------------------------------

# For every call that touches the disk during a commit: a child dies by SIGKILL at that call, another one tries again.
KILLER = """\
import json, os, pathlib, shutil, signal, sys
from compress.store import Store
base, key = pathlib.Path(sys.argv[1]), sys.argv[2]

def commit(root, fatal):
    calls = 0
    def deadly(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    with Store(root).begin(key) as draft:
        if not draft.cached:
            done = draft.work / "done"
            if not done.exists():
                done.write_text("x" * 5000)
            (draft.out / "sub").mkdir()
            (draft.out / "a.txt").write_text(done.read_text())
            (draft.out / "sub" / "b.txt").write_text("b")
            draft.record["seconds"] = 1.0
        for name in ("open", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        pathlib.Path.open = deadly(pathlib.Path.open)
    (root / "calls").write_text(str(calls))

def child(root, fatal):
    pid = os.fork()
    if pid == 0:
        try:
            commit(root, fatal)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}

def state(root):
    found = Store(root, say=lambda text: None).lookup(key, verify=True)
    return {"found": found is not None, "there": (root / "artifacts" / key).exists(),
            "artifacts": tree(root / "artifacts"), "work": tree(root / "work")}

codes = [child(base / "whole", 0)]
calls = int((base / "whole" / "calls").read_text())
result = {"whole": state(base / "whole"), "kills": []}
for fatal in range(1, calls + 1):
    root = base / str(fatal)
    first = child(root, fatal)
    between = state(root)
    result["kills"].append({"first": first, "between": between, "second": child(root, 0), "after": state(root)})
print(json.dumps(result))
"""


def test_kill_at_every_step_of_a_commit(tmp_path):
    arguments = [sys.executable, "-c", KILLER, str(tmp_path), KEY]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    whole = result["whole"]
    assert whole["found"]
    assert sorted(whole["artifacts"]) == [f"{KEY}/a.txt", f"{KEY}/{MANIFEST}", f"{KEY}/sub/b.txt"]
    assert len(result["kills"]) > 15
    assert {kill["between"]["found"] for kill in result["kills"]} == {False, True}
    for kill in result["kills"]:
        assert kill["first"] == -signal.SIGKILL
        if not kill["between"]["found"]:  # nothing half-written is trusted, and the checkpoint is still there
            assert not kill["between"]["there"]
            assert kill["between"]["work"] == {f"{KEY}/done": "x" * 5000}
        assert kill["second"] == 0
        assert kill["after"] == whole  # the same bytes as unbroken, and nothing else left


def test_everything_is_on_disk_before_the_rename(store, monkeypatch):
    calls = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(os.fstat(handle).st_ino), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda old, new: (calls.append("rename"), rename(old, new)))
    path = make(store).path
    inodes = {name: (path / name).stat().st_ino for name in (".", "a.txt", "sub", "sub/b.bin", MANIFEST)}
    before, after = calls[: calls.index("rename")], calls[calls.index("rename") :]
    assert set(inodes.values()) <= set(before)
    assert before.index(inodes["a.txt"]) < before.index(inodes[MANIFEST]) > before.index(inodes["sub/b.bin"])
    assert before[-1] == inodes["."]
    assert path.parent.stat().st_ino in after


def test_what_a_kill_left_is_gone_before_new_work_begins(store):
    stale = [store.root / "artifacts" / f".{kind}-{KEY}-x" for kind in ("new", "old")]
    other = store.root / "artifacts" / f".new-{OTHER}-x"
    for folder in (*stale, other):
        folder.mkdir(parents=True)
        (folder / "big").write_text("x")
    with store.begin(KEY) as draft:
        assert sorted((store.root / "artifacts").iterdir()) == sorted([draft.out, other])


def test_kill_while_a_stage_works(tmp_path):
    code = """\
import sys, time
from compress.store import Store
with Store(sys.argv[1]).begin(sys.argv[2]) as draft:
    (draft.work / "checkpoint").write_text("step 3")
    (draft.out / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path), KEY]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert Store(tmp_path).gc(set()).artifacts == ()  # in use: left alone
        assert len(list((tmp_path / "artifacts").iterdir())) == 1
        process.kill()
    assert process.returncode == -signal.SIGKILL
    store = Store(tmp_path)
    assert store.lookup(KEY) is None
    with store.begin(KEY) as draft:
        assert (draft.work / "checkpoint").read_text() == "step 3"
        (draft.out / "whole").write_text("whole")
    assert tree(tmp_path / "artifacts") == [f"{KEY}/{MANIFEST}", f"{KEY}/whole"]


# --- several processes ---------------------------------------------------------------------------------------------

WORKER = """\
import os, sys, time
from compress.store import Store
root, key, log = sys.argv[1:]
with Store(root, say=lambda text: None).begin(key) as draft:
    if not draft.cached:
        with open(log, "a") as stream:
            stream.write("made\\n")
        (draft.out / "part").write_text("x")
        time.sleep(0.3)
        (draft.out / "rest").write_text(open(draft.out / "part").read())
assert sorted(p.name for p in draft.path.iterdir()) == ["manifest.json", "part", "rest"]
print("cached" if draft.cached else "made")
"""


def test_processes_do_not_do_the_same_work_twice(tmp_path):
    arguments = [sys.executable, "-c", WORKER, str(tmp_path / "store"), KEY, str(tmp_path / "log")]
    workers = [subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [worker.communicate(timeout=60)[0].strip() for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4
    assert sorted(said) == ["cached", "cached", "cached", "made"]
    assert (tmp_path / "log").read_text() == "made\n"


def test_waiting_is_said_and_other_keys_do_not_wait(store, said):
    done = []

    def second():
        with Store(store.root, say=said.append).begin(KEY) as draft:
            done.append(draft.cached)

    with store.begin(KEY) as draft:
        (draft.out / "x").write_text("x")
        thread = threading.Thread(target=second)
        thread.start()
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        make(store, OTHER)
        assert done == []
    thread.join(20)
    assert done == [True]
    assert said == [f"another process is making {KEY[:12]}; waiting for it"]


def test_a_failed_maker_hands_over(store):
    said, cached = [], []

    def second():
        with Store(store.root, say=said.append).begin(KEY) as draft:
            cached.append(draft.cached)

    thread = threading.Thread(target=second)

    def first():
        with store.begin(KEY):
            thread.start()
            deadline = time.monotonic() + 20
            while not said and time.monotonic() < deadline:
                time.sleep(0.01)
            raise DataError("rows", "bad")

    with pytest.raises(DataError, match="rows: bad"):
        first()
    thread.join(20)
    assert cached == [False]
    assert store.lookup(KEY) is not None


# --- errors of the disk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "Free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "Give write permission, or choose another place with --store"),
        (errno.EROFS, "read-only"),
    ],
)
@pytest.mark.parametrize("where", ["mkdtemp", "fsync", "rename"])
def test_errors_of_the_disk(store, monkeypatch, number, advice, where):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number), "/some/place")

    module = store_module.tempfile if where == "mkdtemp" else os
    monkeypatch.setattr(module, where, fail)
    with pytest.raises(StoreError, match=rf"/some/place: {os.strerror(number)}.*{advice}"):
        make(store)
    monkeypatch.undo()
    assert store.lookup(KEY) is None
    assert os.listdir(store.root / "artifacts") == []
    make(store)
    assert store.lookup(KEY, verify=True) is not None


class ForeignError(Exception):
    """As of a writer in another language."""


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), ForeignError("I/O error: No space left (os error 28)")]
)
def test_full_disk_while_a_stage_writes(store, error):
    with pytest.raises(StoreError, match=r"No space left on device.*Free some space"), store.begin(KEY):
        raise error
    assert store.lookup(KEY) is None


@pytest.mark.parametrize("error", [PermissionError(13, "no", "/home/x/rows.jsonl"), ForeignError("x"), KeyError("x")])
def test_other_errors_of_a_stage_stay_what_they_are(store, error):
    with pytest.raises(type(error)) as caught, store.begin(KEY):
        raise error
    assert caught.value is error


@pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="needs root to mount")
def test_a_really_full_disk(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], check=False,
                             capture_output=True)  # fmt: skip
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        store = Store(tmp_path / "store")
        make(store, OTHER)
        with pytest.raises(StoreError, match=r"No space left on device.*Free some space"), store.begin(KEY) as draft:
            (draft.out / "big").write_bytes(b"x" * 2**20)
        assert store.lookup(KEY) is None
        assert store.lookup(OTHER, verify=True) is not None
        assert [path.name for path in (tmp_path / "store" / "artifacts").iterdir()] == [OTHER]
        make(store)  # the space is free again
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_where_the_store_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    store = Store(tmp_path / "file")
    assert store.lookup(KEY) is None
    with pytest.raises(StoreError, match="A file stands where a folder is needed"):
        make(store)


def test_a_folder_without_permission(tmp_path):
    user = os.geteuid()
    tmp_path.chmod(0o500)
    if user == 0:
        os.seteuid(65534)  # root may write everywhere; nobody may not
    try:
        with pytest.raises(StoreError, match=r"Permission denied.*Give write permission"):
            make(Store(tmp_path / "store"))
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)


# --- digests of files ----------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Names of the files that were really read; every file counts as old enough to be remembered."""
    read = []

    def digest(path):
        read.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr(store_module, "file_sha256", digest)
    monkeypatch.setattr(store_module, "SETTLED_NS", -(10**18))
    return read


def test_digests_are_remembered(store, tmp_path, counted):
    file = tmp_path / "rows.jsonl"
    file.write_text("one")
    expected = file_sha256(file)
    assert [store.file_digest(file) for _ in range(3)] == [expected] * 3
    assert counted == ["rows.jsonl"]
    assert not store.root.exists()  # a plan leaves nothing ...
    make(store)
    counted.clear()
    assert Store(store.root).file_digest(file) == expected  # ... but with the first artifact it is kept
    assert counted == []
    file.write_text("two")
    assert store.file_digest(file) == file_sha256(file) != expected
    before = file.stat()
    file.write_text("six")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, and a time that was set back
    assert store.file_digest(file) == file_sha256(file)


def test_fresh_files_are_read_again(store, tmp_path):
    file = tmp_path / "rows.jsonl"
    for text in ("one", "two", "six"):
        file.write_text(text)
        assert store.file_digest(file) == file_sha256(file)
    assert store._digests == {}


def test_spoilt_memory_is_only_slower(store, tmp_path, counted):
    file = tmp_path / "rows.jsonl"
    file.write_text("one")
    make(store)
    store.file_digest(file)
    memory = store.root / "digests.jsonl"
    memory.write_bytes(memory.read_bytes() + b'\n["half')  # as a kill leaves it
    (tmp_path / "more").write_text("more")
    Store(store.root).file_digest(tmp_path / "more")
    counted.clear()
    again = Store(store.root)
    again.file_digest(file)
    again.file_digest(tmp_path / "more")
    assert counted == []
    memory.write_bytes(b"\xff\xfe\n[1]\n3\n{}\n")
    assert Store(store.root).file_digest(file) == file_sha256(file)
    memory.unlink()
    memory.mkdir()
    assert Store(store.root).file_digest(file) == file_sha256(file)


# --- gc ------------------------------------------------------------------------------------------------------------


def test_gc(store):
    make(store)
    make(store, OTHER, seconds=1.0)
    third = Store.key({"n": 3})
    with pytest.raises(DataError, match="x"):
        fail(store, DataError("x", "x"), third)
    stale = store.root / "artifacts" / f".new-{third}-abc"
    stale.mkdir()
    (stale / "half").write_text("1234567")
    before = tree(store.root)
    planned = store.gc({KEY}, dry_run=True)
    assert tree(store.root) == before
    swept = store.gc({KEY})
    assert swept == planned
    assert swept.artifacts == (OTHER,)
    assert sorted(swept.leftovers) == sorted([stale.name, third])
    assert swept.bytes > 12 + 107
    assert store.keys() == [KEY]
    assert tree(store.root) == sorted([f"artifacts/{KEY}/{name}" for name in ("a.txt", MANIFEST, "sub/b.bin")]
                                      + [f"locks/{KEY}"])  # fmt: skip
    assert store.lookup(KEY, verify=True) is not None
    make(store, OTHER)
    assert store.lookup(OTHER) is not None


def test_gc_keeps_scratch_of_unfinished_work_that_is_wanted(store):
    with pytest.raises(DataError, match="x"):
        fail(store, DataError("x", "x"))
    assert store.gc({KEY}) == store_module.Swept((), (), 0)
    assert tree(store.root / "work") == [f"{KEY}/checkpoint"]


def test_gc_of_nothing(tmp_path):
    assert Store(tmp_path / "none").gc(set()) == store_module.Swept((), (), 0)
    assert not (tmp_path / "none").exists()


def test_lock_survives_gc_between_open_and_lock(store, monkeypatch):
    """A lock on a file that gc has just removed is no lock: it is taken again on the new file."""
    make(store)
    file = store.root / "locks" / KEY
    real, removed = store_module.fcntl.flock, []

    def flock(handle, operation):
        if not removed:
            removed.append(file.unlink())
        real(handle, operation)

    monkeypatch.setattr(store_module.fcntl, "flock", flock)
    with store.begin(KEY):
        assert file.exists()
    assert removed == [None]


# --- speed ---------------------------------------------------------------------------------------------------------


def test_lookup_is_fast(store):
    with store.begin(KEY) as draft:
        for number in range(30):
            (draft.out / f"{number}").write_text("x")
    start = time.process_time()
    for _ in range(50):
        store.lookup(KEY)
    assert (time.process_time() - start) / 50 < 0.01  # about 0.3 ms
