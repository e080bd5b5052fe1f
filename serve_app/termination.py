"""SIGTERM, handled in a process whose main thread belongs to Ray."""

import ctypes
import signal
from collections.abc import Callable

_installed: list[object] = []  # C code calls it: it must outlive the call that made it


def on_sigterm(act: Callable[[], None]) -> None:
    """Lets SIGTERM call `act` in the main thread instead of ending the process. May be called from any thread.

    Python takes signal handlers from its main thread only, and a Serve replica's code never runs there; Ray's own
    handler would end the process at once.
    """

    def install(_: object) -> int:
        signal.signal(signal.SIGTERM, lambda number, frame: act())
        return 0

    callback = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(install)
    _installed.append(callback)
    if ctypes.pythonapi.Py_AddPendingCall(callback, None):
        raise RuntimeError("the interpreter takes no more pending calls")
