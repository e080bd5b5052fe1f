"""Timing of functions side by side."""

import time

import pytest
import torch

from perf.timing import machine, matmul_rate, nbytes, read_bandwidth, rotations, seconds_of, side_by_side

CPU = torch.device("cpu")


def test_sides_take_turns_and_a_call_costs_its_share_of_them() -> None:
    order: list[str] = []

    def slow() -> None:
        order.append("slow")
        time.sleep(0.002)

    timings = side_by_side({"slow": [slow, slow], "fast": [lambda: order.append("fast")]}, CPU, repeats=3)
    assert order == ["slow", "slow", "fast"] * 4  # once untimed
    slow_seconds, fast_seconds = timings["slow"].seconds, timings["fast"].seconds
    assert slow_seconds is not None and fast_seconds is not None
    assert 0.002 <= slow_seconds < 0.004 + 0.05 and fast_seconds < 0.002


def test_a_side_that_raises_is_left_out_and_says_why() -> None:
    def broken() -> None:
        raise ValueError("not on this machine")

    timings = side_by_side({"ours": [lambda: None], "theirs": [broken]}, CPU, repeats=2)
    assert timings["ours"].seconds is not None
    assert timings["theirs"].seconds is None and "not on this machine" in timings["theirs"].note
    with pytest.raises(RuntimeError, match="not on this machine"):
        seconds_of(broken, CPU)


def test_the_machine_is_described_and_measured() -> None:
    assert machine()["torch"] == torch.__version__
    assert read_bandwidth(CPU) > 1e8 and matmul_rate(CPU, torch.float32) > 1e8
    assert rotations(1, CPU) == 1
    assert nbytes(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2)) == 14
