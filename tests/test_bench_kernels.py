"""The benchmark of the kernels, at its CPU shapes, every suite."""

import json
from pathlib import Path

import pytest
import torch

from kernels.backend import implementation
from perf.bench_kernels import SUITES, Batch, Machine, Part, a2, a3, main, ours_on, visibility
from perf.geometry import geometry

HERE = Machine(torch.device("cpu"), torch.float32, geometry("toy"), 1e10, 1e11, repeats=1)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_every_suite_runs_on_its_torch_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU perf/gpu_suite.sh runs it at full scale")
    target = tmp_path / "kernels.json"
    assert main(["--repeats", "1", "--json", str(target)]) == 0
    rows = json.loads(target.read_text())["rows"]
    assert {row["suite"] for row in rows} == set(SUITES) - {"A2", "A3"}
    assert all(row["theirs"] is not None and row["note"] == "" for row in rows)
    assert "A2 is skipped" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU perf/gpu_suite.sh runs them at full scale")
def test_variants_of_the_attention_kernel_run() -> None:
    with implementation("triton"):
        rows = [*a2(HERE), *a3(HERE)]
    assert {row.suite for row in rows} == {"A2", "A3"}
    assert all(row.theirs is not None and row.note == "" for row in rows)


def test_the_other_side_sees_what_ours_sees() -> None:
    """A quadratic segment: drafts are causal, groups see the drafts up to their anchor and themselves."""
    assert visibility(Part(1, 2, 0, "quadratic")) == [
        (1, 0, 0),
        (2, 0, 0),
        (1, 2, 4),
        (1, 2, 4),
        (2, 4, 6),
        (2, 4, 6),
    ]
    parts = [Part(2, 3, 70), Part(1, 4, 0, "block"), Part(1, 2, 9, "quadratic")]
    batch = Batch(parts, HERE)
    ours = ours_on(batch, HERE)()
    assert isinstance(ours, torch.Tensor)
    padded = batch.sdpa(*batch.gather())
    rows = [padded[index, :, :length].transpose(0, 1) for index, length in enumerate(batch.lengths)]
    torch.testing.assert_close(ours.view_as(batch.q), torch.cat(rows))
