"""The README is a promise: its commands exist, its tree is the real one, its profiles and files are there."""

import ast
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
LONGEST = 110  # characters of a remark


def tracked():
    """Files under version control, or every file where there is no git; packages' empty markers are left out."""
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a git checkout: the list of files is not known")
    return [line for line in found.stdout.splitlines() if not line.endswith("/__init__.py")]


def remarks():
    """(file, what the tree says of it) for every line."""
    return [(line.split()[0], [*line.split(maxsplit=1), ""][1]) for line in TREE.splitlines()]


def cut_short(remark, docstring):
    """Whether ``remark`` is the beginning of ``docstring`` and stops inside of a sentence."""
    plain = " ".join(docstring.replace("`", "").split())
    following = plain[len(remark) : len(remark) + 1]
    return plain.startswith(remark) and not remark.endswith((".", "?")) and following not in ("", ".", ";", ":", ",")


def test_the_tree_has_one_line_for_every_file_and_no_other():
    named = [name for name, _ in remarks()]
    assert named == sorted(tracked())


def test_every_line_of_the_tree_is_short_and_whole():
    for name, remark in remarks():
        assert remark, f"{name}: nothing is said of it"
        assert len(remark) <= LONGEST, f"{name}: {len(remark)} characters"
        assert remark == remark.strip(" ,;:"), f"{name}: it ends in the midst of a sentence"
        if name.endswith(".py"):
            docstring = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))) or ""
            assert not cut_short(remark, docstring), f"{name}: cut off from its docstring"


def test_a_cut_line_is_seen():
    whole = "Digests of ``files``: rows, the teacher.\n\nMore."
    assert cut_short("Digests of files: rows, the tea", whole)
    assert cut_short("Digests of", whole)
    for remark in ("Digests of files", "Digests of files: rows, the teacher", "What files are like"):
        assert not cut_short(remark, whole)


def test_every_command_of_the_readme_exists():
    named = set(re.findall(r"^    edgestill ([a-z]+)", README, re.M))
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
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
