"""The README is a promise: its commands exist, its tree is the real one, its profiles and files are there."""

import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress.cli import app
from compress.profile import list_profiles

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = re.search(r"## The tree\n\n(.*?)\n\n## ", README, re.S).group(1)
FOLDED = ("tests/", "profiles/quickstart/teacher/")  # one line stands for the whole folder
UNLISTED = (".gitignore",)


def tracked():
    """Files under version control, or every file where there is no git."""
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a git checkout: the list of files is not known")
    return [line for line in found.stdout.splitlines() if not line.endswith("/__init__.py")]


def test_the_tree_names_every_file_and_nothing_else():
    named = {line.split()[0] for line in TREE.splitlines()}
    real = set()
    for name in tracked():
        folder = next((f for f in FOLDED if name.startswith(f)), None)
        real.add(folder or name)
    assert named == real - set(UNLISTED)


def test_every_line_of_the_tree_says_something():
    assert all(len(line.split(maxsplit=1)) == 2 for line in TREE.splitlines())


def test_every_command_of_the_readme_exists():
    named = set(re.findall(r"^    edgestill ([a-z]+)", README, re.M))
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert named
    assert named <= known
    for command in sorted(named):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


def test_make_targets_and_profiles_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)  ", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for name in re.findall(r"edgestill (?:run|plan) ([a-z0-9-]+)", README):
        assert name in list_profiles(), name


def test_links_of_the_readme_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
