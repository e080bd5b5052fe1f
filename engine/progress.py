"""How far a long read has come, told on stderr: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Counts bytes towards `total`. Says nothing about what takes less than ten seconds without a terminal."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self._said = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False) if terminal else None

    def add(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._said >= LINE_SECONDS:
            self._said = time.monotonic()
            sys.stderr.write(f"{self.what}: {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB\n")
            sys.stderr.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
