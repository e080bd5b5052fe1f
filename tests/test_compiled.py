"""The kernels compile for GPUs that are not here, in a process without the interpreter; and the record's rules."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from perf.compiled import ARCHITECTURES, MOST_REGISTERS, MOST_SHARED, OPCODES, Build, drift, missing

ROOT = Path(__file__).parent.parent


def compile_only(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`python -m perf.bench_kernels --compile-only`, ended; folder/kernels.json is what it wrote."""
    command = [sys.executable, "-m", "perf.bench_kernels", "--compile-only", "--processes", "2"]
    command += ["--json", str(folder / "kernels.json"), *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("compiled")
    return compile_only(folder), folder / "kernels.json"


@pytest.mark.timeout(900)
def test_what_the_engine_launches_compiles_without_spills_and_on_tensor_cores(
    compiled: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    ended, _ = compiled
    print(ended.stdout)  # any drift from the record
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]


@pytest.mark.timeout(900)
def test_every_kernel_is_launched_by_a_step_of_the_engine(
    compiled: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    builds = json.loads(compiled[1].read_text())["builds"]
    assert {key.partition(" ")[0] for key in builds} == entry_points()
    assert all(f"sm_{architecture}" in build for build in builds.values() for architecture in ARCHITECTURES)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_size_of_model_and_step_compiles_exact_or_not_in_eight_bits_too(tmp_path: Path) -> None:
    ended = compile_only(tmp_path, "--all")
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]


def entry_points() -> set[str]:
    """The jitted functions of kernels/ that no other jitted function calls."""
    names: set[str] = set()
    called: set[str] = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list
            ):
                names.add(f"{path.stem}.{function.name}")
                called |= {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return {name for name in names if name.partition(".")[2] not in called}


def build(**changes: Any) -> Build:
    values: dict[str, Any] = {"registers": 64, "stack": 0, "shared": 1024, "tensor_memory": 0}
    return Build(**{**values, "opcodes": dict.fromkeys(OPCODES, 0), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"stack": 8},
        {"opcodes": {**dict.fromkeys(OPCODES, 0), "STL": 1}},
        {"opcodes": {**dict.fromkeys(OPCODES, 0), "LDL": 1}},
        {"registers": MOST_REGISTERS + 1},
        {"shared": MOST_SHARED + 1},
    ],
)
def test_a_build_beyond_a_limit_is_a_fault(changes: dict[str, Any]) -> None:
    assert build().faults(()) == []
    assert len(build(**changes).faults(())) == 1


def test_a_product_without_tensor_cores_is_a_fault() -> None:
    assert build().faults(("HGMMA",)) == ["no HGMMA"]
    assert build(opcodes={**dict.fromkeys(OPCODES, 0), "HGMMA": 3}).faults(("HGMMA",)) == []


def record(version: str = "3.7.1", **builds: int) -> dict[str, Any]:
    """Of kernels in one build each, with so many registers."""
    return {
        "triton": version,
        "builds": {
            f"{name} 0123": {"signature": "x", "sm_90": {"registers": count, "opcodes": {"STL": 0}}}
            for name, count in builds.items()
        },
    }


def test_a_drift_names_the_build_the_figure_and_both_values() -> None:
    assert drift(record(a=40, b=50), record(a=40, b=52)) == ["b 0123 sm_90: registers 50 -> 52"]
    assert drift(record(a=40), record(a=40)) == []


def test_another_version_of_triton_makes_figures_incomparable() -> None:
    (line,) = drift(record("3.6.0", a=40), record("3.7.1", a=99))
    assert "3.6.0" in line and "limits" in line


def test_a_kernel_that_only_one_side_knows_is_named() -> None:
    assert missing(record(a=1, b=1), record(a=1)) == ["b is in the record, and nothing launches it"]
    assert missing(record(a=1), record(a=1, b=1)) == ["b is launched, and not in the record"]
    assert missing(record(a=1), record(a=2)) == []
