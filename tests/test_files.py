"""What is on the disk when, as the kernel is told."""

import os
from pathlib import Path

import pytest

from tinyllama_ds.files import read_object, write_durably, write_object


def test_a_file_has_its_name_after_its_content_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the name is on the disk before anybody goes on."""
    path = tmp_path / "run.json"
    path.write_text("old")
    synced: list[tuple[bool, str]] = []

    def fsync(descriptor: int, really=os.fsync) -> None:  # type: ignore[no-untyped-def]
        really(descriptor)
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((file.is_dir(), path.read_text() if file.is_dir() else file.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_durably(path, b"new")
    assert synced == [(False, "new"), (True, "new")]
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_object(path, {"a": 1})

    def fsync(_: int) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="no room"):
        write_object(path, {"a": 2})
    assert read_object(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", [b"", bytes(300), b'{"a": ', b"[1]", b"1", b'{"a": "\xff"}'], ids=repr)
def test_a_damaged_file_holds_no_object(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    assert read_object(tmp_path / "run.json") is None


def test_what_cannot_be_read_is_not_taken_for_damaged(tmp_path: Path) -> None:
    """It may be whole, and must not be replaced."""
    with pytest.raises(OSError, match="directory"):
        read_object(tmp_path)
