"""Names that break other people's code: `kernels` is probed by transformers, and stdlib names by everything."""

import ast
import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).parent.parent
FOLDERS = ("serve_app", "cluster", "engine", "kernels", "perf", "tests")


def modules() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_kernels_package_is_empty() -> None:
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def test_no_other_distribution_is_called_kernels() -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("kernels")


def test_our_version_stays_below_the_one_transformers_takes_for_hugging_face_kernels() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert Version(declared) < Version("0.18")
    assert importlib.metadata.version("triserve") == declared


def test_transformers_does_not_take_our_kernels_for_its_own() -> None:
    from transformers.utils.import_utils import is_kernels_available

    assert not is_kernels_available()


def test_the_application_builder_keeps_its_annotations() -> None:
    # As strings they would silently turn Serve's validation of the configuration off.
    tree = ast.parse((ROOT / "serve_app" / "app.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "__future__"]


def test_no_module_shadows_the_standard_library() -> None:
    assert [path for path in modules() if path.stem in sys.stdlib_module_names] == []


def test_no_module_is_hidden_by_a_package_of_the_same_name() -> None:
    assert [p for p in modules() if (p.with_suffix("") / "__init__.py").exists()] == []


def test_the_tests_are_flat() -> None:
    assert [path for path in (ROOT / "tests").rglob("*.py") if path.parent != ROOT / "tests"] == []
    assert not (ROOT / "tests" / "__init__.py").exists()
