"""Runs programs that a model has written: confined, bounded, and only after it was seen that the confinement holds.

A program gets a process of its own with an empty environment, one empty directory to write to, the standard library to
read, and bounds on time, memory, file size and processes; on namespaces of its own (no network, no other processes)
where the machine lets `unshare` make them.
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
    """What one program may use. OpenAI's harness for HumanEval allows 3 s and 4 GiB."""

    cpu_seconds: int = 3
    memory_bytes: int = 2**30
    file_bytes: int = 2**20
    processes: int = 16


@dataclass(frozen=True)
class Sandbox:
    """How programs are started here; made by `open_sandbox`."""

    namespaces: tuple[str, ...]  # the command that makes them, empty where that is not permitted
    limits: Limits = Limits()
    wall_seconds: float = 20.0  # a loaded machine may take long over 3 s of processor time

    def passes(self, program: str) -> bool:
        """Whether a program runs to its last line. It is dead, and its files are gone, when this returns."""
        token = secrets.token_hex(16)
        with tempfile.TemporaryDirectory(prefix="tinyllama-ds-sandbox-", ignore_cleanup_errors=True) as parent:
            directory = Path(parent) / "private"
            directory.mkdir(mode=0o700)
            # What exits early, even with code 0, does not come to the line that leaves the token.
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

    Raises `ConfigError` where an honest program does not run in it, or where one that tries to get out succeeds.
    """
    sandbox = Sandbox(_namespaces())
    if not sandbox.passes("import math, re, collections"):
        raise ConfigError(
            f"the sandbox for model-written code does not run on this machine: {sys.executable} cannot be confined; as"
            " root, it has to lie where the user nobody can read it"
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
                    "the sandbox for model-written code does not hold on this machine: it needs a kernel with Landlock"
                    f" (Linux 5.13) or to be started by root; what got out was {attempt}"
                )
    return sandbox


def _namespaces() -> tuple[str, ...]:
    """`unshare` with its options, or nothing where the machine does not let this user make namespaces."""
    program = shutil.which("unshare")
    if program is None:
        return ()
    as_user = () if os.geteuid() == 0 else ("--user", "--map-current-user")
    command = (program, *as_user, *_NAMESPACES)
    finished = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if finished.returncode == 0 else ()
