"""SIGTERM, handled in a process whose main thread belongs to Ray."""

import signal
from collections.abc import Callable

import ray._private.worker as ray_worker


def on_sigterm(act: Callable[[], None]) -> None:
    """Lets SIGTERM call `act` in the main thread instead of ending the process. May be called from any thread.

    Python takes signal handlers from its main thread only, where a Serve replica's code never runs, and pending calls
    of the interpreter do not run there either, since that thread waits outside of Python. What does run there is Ray's
    own handler; so the one function that it calls is replaced. Raises RuntimeError for a Ray that has another handler.
    """
    handler = signal.getsignal(signal.SIGTERM)
    names = getattr(getattr(handler, "__code__", None), "co_names", ())
    if "raise_sys_exit_with_custom_error_message" not in names:
        raise RuntimeError(f"SIGTERM is handled by {handler!r} here, and not by a Ray worker")

    def leave(message: str, exit_code: int = 1) -> None:
        act()

    ray_worker.raise_sys_exit_with_custom_error_message = leave  # type: ignore[attr-defined]
