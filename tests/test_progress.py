"""A long read tells how far it has come; a short one says nothing."""

import io
import sys

import pytest

from engine.progress import LINE_SECONDS, Progress

GB = 10**9


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def said(monkeypatch: pytest.MonkeyPatch, terminal: bool, seconds_apart: float, parts: int) -> str:
    """What stderr gets while `parts` parts of 1 GB are read."""
    now = [0.0]
    screen = Screen(terminal)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("weights", parts * GB) as progress:
        for _ in range(parts):
            now[0] += seconds_apart
            progress.add(GB)
    return screen.getvalue()


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch, False, LINE_SECONDS / 2, 5).splitlines()
    assert lines == ["weights: 2.0 of 5.0 GB", "weights: 4.0 of 5.0 GB"]


def test_a_log_hears_nothing_of_a_short_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(monkeypatch, False, LINE_SECONDS / 10, 5) == ""


def test_a_terminal_gets_a_bar_that_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = said(monkeypatch, True, 0.0, 3)
    assert "weights:" in screen and "3.00G" in screen and "\n" not in screen.strip("\r\n ")
