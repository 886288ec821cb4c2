"""One writer per run directory."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launching import wait_until

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.launch import lock
from tinyllama_ds.launch.lock import LOCK_FILE, hold_run, is_held


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def owner(**changes: object) -> str:
    ours = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": int(Path("/proc/self/stat").read_text().split()[21]),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
    }
    return json.dumps(ours | changes)


def test_a_directory_is_created_locked_and_released(tmp_path: Path) -> None:
    with hold_run(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o750
        with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()} on host {socket.gethostname()}"):
            hold_run(tmp_path / "run").__enter__()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"pid": dead_process()}, {"started": 1}, {"boot": "before the last boot"}])
def test_the_lock_of_a_dead_owner_is_taken_over(change: dict, tmp_path: Path) -> None:
    """Its process is gone, its number belongs to another process now, or the machine was booted since."""
    (tmp_path / LOCK_FILE).write_text(owner(**change))
    with hold_run(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text()) == json.loads(owner())


def test_whether_a_live_process_holds_it(tmp_path: Path) -> None:
    assert not is_held(tmp_path)
    for held, expected in ((owner(), True), (owner(host="elsewhere"), True), (owner(pid=dead_process()), False)):
        (tmp_path / LOCK_FILE).write_text(held)
        assert is_held(tmp_path) == expected


def test_an_owner_on_another_host_is_watched_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_SILENCE_SECONDS", 3.0)
    path = tmp_path / LOCK_FILE
    path.write_text(owner(host="elsewhere"))
    written = path.stat().st_mtime_ns
    touch = f"import os, time\nwhile True: os.utime({str(path)!r}); time.sleep(0.05)"
    refreshing = subprocess.Popen([sys.executable, "-c", touch])
    try:
        wait_until(lambda: path.stat().st_mtime_ns != written, "an owner that refreshes its lock")
        with pytest.raises(ConfigError, match="is in use by process .* on host elsewhere"):
            hold_run(tmp_path).__enter__()
    finally:
        refreshing.kill()
        refreshing.wait()
    with hold_run(tmp_path):
        assert json.loads(path.read_text())["host"] == socket.gethostname()


DAMAGED = {
    "empty": b"", "zeros": bytes(120), "cut short": b'{"pid": 12, "ho', "not UTF-8": b'{"host": "\xff"}',
    "a list": b"[12]", "another object": b'{"pid": 12}',
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_lock_is_watched_and_then_taken_over(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss. Its owner is unknown; a live one refreshes it, on this host or a different one."""
    monkeypatch.setattr(lock, "_SILENCE_SECONDS", 0.5)
    path = tmp_path / LOCK_FILE
    path.write_bytes(content)
    assert not is_held(tmp_path)
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.utime(path))
    with pytest.raises(ConfigError, match=rf"is in use by an unknown process, as {path} is damaged,$"):
        hold_run(tmp_path).__enter__()
    assert path.read_bytes() == content
    waited: list[float] = []
    monkeypatch.setattr(lock.time, "sleep", waited.append)
    with hold_run(tmp_path):
        assert json.loads(path.read_text()) == json.loads(owner())
    assert waited == [0.5]


def test_an_owner_whose_lock_is_damaged_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock no longer excludes others."""
    monkeypatch.setattr(lock, "_REFRESH_SECONDS", 0.0)
    with hold_run(tmp_path) as held:
        (tmp_path / LOCK_FILE).write_bytes(b"\xff")
        with pytest.raises(ConfigError, match="was taken over by an unknown process, as .* is damaged, while this"):
            held.refresh()
    assert (tmp_path / LOCK_FILE).read_bytes() == b"\xff"


def test_a_lock_is_on_the_disk_before_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []

    def fsync(descriptor: int) -> None:
        assert not (tmp_path / LOCK_FILE).exists()
        synced.append(Path(f"/proc/self/fd/{descriptor}").read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    with hold_run(tmp_path):
        assert synced == [(tmp_path / LOCK_FILE).read_bytes()]


def test_a_lock_that_is_released_at_the_last_moment_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it stood in the way, and before it is read."""
    (tmp_path / LOCK_FILE).write_text(owner())
    create = lock._create

    def create_late(path: Path, content: bytes) -> bool:
        is_created = create(path, content)
        if not is_created:
            path.unlink()
        return is_created

    monkeypatch.setattr(lock, "_create", create_late)
    with hold_run(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text()) == json.loads(owner())


def test_a_lock_that_was_taken_over_is_not_removed_by_its_old_owner(tmp_path: Path) -> None:
    with hold_run(tmp_path):
        (tmp_path / LOCK_FILE).write_text(owner(host="elsewhere"))
    assert json.loads((tmp_path / LOCK_FILE).read_text())["host"] == "elsewhere"


def test_an_owner_detects_a_takeover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a network that was down for a while there may be two: the one without the lock ends its run."""
    monkeypatch.setattr(lock, "_REFRESH_SECONDS", 0.0)
    with hold_run(tmp_path) as held:
        held.refresh()
        (tmp_path / LOCK_FILE).write_text(owner(host="elsewhere"))
        with pytest.raises(ConfigError, match=f"was taken over by process {os.getpid()} on host elsewhere while this"):
            held.refresh()
        (tmp_path / LOCK_FILE).unlink()
        with pytest.raises(ConfigError, match="was taken over by a process that removed the lock while this process"):
            held.refresh()


def test_a_directory_that_was_used_stays(tmp_path: Path) -> None:
    with hold_run(tmp_path / "run"):
        (tmp_path / "run" / "run.json").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EMLINK)


@pytest.mark.parametrize("reason", NO_LINKS, ids=errno.errorcode.get)
def test_storage_without_hard_links_holds_a_lock_too(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object, **__: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "link", link)
    with hold_run(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_FILE).read_text() == owner()
        assert is_held(tmp_path / "run")
        with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()} on host"):
            hold_run(tmp_path / "run").__enter__()
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]
    assert not (tmp_path / "run").exists()
    (tmp_path / LOCK_FILE).write_text(owner(pid=dead_process()))
    with hold_run(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == owner()


def test_unreachable_storage_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_REFRESH_SECONDS", 0.0)

    def fail(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with hold_run(tmp_path) as held:
        with monkeypatch.context() as away:
            away.setattr(os, "utime", fail)
            held.refresh()
            away.setattr(Path, "read_bytes", fail)
            held.refresh()
            assert not is_held(tmp_path)
        held.refresh()
        monkeypatch.setattr(Path, "read_bytes", fail)
    assert (tmp_path / LOCK_FILE).exists(), "to be taken over as that of a dead process"
