"""The repository keeps its own promises: documented commands, declared packages, pins, and what code may not do."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
SHIPPED = ("serve_app", "cluster", "engine", "kernels")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Written in halves, so that this file does not hold what it forbids.
FORBIDDEN = re.compile(
    "|".join(
        (
            r"(?<![\w.-])/wo" + r"rk/",
            r"(?<![\w.-])/ro" + r"ot/",
            r"/opt/(?:whe" + r"els|py" + r"pi)",
            "py" + r"pi\.org",
            "python" + r"hosted\.org",
            "download\\." + r"pytorch\.org",
            "pypi\\." + "nvidia",
        )
    )
)


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    """A file's text; binary files (a checkpoint, an image) count as empty."""
    content = path.read_bytes()
    return "" if b"\0" in content[:4096] else content.decode()


def direct_dependencies() -> set[str]:
    project = PROJECT["project"]
    lines = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def unsafe_uses(source: str) -> list[str]:
    """Ways to run code that came as data: unpickling, eval, exec, torch.load, remote model code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [
                n
                for n in names
                if n.partition(".")[0] in ("pickle", "cloudpickle", "dill", "marshal", "shelve")
            ]
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("eval", "exec")
        ):
            found.append(node.func.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [n for n in [f"{node.value.id}.{node.attr}"] if n in ("torch.load", "torch.save")]
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            found.append(node.arg)
    return found


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_documented_command_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(
        re.findall(r"\bmake ([a-z][a-z-]+)(?=[`\s]|$)", "\n".join(code_in((ROOT / page).read_text())))
    )
    assert named and named <= targets


def code_in(markdown: str) -> list[str]:
    return re.findall(r"```.*?```|`[^`\n]+`", markdown, re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/walk.md", "docs/topology.md"])
def test_every_documented_file_and_name_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    folders = "|".join((*SHIPPED, "perf", "tests", "docs", "k8s"))
    missing = [
        link
        for link in re.findall(r"\]\((?!https?:|#)([\w./-]+)\)", text)
        if not (ROOT / page).parent.joinpath(link).exists()
    ]
    for file, name in re.findall(rf"`((?:{folders})/[\w./-]*)(?:: (\w+))?`", text):
        path = ROOT / file
        if not path.exists() or (
            name and not re.search(rf"^\s*(?:async )?(?:def|class) {name}\b", path.read_text(), re.M)
        ):
            missing.append(f"{file}: {name}")
    assert missing == []


def test_no_page_holds_unfinished_places() -> None:
    marker = "TO " + "FILL"
    assert [path.name for path in tracked_files() if path.suffix == ".md" and marker in text_of(path)] == []


def test_our_code_never_runs_data() -> None:
    files = [path for folder in (*SHIPPED, "perf") for path in sorted((ROOT / folder).rglob("*.py"))]
    assert {path: uses for path in files if (uses := unsafe_uses(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def late():\n    from cloudpickle import loads",
        "eval('1')",
        "import torch\ntorch.load('weights.pt')",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_code_that_runs_data_would_be_found(source: str) -> None:
    assert len(unsafe_uses(source)) == 1


def test_a_models_eval_method_is_no_eval() -> None:
    assert unsafe_uses("model.eval()") == []


def test_no_tracked_file_names_a_machine_or_a_package_registry() -> None:
    found = {path: match.group() for path in tracked_files() if (match := FORBIDDEN.search(text_of(path)))}
    assert found == {}


def test_the_wheel_ships_every_package() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    present = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for folder in SHIPPED
        for path in (ROOT / folder).rglob("*.py")
    }
    assert present == listed


def test_every_direct_dependency_is_pinned_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pins = dict(line.split("==") for line in lines)
    assert direct_dependencies() - pins.keys() == set()
    assert pins["torch"] == "2.13.0"
    # Each build of torch asks for its own CUDA libraries.
    assert [name for name in pins if name.startswith(("nvidia-", "cuda-"))] == []


def test_every_import_of_a_shipped_package_is_a_declared_dependency() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["dependencies"]}
    distributions = importlib.metadata.packages_distributions()
    undeclared = set()
    for path in (path for folder in SHIPPED for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for top in (
                {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {*SHIPPED, "triton"}
            ):
                if not declared & {canonicalize_name(name) for name in distributions.get(top, [])}:
                    undeclared.add(f"{path.relative_to(ROOT)}: {top}")
    assert undeclared == set()
