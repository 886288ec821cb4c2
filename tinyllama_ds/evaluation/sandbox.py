"""Runs model-written programs in a sandbox, after programs that try to escape it have failed.

A program gets its own process with an empty environment, one empty directory to write to, the standard library to
read, and limits on time, memory, file size and processes; and its own namespaces (no network, no other processes)
where `unshare` is permitted.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation import confine

_READABLE = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/urandom")
_NAMESPACES = ("--net", "--ipc", "--pid", "--fork", "--kill-child")


@dataclass(frozen=True)
class Limits:
    """Limits of one program. OpenAI's harness for HumanEval allows 3 s and 4 GiB."""

    cpu_seconds: int = 3
    memory_bytes: int = 2**30
    file_bytes: int = 2**20
    processes: int = 16


@dataclass(frozen=True)
class Sandbox:
    """The sandbox of this machine; made by `open_sandbox`."""

    namespaces: tuple[str, ...]  # the `unshare` command, empty where it is not permitted
    limits: Limits = Limits()
    wall_seconds: float = 20.0  # on a loaded machine 3 s of CPU time may take long

    def passes(self, program: str) -> bool:
        """Whether a program runs to its last line. Its processes and files are gone when this returns."""
        token = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="tinyllama-ds-sandbox-", ignore_cleanup_errors=True) as parent:
            directory = Path(parent) / "private"
            directory.mkdir(mode=0o700)
            # A program that exits early, even with code 0, does not reach the line that writes the token.
            (directory / "program.py").write_text(f"{program}\nopen({token!r}, 'w').close()\n", encoding="utf-8")
            if os.geteuid() == 0:
                Path(parent).chmod(0o711)
                for path in (directory / "program.py", directory):
                    os.chown(path, confine.NOBODY, confine.NOBODY)
            self._run(directory)
            return (directory / token).is_file()

    def _run(self, directory: Path) -> None:
        settings = {
            "directory": str(directory),
            "program": str(directory / "program.py"),
            "readable": [*_READABLE, *_python_paths()],
            "limits": asdict(self.limits),
        }
        command = [*self.namespaces, sys.executable, "-I", "-S", "-B", confine.__file__, json.dumps(settings)]
        process = subprocess.Popen(
            command,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.wall_seconds)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _python_paths() -> list[str]:
    """The interpreter, the library that it is linked to, and the standard library."""
    paths = sysconfig.get_paths()
    executable = Path(sys.executable)
    shared = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    found = [executable, executable.resolve(), shared, Path(paths["stdlib"]), Path(paths["platstdlib"])]
    return [str(path) for path in found]


def open_sandbox() -> Sandbox:
    """The strictest sandbox that this machine permits.

    Raises `ConfigError` where a harmless program fails in it, or a program that tries to escape succeeds.
    """
    sandbox = Sandbox(_namespaces())
    if not sandbox.passes("import math, re, collections"):
        raise ConfigError(
            f"the sandbox for model-written code fails on this machine: {sys.executable} does not run in it; started"
            " by root, the user nobody has to be able to read it"
        )
    with tempfile.TemporaryDirectory() as folder:
        secret, outside = Path(folder) / "secret", Path(folder) / "written"
        secret.write_text("here")
        Path(folder).chmod(0o700)
        for attempt in (
            f"open({str(secret)!r}).read()",
            f"open({str(outside)!r}, 'w').write('here')",
            f"open('/proc/{os.getpid()}/environ', 'rb').read()",
        ):
            if sandbox.passes(attempt):
                raise ConfigError(
                    "the sandbox for model-written code does not hold on this machine: expected a kernel with Landlock"
                    f" (Linux 5.13) or a start by root; the escape was {attempt}"
                )
    return sandbox


def _namespaces() -> tuple[str, ...]:
    """`unshare` with its options; empty where this user may not create namespaces."""
    program = shutil.which("unshare")
    if program is None:
        return ()
    as_user = () if os.geteuid() == 0 else ("--user", "--map-current-user")
    command = (program, *as_user, *_NAMESPACES)
    finished = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if finished.returncode == 0 else ()
