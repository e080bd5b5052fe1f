"""Runs work in a child process and ends whatever that has started, also what an early interrupt orphaned.

Ray ends its processes when its driver shuts down in order; a driver that is interrupted while Ray starts leaves some.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asks this process to end."""


def supervise(work: Callable[[], int]) -> int:
    """The exit status of `work`, or 0 if a signal ends it. Returns when no process that it started is left.

    The first SIGTERM is passed on, for `work` to end in order; a second one, and any other signal, ends it at once.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become our children
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _be_the_child(work)
    terminated = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        if terminated:
            raise Interrupted
        terminated = True
        with suppress(ProcessLookupError):  # it has ended just now
            os.kill(child, signal.SIGTERM)

    try:
        signal.signal(signal.SIGTERM, terminate)
        for number in SIGNALS:
            if number != signal.SIGTERM:
                signal.signal(number, _interrupt)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return 0 if terminated else status
    except Interrupted:
        return 0
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # impatience would leave processes behind
        _end_group(child)
        end_descendants()


def _end_group(leader: int) -> None:
    """Where there is no /proc, this is all that can be found."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def end_descendants() -> None:
    """Kills until none is left: a dying process may still start another."""
    while running := _descendants():
        for pid in running:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        _reap()
        time.sleep(0.01)


def _be_the_child(work: Callable[[], int]) -> NoReturn:
    os.setsid()  # signals from the terminal are for the parent
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    status = 1
    try:
        status = work()
    except SystemExit:  # a signal, before `work` has a handler for it
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _descendants() -> list[int]:
    """Every process below this one that has not ended."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        state, parent = text[text.rindex(")") + 2 :].split()[:2]
        if state != "Z" or int(parent) == os.getpid():
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found: list[int] = []
    level = [os.getpid()]
    while level:
        level = [pid for parent in level for pid in children.get(parent, ())]
        found += level
    return found


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise Interrupted
