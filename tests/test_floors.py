"""Imports point down only: cli -> train, report -> deconvnet, occlusion -> engine -> call -> network, models -> ops."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "zfcore"

# A part may import the parts of lower floors, and itself.
FLOOR = {
    "errors": 0,
    "console": 1,
    "files": 1,
    "forks": 1,
    "_C": 1,
    "kernels": 1,
    "reference": 1,
    "progress": 2,
    "ops": 2,
    "data": 2,
    "kinds": 3,
    "network": 4,
    "models": 4,
    "call": 5,
    "engine": 6,
    "deconvnet": 7,
    "occlusion": 7,
    "train": 8,
    "report": 8,
    "cli": 9,
    "env": 9,
    "__main__": 10,
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """The top-level parts of zfcore that a file imports, at any depth of the code."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            siblings = path.parent == ROOT / "kernels" and node.level == 1  # their package is named at the install
            assert node.level == 0 or siblings, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("zfcore.")}
    return parts


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    part = part_of(path)
    for imported in imports_of(path) - {part}:
        if imported.startswith("__"):  # zfcore.__version__
            continue
        assert imported in FLOOR, f"{path} imports zfcore.{imported}, which has no floor in this test"
        assert FLOOR[imported] < FLOOR[part], f"{part} (floor {FLOOR[part]}) imports {imported} ({FLOOR[imported]})"


def test_every_part_has_a_floor():
    assert {part_of(path) for path in FILES} <= set(FLOOR)


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_triton_kernels_know_nothing_of_the_package(path):
    assert not imports_of(path)


@pytest.mark.parametrize("optional", ["captum", "torchvision", "timm", "matplotlib", "pytest", "hypothesis"])
def test_nothing_optional_is_imported(optional):
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.split(".")[0] == optional for name in names), f"{path} imports {optional}"


def test_setup_imports_no_torch():
    tree = ast.parse((ROOT / "setup.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(name.split(".")[0] == "torch" for name in names)


def test_pointers_leave_torch_in_one_place():
    holders = [str(p.relative_to(PACKAGE)) for p in FILES if ".data_ptr()" in p.read_text()]
    assert holders == ["ops/_boundary.py"]


def test_only_the_command_line_prints():
    for path in FILES:
        if part_of(path) in {"cli", "env", "__main__", "train"}:
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), f"{path} prints"
