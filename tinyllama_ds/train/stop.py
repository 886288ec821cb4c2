"""Stop requests: a signal to any rank, or the file `stop` in the run directory. All ranks agree on them per step."""

import signal
from pathlib import Path
from time import monotonic

from tinyllama_ds.layout import STOP_FILE

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_SECONDS = 1.0  # between two looks for the file, which may be on slow shared storage


class StopRequest:
    """Whether this rank was asked to stop after the current step."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self._is_requested = False
        self._polled_at = 0.0

    def listen(self) -> None:
        """From now on signals are stop requests. A second one has its ordinary effect."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def is_requested(self) -> bool:
        """Cheap enough for every step."""
        if not self._is_requested and monotonic() - self._polled_at >= _POLL_SECONDS:
            self._is_requested = self._file.exists()
            self._polled_at = monotonic()
        return self._is_requested

    def _on_signal(self, number: int, _frame: object) -> None:
        self._is_requested = True
        signal.signal(number, signal.SIG_DFL)
