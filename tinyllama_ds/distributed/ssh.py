"""The command line of ssh."""

import os
import shlex
from collections.abc import Sequence


def ssh_command(host: str, command: Sequence[str], port: int | None = None) -> list[str]:
    """A command on a host that was read from a hostfile, with pdsh's options, this directory and this PYTHONPATH.

    A hostfile has no name that ssh could take for an option.
    """
    path = os.environ.get("PYTHONPATH")
    words = [*(["env", f"PYTHONPATH={path}"] if path else []), *command]
    options = [*shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), *(["-p", str(port)] if port else [])]
    options += ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
    return ["ssh", *options, "--", host, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"]
