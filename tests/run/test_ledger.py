"""The ledger: entries persist, and are validated when read."""

from pathlib import Path

import pytest

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.run.ledger import (
    LEDGER_FILE,
    ROLLED_BACK,
    SKIPPED,
    Entry,
    excluded_samples,
    forget_skips_after,
    read_ledger,
    record,
)

ENTRIES = [
    Entry(SKIPPED, 3, 16, 23, "loss or gradient is not finite"),
    Entry(ROLLED_BACK, 9, 64, 71, "spike of the loss"),
    Entry(SKIPPED, 8, 56, 63, "spike of the loss"),
]


def test_entries_are_read_back_in_their_order(tmp_path: Path) -> None:
    assert read_ledger(tmp_path) == []
    for entry in ENTRIES:
        record(tmp_path, entry)
    assert read_ledger(tmp_path) == ENTRIES
    assert excluded_samples(read_ledger(tmp_path)) == [range(64, 72)]
    assert [path.name for path in tmp_path.iterdir()] == [LEDGER_FILE]


def test_skips_that_will_be_repeated_are_dropped_and_rollbacks_are_not(tmp_path: Path) -> None:
    for entry in ENTRIES:
        record(tmp_path, entry)
    forget_skips_after(tmp_path, 4)
    assert read_ledger(tmp_path) == ENTRIES[:2]


@pytest.mark.parametrize(
    "line",
    ["{", '{"event": "skipped"}', '{"event": "eaten", "step": 1, "first_sample": 0, "last_sample": 1, "reason": ""}',
     '{"event": "skipped", "step": 1, "first_sample": 8, "last_sample": 1, "reason": ""}'],
)  # fmt: skip
def test_a_line_that_is_not_an_entry_is_rejected_with_its_number(line: str, tmp_path: Path) -> None:
    record(tmp_path, ENTRIES[0])
    with (tmp_path / LEDGER_FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match=rf"{LEDGER_FILE}:2: not an entry of a run's ledger"):
        read_ledger(tmp_path)
