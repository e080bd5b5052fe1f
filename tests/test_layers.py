"""The arrows: serve_app -> cluster -> engine -> kernels; perf and tests may import all, and nothing imports them."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"serve_app", "cluster", "engine", "kernels", "perf", "tests"}
MAY_IMPORT = {
    "serve_app": {"serve_app", "cluster", "engine"},
    "cluster": {"cluster", "engine"},
    "engine": {"engine", "kernels"},
    "kernels": {"kernels"},
}
HTTP = {"fastapi", "starlette", "uvicorn", "httpx"}
MAY_NOT_KNOW = {
    "serve_app": set[str](),
    "cluster": HTTP,
    "engine": HTTP | {"ray", "pydantic", "transformers"},
}


def imports_of(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module that a file imports, inside functions too."""
    package = path.relative_to(root).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield node.lineno, ".".join((*base, node.module or "")).strip(".")
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(root: Path) -> list[str]:
    found = []
    for folder, allowed in MAY_IMPORT.items():
        for path in sorted((root / folder).rglob("*.py")):
            for line, module in imports_of(path, root):
                top = module.partition(".")[0]
                if top in OURS:
                    wrong = top not in allowed
                elif folder == "kernels":
                    wrong = top not in {"torch", "triton"} | sys.stdlib_module_names
                else:
                    wrong = top in MAY_NOT_KNOW[folder]
                if wrong:
                    found.append(f"{path.relative_to(root)}:{line} imports {module}")
    return found


def loaded_by(module: str) -> set[str]:
    """Top-level modules in memory after importing `module` in a fresh interpreter."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_imports_only_point_downward() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "module"),
    [
        ("engine/planted.py", "import cluster.tiers", "cluster.tiers"),
        ("engine/planted.py", "def late():\n    from serve_app.config import AppConfig", "serve_app.config"),
        ("engine/modes/planted.py", "from ray import serve", "ray"),
        ("engine/planted.py", "import importlib\nimportlib.import_module('perf.bench')", "perf.bench"),
        ("cluster/planted.py", "from fastapi import FastAPI", "fastapi"),
        ("cluster/planted.py", "import kernels.norm", "kernels.norm"),
        ("serve_app/planted.py", "from kernels.norm import rms_norm", "kernels.norm"),
        ("kernels/planted.py", "from engine.batch import Batch", "engine.batch"),
        ("kernels/planted.py", "import numpy", "numpy"),
        ("kernels/planted.py", "from ..engine import batch", "engine"),
    ],
)
def test_a_planted_wrong_import_is_found(tmp_path: Path, path: str, source: str, module: str) -> None:
    planted = tmp_path / path
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    line = len(source.splitlines())
    assert violations(tmp_path) == [f"{path}:{line} imports {module}"]


def test_relative_and_downward_imports_are_allowed(tmp_path: Path) -> None:
    (tmp_path / "engine" / "modes").mkdir(parents=True)
    (tmp_path / "engine" / "modes" / "ar.py").write_text(
        "from ..segment import Segment\nfrom . import base\nimport torch"
    )
    (tmp_path / "engine" / "layers.py").write_text("from kernels.norm import rms_norm")
    assert violations(tmp_path) == []


def test_plain_values_cost_no_torch() -> None:
    assert not loaded_by("engine.config, engine.request") & {"torch", "numpy", "ray", "pydantic"}


def test_the_ingress_runs_without_torch() -> None:
    assert "torch" not in loaded_by("serve_app.ingress")
