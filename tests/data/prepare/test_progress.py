"""The bar of a preparation follows files that others write."""

import io
import sys
from pathlib import Path

import pytest

from tinyllama_ds.data.prepare import progress as progress_module
from tinyllama_ds.data.prepare.progress import ShardProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def take(self) -> str:
        """What was drawn since the last time."""
        drawn = self.getvalue()
        self.seek(0)
        self.truncate()
        return drawn


def test_the_bar_follows_shards_underway_and_learns_the_total(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress_module, "_POLL_SECONDS", 3600.0)  # the looks are the test's own
    first, second = tmp_path / "0.bin", tmp_path / "1.bin"
    progress = ShardProgress("prepare x", {first: 1000.0, second: 1000.0}, bytes_per_token=2)
    with progress.watching():
        (tmp_path / ".0.bin.host.1.partial").write_bytes(bytes(300))
        progress.look()
        assert "150/1.00k" in terminal.take()
        (tmp_path / ".0.bin.host.1.partial").rename(first)
        first.write_bytes(bytes(3000))  # three times what was expected, so the other one will be too
        progress.look()
        assert "1.50k/3.00k" in terminal.take()
        second.write_bytes(bytes(2000))
    assert "2.50k/2.50k" in (end := terminal.take())
    assert "2 of 2 shards" in end


def test_nothing_to_do_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with ShardProgress("prepare x", {}, bytes_per_token=2).watching():
        pass
    assert capsys.readouterr().err == ""
