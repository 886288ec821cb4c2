"""The ledger of a run: which samples it skipped or excluded, and why. `ledger.jsonl`, one JSON object per line.

`skipped`      a step whose gradient was dropped: its samples had no effect
`rolled back`  samples that are excluded from the order, because a step on them ended in a spike

Every change replaces the file as a whole, so that a crash leaves the old one or the new one.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import parse_row, write_durably
from tinyllama_ds.layout import LEDGER_FILE

SKIPPED, ROLLED_BACK = "skipped", "rolled back"


@dataclass(frozen=True)
class Entry:
    """One line. Samples are numbered in the run's order without exclusions."""

    event: str
    step: int  # counted from 1, as in the metrics
    first_sample: int
    last_sample: int
    reason: str

    @property
    def samples(self) -> range:
        return range(self.first_sample, self.last_sample + 1)


def read_ledger(run_dir: Path) -> list[Entry]:
    """All entries, oldest first; none where there is no ledger. Raises `ConfigError` for a malformed line."""
    path = run_dir / LEDGER_FILE
    try:
        with path.open("rb") as file:
            return [_entry(line, f"{path}:{number}") for number, line in enumerate(file, start=1)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def _entry(line: bytes, place: str) -> Entry:
    row = parse_row(line, event=str, step=int, first_sample=int, last_sample=int, reason=str)
    is_entry = (
        row is not None
        and row.keys() == Entry.__annotations__.keys()
        and row["event"] in (SKIPPED, ROLLED_BACK)
        and row["first_sample"] <= row["last_sample"]
    )
    if row is None or not is_entry:
        raise ConfigError(
            f"{place}: not an entry of a run's ledger, which has the excluded samples; restore the file, or"
            " remove it if the run has never rolled back"
        )
    return Entry(**row)


def excluded_samples(entries: list[Entry]) -> list[range]:
    """The samples that the run never trains on."""
    return [entry.samples for entry in entries if entry.event == ROLLED_BACK]


def record(run_dir: Path, entry: Entry) -> None:
    """Add an entry; it is on the disk when this returns. Called by one rank."""
    write_ledger(run_dir, [*read_ledger(run_dir), entry])


def forget_skips_after(run_dir: Path, step: int) -> None:
    """Drop what was noted of steps that a resumed run will do again. Called by one rank."""
    entries = read_ledger(run_dir)
    kept = [entry for entry in entries if entry.event == ROLLED_BACK or entry.step <= step]
    if kept != entries:
        write_ledger(run_dir, kept)


def write_ledger(run_dir: Path, entries: list[Entry]) -> None:
    """Replace the ledger as a whole; it is on the disk when this returns. Called by one rank."""
    lines = "".join(json.dumps(asdict(entry)) + "\n" for entry in entries)
    write_durably(run_dir / LEDGER_FILE, lines.encode())
