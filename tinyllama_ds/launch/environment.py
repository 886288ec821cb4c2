"""The environment variables that are forwarded to ranks on other hosts, through DeepSpeed's environment file.

DeepSpeed reads `KEY=VALUE` lines, crashes on any other line, and puts the values unescaped into a shell command (pdsh)
or into arguments (MPI, Slurm), which every user of a host can read. So the file is written here, from an allow-list and
the user's `.deepspeed_env`, and a value that would be changed on its way is rejected. A secret that is named goes
through a file of the run directory that only this user can read.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import remove, write_secret

USER_FILE = ".deepspeed_env"
_PREFIXES = ("NCCL_", "GLOO_", "UCX_", "FI_", "TORCH", "PYTORCH_", "CUDA_", "TRITON_", "HF_", "TRANSFORMERS_",
             "TOKENIZERS_", "WANDB_", "DEEPSPEED_", "DS_", "TINYLLAMA_DS_")  # fmt: skip
_NAMES = ("PATH", "LD_LIBRARY_PATH")
# Settings for the processors of this machine, which do not apply to other hosts.
_MACHINE = ("DS_ACCELERATOR", "OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_")
_NEVER = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")  # set by the launcher
_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY|APIKEY|PAT)(_|$)", re.IGNORECASE)
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[\w@+=:,./-]*")  # forwarded by DeepSpeed without quotes
_QUOTABLE = re.compile(r"[\w@+=:,./ ;&|<>()*?~#!\[\]{}'^-]*")  # what double quotes protect in a shell


def is_secret(name: str) -> bool:
    """Whether the name of a variable marks its value as secret."""
    return _SECRET.search(name) is not None


def forwarded(environment: Mapping[str, str], named: Iterable[str], launcher: str) -> dict[str, str]:
    """The variables for all ranks, without secrets: the allow-list, the user's `.deepspeed_env`, and those named.

    Settings for the processors of this machine are forwarded only if named. Raises `ConfigError` for a named variable
    that is not set, a bad line of the file, and a value that cannot be forwarded.
    """
    missing = [name for name in named if name not in environment]
    if missing:
        raise ConfigError(f"--forward-env {missing[0]}: is not set in this environment")
    chosen = {
        name: value
        for name, value in environment.items()
        if value and name not in _NEVER and name.startswith(_PREFIXES) and not _is_local(name)
    }
    # The other hosts have their own paths to fall back on, so these are skipped if they cannot be forwarded.
    chosen |= {name: environment[name] for name in _NAMES if _survives_forwarding(environment.get(name, ""), launcher)}
    chosen |= named_variables(environment, named)
    shown = {name: value for name, value in chosen.items() if not is_secret(name)}
    for name, value in shown.items():
        if not _survives_forwarding(value, launcher):
            raise ConfigError(
                f"{name}: its value {value!r} would be changed by {launcher} on its way to other hosts; expected"
                f" letters, digits and @+=:./-, or the variable unset"
            )
    return shown


def named_secrets(environment: Mapping[str, str], named: Iterable[str]) -> dict[str, str]:
    """The secrets for all ranks: of the user's `.deepspeed_env`, and those named."""
    return {name: value for name, value in named_variables(environment, named).items() if is_secret(name)}


def forward_secrets(path: Path, secrets: dict[str, str]) -> None:
    """Write the secrets for the ranks. Raises `ConfigError` if the storage cannot keep the file private."""
    if secrets:
        write_private(path, json.dumps(secrets).encode())
    else:
        path.unlink(missing_ok=True)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only this user can read. Raises `ConfigError` if the storage cannot keep it private."""
    try:
        write_secret(path, content)
    except OSError as error:
        remove(path)
        raise ConfigError(f"{path}: cannot be made private ({error}); expected storage with permissions") from error


def runner_environment(environment: Mapping[str, str], named: Iterable[str]) -> dict[str, str]:
    """The environment of a multi-host launcher: srun and some mpiruns forward all of it."""
    shown = [name for name in named if not is_secret(name)]
    return {name: value for name, value in environment.items() if name in shown or not _is_local(name)}


def _is_local(name: str) -> bool:
    return is_secret(name) or name.startswith(_MACHINE)


def named_variables(environment: Mapping[str, str], named: Iterable[str]) -> dict[str, str]:
    """The variables that the user forwards to all hosts: of the `.deepspeed_env`, and those named."""
    return read_user_files() | {name: environment[name] for name in named if name in environment}


def read_user_files() -> dict[str, str]:
    """The variables of the user's files in the home and the working directory, in DeepSpeed's order."""
    found: dict[str, str] = {}
    name = os.environ.get("DS_ENV_FILE", USER_FILE)
    for path in dict.fromkeys((Path.home() / name, Path.cwd() / name)):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            content = line.strip()
            if not content or content.startswith("#"):
                continue
            key, separator, value = content.partition("=")
            if not separator or not _KEY.fullmatch(key):
                raise ConfigError(f"{path}:{number}: {key!r} is not the start of a line 'KEY=VALUE'")
            found[key] = value
    return found


def check_argument(argument: str, launcher: str) -> None:
    """Raises `ConfigError` for an argument that pdsh or the remote shell would change."""
    fits = _QUOTABLE if " " in argument else _PLAIN  # DeepSpeed quotes only arguments with blanks
    if launcher == "pdsh" and not fits.fullmatch(argument):
        raise ConfigError(
            f"{argument!r}: a remote shell would change it; expected letters, digits, blanks and @+=:,./-"
        )


def _survives_forwarding(value: str, launcher: str) -> bool:
    if not value:
        return False  # Slurm would interpret an empty value differently
    if launcher == "slurm" and "," in value:
        return False
    return (_QUOTABLE if launcher == "pdsh" else _PLAIN).fullmatch(value) is not None
