"""Drops privileges, then execs an untrusted program.

Started by `sandbox.py` in a separate interpreter; it needs only the standard library and Linux.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path

NOBODY = 65534
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 8, 38, 47
_CAPABILITY_VERSION, _CAP_DAC_OVERRIDE, _RAISE = 0x20080522, 1, 2  # linux/capability.h, linux/prctl.h
_PATH_BENEATH = 1  # LANDLOCK_RULE_PATH_BENEATH
# System calls of Landlock, the same on every architecture, and bits of its access rights (linux/landlock.h).
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # number of file access rights by version of Landlock

_libc = ctypes.CDLL(None, use_errno=True)


def landlock_version() -> int:
    """The kernel's version of Landlock, which restricts file access; 0 or less without it."""
    return _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)


def drop_root(keep_access: bool) -> None:
    """From root become the user nobody, whose processes the kernel limits; other users have nothing to drop.

    `keep_access` keeps the capability to bypass file permissions, because Python may be readable only for root. Use it
    only where Landlock restricts file access.
    """
    if os.geteuid() != 0:
        return
    _check(_libc.prctl(_PR_SET_KEEPCAPS, int(keep_access), 0, 0, 0))
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    if keep_access:
        one = 1 << _CAP_DAC_OVERRIDE
        kept = struct.pack("=6I", one, one, one, 0, 0, 0)  # effective, permitted, inheritable, and their upper halves
        _check(_libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION, 0), kept))
        _check(_libc.prctl(_PR_CAP_AMBIENT, _RAISE, _CAP_DAC_OVERRIDE, 0, 0))


def set_limits(cpu_seconds: int, memory_bytes: int, file_bytes: int, processes: int) -> None:
    """Resource limits on CPU time, address space, file size, open files and processes."""
    for name, limit in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, processes),
    ):
        _, hard = resource.getrlimit(name)
        bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(name, (bound, bound))


def confine_files(version: int, writable: Path, readable: list[Path]) -> None:
    """Allow one directory to write to and some paths to read (Landlock).

    Its later versions also deny TCP, and signals and sockets to other processes.
    """
    files = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    rights = [files, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]  # files, TCP, scopes
    attributes = struct.pack(f"={len(rights)}Q", *rights)
    ruleset = _libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    _check(ruleset)
    _allow(ruleset, writable, files)
    for path in readable:
        if path.exists():
            _allow(ruleset, path, _EXECUTE | _READ_FILE | (_READ_DIR if path.is_dir() else 0))
    _allow(ruleset, Path("/dev/null"), _READ_FILE | _WRITE_FILE)
    _check(_libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, path: Path, rights: int) -> None:
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, handle)
    _check(_libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
    os.close(handle)


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main(settings: dict) -> None:
    """Confine this process and run `settings["program"]` in it."""
    os.chdir(settings["directory"])
    version = landlock_version()
    drop_root(keep_access=version > 0)
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))  # lost when root was dropped
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if version > 0:  # without it, sandbox.py tests whether the rest is enough
        confine_files(version, Path(settings["directory"]), [Path(path) for path in settings["readable"]])
    set_limits(**settings["limits"])
    os.execve(sys.executable, [sys.executable, "-P", "-s", "-S", "-B", settings["program"]], {"PYTHONHASHSEED": "0"})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
