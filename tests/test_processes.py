"""Processes that we start import nothing from the current folder, and none outlives the one that started it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from compress import processes
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[1]
POISON = (
    *("compress", "deploy", "evaluators", "profiles", "torch", "numpy", "onnxruntime", "onnxruntime_genai", "onnx"),
    *("transformers", "pydantic", "typer", "optimum", "ctypes", "json", "queue", "threading", "signal", "pickle"),
    *("multiprocessing", "concurrent", "tempfile", "sitecustomize", "usercustomize"),
)
# every kind of process; all that this one needs is loaded before the current folder comes onto its path
EVERY_KIND = """\
import os, subprocess, sys
from pathlib import Path
from compress import checkpoint_bench, execution, processes
from compress.assessment_params import CheckpointBenchParams
from compress.model.distillation import parallel
from compress.progress import Progress
from compress.context import StageContext
from deploy import machine, tune
from deploy.export import optimum
from deploy.export.stage import export
from deploy.params import ExportParams, TuneParams
from deploy.bench import bench_bundle
from deploy.remote.transport import call

def context(name, out, **inputs):
    for folder in (out, out.with_name(out.name + "-work")):
        folder.mkdir()
    work = out.with_name(out.name + "-work")
    return StageContext(name=name, inputs=inputs, out=out, work=work, seed=0, progress=Progress(quiet=True), threads=1)

if __name__ == "__main__":
    place, model = Path(sys.argv[1]), Path(sys.argv[2])
    bundle = place / "bundle"
    export(ExportParams(), context("deploy.export.bundle", bundle, model=model))
    if len(sys.argv) > 3:
        sys.path.insert(0, "")
        os.environ["PYTHONPATH"] = os.pathsep + os.environ["PYTHONPATH"]
        os.environ.pop("PYTHONSAFEPATH", None)
    params = CheckpointBenchParams(prompt_tokens=4, new_tokens=2, repeats=1, warmup=0)
    checkpoint_bench.bench(params, context("deploy.bench.checkpoint", place / "bench", model=model))
    machine.measure_rates(1)
    bench_bundle(bundle, prompt_tokens=4, new_tokens=2, repeats=1, warmup=0, bandwidth=False)
    with tune.Workers(bundle, TuneParams(prompt_tokens=4, new_tokens=2)) as workers:
        workers.measure(tune.starting_point(tune.open_bundle(bundle)))
    rows = execution.map_shards(len, "abcd", shards=2, backend="processes", workers=2)
    assert rows == [2, 2], rows
    with parallel.assembled(2, "here"):
        pass
    assert call(["true"], timeout=60).returncode == 0
    os.environ["EDGESTILL_OPTIMUM_PYTHON"] = sys.executable  # optimum-onnx is not there: how far it comes is enough
    try:
        optimum._run(optimum.interpreter(), model, place)
    except optimum.EdgestillError as error:
        assert "No module named" in str(error), error
    print("all done")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "llama", hidden=64, head_dim=16)


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    """A folder with a module for every name that may be imported; each leaves ``LOADED`` when it is."""
    folder = tmp_path / "poisoned"
    folder.mkdir()
    for name in POISON:
        (folder / f"{name}.py").write_text(
            f"open({str(tmp_path / 'LOADED')!r}, 'a').write({name!r} + ' ')\nraise ImportError('the wrong file')\n"
        )
    return folder


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


@pytest.mark.timeout(600)  # eight processes that load the heavy libraries: 20 s on two idle cores
def test_no_process_of_ours_imports_from_the_current_folder(model: Path, poisoned: Path, tmp_path: Path) -> None:
    script = tmp_path / "every_kind.py"
    script.write_text(EVERY_KIND)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(model), "poisoned"],
        cwd=poisoned, env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    loaded = tmp_path / "LOADED"
    assert not loaded.exists(), f"loaded: {loaded.read_text()}\n{done.stderr}"
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all done\n")


@pytest.mark.parametrize("path", ["", ":", f"{ROOT}:", "."])
def test_the_command_imports_nothing_from_the_current_folder(poisoned: Path, tmp_path: Path, path: str) -> None:
    """What Python itself loads before the first line of ours is not ours to prevent, so these files are not there."""
    for name in ("compress", "deploy", "sitecustomize", "usercustomize"):
        (poisoned / f"{name}.py").unlink()
    code = "import sys; sys.argv = ['edgestill', 'ls', 'targets']; from compress.entry import main; main()"
    start = f"import sys; sys.path.insert(1, {str(ROOT)!r}); {code}"
    done = subprocess.run(
        [sys.executable, "-c", start], cwd=poisoned, env=environment(PYTHONPATH=path), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert not (tmp_path / "LOADED").exists(), (tmp_path / "LOADED").read_text()
    assert done.returncode == 0, done.stderr
    assert "raspberry-pi-5" in done.stdout


def test_python_m_is_the_command(tmp_path: Path) -> None:
    for module in ("compress", "compress.entry", "compress.cli"):
        command = [sys.executable, "-m", module, "--help"]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
        assert "Distill, prune and quantize" in done.stdout


def test_the_search_path_keeps_what_belongs_to_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "site-packages"
    packages.mkdir()
    monkeypatch.setattr(sys, "path", ["", ".", "relative", str(tmp_path), str(packages), str(ROOT)])
    monkeypatch.chdir(tmp_path)
    assert processes.search_path() == [str(packages), str(ROOT)]
    monkeypatch.chdir(packages)
    assert processes.search_path() == [str(tmp_path), str(packages), str(ROOT)]
    monkeypatch.chdir(ROOT)
    assert str(ROOT) in processes.search_path(), "our own checkout"
    monkeypatch.setattr(sys, "path", [""])
    assert processes.search_path() == [str(ROOT)]


def test_a_parent_that_spawns_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    before = (list(sys.path), dict(os.environ))
    with processes.spawning():
        assert "" not in sys.path
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert (sys.path, dict(os.environ)) == before


PARENTS = {
    "checkpoint_bench": """
from compress import checkpoint_bench
from compress.assessment_params import CheckpointBenchParams
params = CheckpointBenchParams(prompt_tokens=100, new_tokens=100, repeats=100000)
checkpoint_bench.bench(params, context({"model": model}))
""",
    "machine": """
from deploy import machine
while True:
    machine.measure_rates(1)
""",
    "tune_worker": """
from deploy import tune
from deploy.params import TuneParams
workers = tune.Workers(None, TuneParams())
workers.graph = lambda level: Path("/nowhere")
import subprocess, time
subprocess.Popen(tune.processes.python("-c", "from compress.processes import requests; next(requests())"),
                 stdin=subprocess.PIPE, env=tune.processes.environment())
time.sleep(100)
""",
    "a program": """
from deploy.remote.transport import call
call(["sleep", "100"], timeout=200)
""",
    "optimum": """
import os, subprocess, time
from deploy.export import optimum
slow = Path(sys.argv[2]) / "slow.py"
slow.write_text(optimum._WORKER.read_text().replace("    main(*sys.argv[1:])", "    import time; time.sleep(100)"))
optimum._WORKER = slow
optimum._run(Path(sys.executable), model, Path(sys.argv[2]))
""",
}
HEAD = """\
import sys
from pathlib import Path
from compress.context import StageContext
from compress.progress import Progress
model = Path(sys.argv[1])
def context(inputs):
    place = Path(sys.argv[2])
    return StageContext(name="x", inputs=inputs, out=place, work=place, seed=0, progress=Progress(quiet=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a program that is not ours with its parent")
@pytest.mark.parametrize("kind", PARENTS)
def test_children_die_with_a_parent_that_is_killed(kind: str, model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HEAD + PARENTS[kind], str(model), str(tmp_path)]
    parent = psutil.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL)
    children = wait_for(lambda: parent.children(recursive=True), parent)
    time.sleep(0.7)  # the child is on its way, perhaps in the midst of an import
    children = parent.children(recursive=True) or children
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=15)
    for child in alive:
        child.kill()
    assert not alive, f"{kind}: {alive}"


def wait_for(found: object, parent: psutil.Popen) -> list[psutil.Process]:
    limit = time.monotonic() + 60
    while not (children := found()):  # type: ignore[operator]
        assert parent.poll() is None, "the parent ended"
        assert time.monotonic() < limit
        time.sleep(0.05)
    return list(children)
