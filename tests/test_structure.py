"""Imports run one way, and the library stands alone."""

import ast
import re
import subprocess
import sys
import tomllib

from conftest import ROOT

#: From the bottom up: a package imports from itself and from those before it, never from its neighbor in one entry.
LAYERS = [
    ["tade"],
    ["utils"],
    ["base"],
    ["model", "data_loader"],
    ["trainer"],
    ["evaluation"],
    ["report"],
    ["deploy"],
    ["commands"],
    ["comparison"],
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}


def modules() -> dict[str, ast.Module]:
    paths = [path for package in LEVEL for path in (ROOT / package).rglob("*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return {name: ast.parse(path.read_text()) for name, path in zip(names, paths, strict=True)}


def imported(tree: ast.Module, known: set[str]) -> set[str]:
    """The project's modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) or {node.module}
    return found & known


def test_imports_run_one_way():
    trees = modules()
    arrows = {name: imported(tree, set(trees)) - {name} for name, tree in trees.items()}
    for name, targets in arrows.items():
        for target in targets:
            here, there = name.split(".")[0], target.split(".")[0]
            assert here == there or LEVEL[there] < LEVEL[here], f"{name} imports {target}"


def test_no_circle():
    trees = modules()
    arrows = {name: imported(tree, set(trees)) - {name} for name, tree in trees.items()}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(arrows[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(trees):
        visit(name, [])


def test_the_library_imports_torch_alone():
    script = (
        "import sys; before = set(sys.modules); import torch; ours = set(sys.modules); import tade; "
        "print({m.split('.')[0] for m in set(sys.modules) - ours} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'tade'}"


def test_the_installed_package_is_the_library_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"] == ["tade"] and (ROOT / "tade" / "py.typed").exists()
    assert [re.split(r"\W", name)[0] for name in project["project"]["dependencies"]] == ["torch"]
    assert not [path for path in (ROOT / "tade").rglob("*") if path.is_dir() and path.name != "__pycache__"]


def test_scripts_are_thin():
    for path in ROOT.glob("*.py"):
        code = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr)]
        assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.If) for node in code), path.name
        assert path.name in ("train.py", "reproduce.py") or len(path.read_text().splitlines()) <= 12, path.name
