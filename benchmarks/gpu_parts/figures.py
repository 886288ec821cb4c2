"""The figures of one part, on the disk as soon as they are known: a part that is killed keeps what it had."""

import json
import os
from pathlib import Path
from typing import Any

WIDTH = 200  # of a line of the table


class Figures:
    """Values by name for programs, lines by name for the table; every change is one atomic rename."""

    def __init__(self, path: Path) -> None:
        self._path = path
        content = json.loads(path.read_text()) if path.exists() else {"figures": {}, "lines": {}}
        self.values: dict[str, Any] = content["figures"]
        self._lines: dict[str, str] = content["lines"]

    def put(self, name: str, value: Any, line: str | None = None) -> None:
        """Store a value under a name, and perhaps a line of the table."""
        self.values[name] = value
        if line is not None:
            self._lines[name] = line[:WIDTH]
        self._write()

    def check(self, name: str, is_good: bool, line: str) -> None:
        """Store PASS or FAIL, and a line with the finding."""
        self.put(name, is_good, f"{'PASS' if is_good else 'FAIL'} {line}")

    def end(self) -> int:
        """The part's exit code: 1 where a check failed."""
        failed = [self._lines[name] for name, value in self.values.items() if value is False]
        for line in failed:
            print(f"Error: {line}", flush=True)
        return 1 if failed else 0

    def _write(self) -> None:
        content = {"figures": self.values, "lines": self._lines}
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self._path)


def read_figures(path: Path) -> dict[str, dict]:
    """What a part has stored so far: its `figures` and `lines`."""
    return json.loads(path.read_text()) if path.exists() else {"figures": {}, "lines": {}}
