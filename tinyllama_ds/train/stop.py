"""A wish to stop: by a signal to any rank, or by the file `stop` in the run directory. The ranks agree on it."""

import signal
from pathlib import Path
from time import monotonic

from tinyllama_ds.layout import STOP_FILE

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LOOK_SECONDS = 1.0  # between two looks for the file, which may lie on slow shared storage


class StopRequest:
    """Whether this rank was asked to stop after the current step. A second signal has its ordinary effect."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self._wanted = False
        self._looked_at = 0.0
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def is_requested(self) -> bool:
        """Cheap enough for every step."""
        if not self._wanted and monotonic() - self._looked_at >= _LOOK_SECONDS:
            self._wanted = self._file.exists()
            self._looked_at = monotonic()
        return self._wanted

    def _note(self, number: int, _frame: object) -> None:
        self._wanted = True
        signal.signal(number, signal.SIG_DFL)
