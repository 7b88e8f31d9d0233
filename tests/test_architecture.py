"""The shape of the code: who may import whom, no cycles, and no file or function that grew too long."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("compress", "deploy", "evaluators", "profiles")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}

# what each side may import of ours; the longest matching prefix of the importing module decides
SHARED = (
    "compress.errors", "compress.context", "compress.progress", "compress.files", "compress.journal", "compress.names",
    "compress.json_reader", "compress.patterns", "compress.processes", "compress.scratch", "compress.tokenizer_files",
)  # fmt: skip
ALLOWED = {
    "evaluators": ("evaluators",),
    "profiles": ("profiles",),
    "deploy": (
        "deploy", "evaluators", *SHARED, "compress.store",
        "compress.model.checkpoint", "compress.model.quantization.packing", "compress.model.quantization.layout",
        "compress.model.shapes",
        "compress.yaml_reader", "compress.encoding", "compress.functions",
    ),
    "compress.data": (
        "compress.data", *SHARED, "compress.encoding", "compress.teachers", "compress.endpoint", "compress.execution",
        "compress.answers", "compress.hub_cache", "compress.thoughts",
    ),
    "compress.model": (
        "compress.model", *SHARED, "compress.encoding", "compress.teachers", "compress.endpoint",
        "compress.endpoint_logprobs",
    ),
    "compress.errors": (),
    "compress.files": (),
    "compress.hub_cache": (),
    "compress.names": (),
    "compress.processes": (),
    "compress.scratch": (),
    "compress.patterns": (),
    "compress.chat_templates": (),
    "compress.json_reader": ("compress.errors",),
    "compress.tokenizer_files": ("compress.errors", "compress.json_reader"),
    "compress.version": (),
    "compress.answers": (),
    "compress.thoughts": (),
    "compress.journal": ("compress.errors",),
    "compress.context": ("compress.progress", "compress.teachers"),
    "compress.progress": ("compress.errors",),
    "compress.store": ("compress.errors", "compress.files", "compress.json_reader"),
    "compress.ends": ("compress.errors", "compress.json_reader"),
    "compress.encoding": ("compress.data.rows", "compress.chat_templates", "compress.ends", *SHARED),
}  # fmt: skip
TORCH_FREE = (
    "compress", "compress.errors", "compress.context", "compress.progress", "compress.profile", "compress.store",
    "compress.pipeline", "compress.stages", "compress.cli", "compress.report", "compress.charts",
)  # fmt: skip
HEAVY = {"torch", "transformers", "onnxruntime", "onnxruntime_genai", "accelerate", "datasets", "onnx", "optimum"}


def imports(path, *, top_only=False):
    """(module, runtime) pairs imported by a file; TYPE_CHECKING blocks are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_only else ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def rule_of(module):
    """The allowed prefixes for a module, or None where everything is allowed (the composition side)."""
    for prefix in sorted(ALLOWED, key=len, reverse=True):
        if module == prefix or module.startswith(prefix + "."):
            return ALLOWED[prefix]
    return None


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_the_right_way(module):
    rule = rule_of(module)
    if rule is None:
        return
    for name in imports(MODULES[module]):
        if name.split(".")[0] in PACKAGES:
            allowed = any(name == p or name.startswith(p + ".") for p in rule) or name == module
            assert allowed, f"{module} imports {name}; it may import {', '.join(rule) or 'nothing of ours'}"


def find_cycle(graph):
    """The modules of one cycle in order, its first one again at the end; an empty list when there is none."""
    done = set()

    def visit(module, trail):
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module not in done:
            done.add(module)
            for other in sorted(graph[module]):
                if found := visit(other, [*trail, module]):
                    return found
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def test_there_is_no_import_cycle():
    """Imports inside functions count: they only hide a cycle. Those for type checkers alone do not."""
    graph = {m: {n for n in imports(p) if n in MODULES and n != m} for m, p in MODULES.items()}
    assert not find_cycle(graph), " -> ".join(find_cycle(graph))


def test_a_cycle_through_a_function_is_found(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from compress.store import Store\n")
    assert list(imports(tmp_path / "a.py")) == ["compress.store"]
    assert list(imports(tmp_path / "a.py", top_only=True)) == []
    assert find_cycle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"a"}}) == ["a", "b", "d", "a"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_light_modules_load_nothing_heavy_at_the_top(module):
    seen, queue = set(), [module]
    while queue:
        current = queue.pop()
        for name in imports(MODULES[current], top_only=True):
            assert name.split(".")[0] not in HEAVY, f"{module} loads {name} through {current}"
            if name in MODULES and name not in seen:
                seen.add(name)
                queue.append(name)


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module):
    source = MODULES[module].read_text(encoding="utf-8")
    most = 1800 if module == "deploy.bundle_runner.run" else 600  # it goes to devices as one file that needs no other
    assert source.count("\n") <= most, f"{module} has {source.count(chr(10))} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 50, f"{module}.{node.name} has {length} lines"


@pytest.mark.parametrize("module", [m for m in MODULES if MODULES[m].read_text(encoding="utf-8").strip()])
def test_every_module_and_public_function_says_what_it_does(module):
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{module} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"


def test_no_pickle_no_shell_no_remote_code():
    for module, path in MODULES.items():
        source = path.read_text(encoding="utf-8")
        for word in ("import pickle", "torch.load(", "shell=True", "os.system(", "eval(", "yaml.load("):
            spots = [line for line in source.splitlines() if word in line and not line.strip().startswith("#")]
            spots = [line for line in spots if f".{word}" not in line or word == "torch.load("]
            assert not spots, f"{module}: {spots[0].strip()}"
        assert "trust_remote_code=True" not in source, module
