"""Every command that the documents show is there: scripts with --help, edgestill's own with options, make targets."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from compress.cli import app

ROOT = Path(__file__).parents[1]
PYTHON = re.compile(
    r"(PYTHONPATH=\S+ )?\bpython3? (?:-m ((?:benchmarks|profiles)[\w.]*)|((?:benchmarks|profiles)/[\w/]+\.py))"
)
# Runs scripts as Python would, each in a fork of a process that has loaded what is slow to load. The tree itself is
# not on the path, as it is not where edgestill is installed: what a script finds comes from where it is started.
RUNNER = """
import json, os, runpy, sys
root, commands = sys.argv[1], json.loads(sys.argv[2])
import compress, deploy, evaluators, profiles
if len(commands) > 5:
    import torch, transformers, accelerate
    import compress.model.distillation.stage, compress.teachers, compress.data.rows
sys.path[:] = [place for place in sys.path if os.path.abspath(place or os.getcwd()) != root]
failed = {}
for module, script in commands:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1); os.dup2(write, 2)
        sys.argv = [script or module, "--help"]
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)) if script else root)
        try:
            runpy.run_path(script, run_name="__main__") if script else runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            sys.stdout.flush(); os._exit(end.code or 0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True); os._exit(1)
        os._exit(97)
    os.close(write)
    with os.fdopen(read, errors="replace") as said:
        text = said.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        failed[script or module] = [code, text[-300:]]
print(json.dumps(failed))
"""  # noqa: E501 - a program


def documents() -> dict[str, str]:
    """Text of every document and of every docstring of a script."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in pages}
    for path in (*sorted((ROOT / "benchmarks").glob("*.py")), *sorted((ROOT / "profiles").rglob("*.py"))):
        found[str(path.relative_to(ROOT))] = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return found


def commands_in(text: str) -> set[tuple[str, str]]:
    """(module, script) of every Python command of ours; one of the two is empty."""
    return {(module, script) for _, module, script in PYTHON.findall(text)}


def run_all(commands: list[tuple[str, str]], root: Path) -> dict[str, list[object]]:
    """Exit code and last output of each that does not end with 0."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(root), json.dumps(commands)], cwd=root, capture_output=True, text=True,
        check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[object]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_every_python_command_of_the_documents_ends_well_with_help() -> None:
    commands = sorted(set().union(*(commands_in(text) for text in documents().values())))
    assert len(commands) > 15
    assert run_all(commands, ROOT) == {}


def test_a_script_that_is_not_found_or_breaks_is_seen(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "one.py").write_text("import benchmarks.two\nraise SystemExit(0)\n")
    (tmp_path / "benchmarks" / "two.py").write_text("")
    commands = [("benchmarks.one", ""), ("", "benchmarks/one.py"), ("benchmarks.gone", "")]
    failed = run_all(commands, tmp_path)
    assert set(failed) == {"benchmarks/one.py", "benchmarks.gone"}
    assert "ModuleNotFoundError" in str(failed["benchmarks/one.py"][1])


def test_documents_name_no_script_that_needs_more_than_its_command() -> None:
    for name, text in documents().items():
        assert not re.search(r"PYTHONPATH=\S+ python", text), name


def shown_commands(text: str) -> list[list[str]]:
    """Words of every ``edgestill`` command in a document: of its own line, or in backticks."""
    lines = re.findall(r"^ {4}edgestill (.+)$", text, re.M) + re.findall(r"`edgestill ([^`]+)`", text)
    return [line.split("#")[0].split() for line in lines]


def test_every_edgestill_command_of_the_documents_exists_with_its_options() -> None:
    root = typer.main.get_command(app)
    seen = set()
    for name, text in documents().items():
        for words in shown_commands(text):
            command, at = root, 0
            while at < len(words) and hasattr(command, "commands"):
                choices = words[at].split("|")  # list|show|measure
                assert set(choices) <= set(command.commands), f"{name}: edgestill {' '.join(words)}"
                command, at = command.commands[choices[0]], at + 1
            known = {option for param in command.params for option in param.opts} | {"--help"}
            for word in words[at:]:
                option = word.strip("[].,;").split("=")[0]
                assert not option.startswith("--") or option in known, (
                    f"{name}: {option} of edgestill {' '.join(words)}"
                )
            seen.add(tuple(words[: max(1, at)]))
    assert len(seen) > 8
    for words in sorted(seen):
        one = [word.split("|")[0] for word in words]
        assert CliRunner().invoke(app, [*one, "--help"]).exit_code == 0, one


def test_every_make_target_of_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, text in documents().items():
        for target in re.findall(r"(?:`|^ {4})make ([a-z][a-z0-9-]+)", text, re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{name}: make {target}"


@pytest.mark.parametrize("text", ["python benchmarks/decode.py", "PYTHONPATH=. python3 -m benchmarks.decode --x"])
def test_commands_are_found_in_text(text: str) -> None:
    assert len(commands_in(text)) == 1
