"""Which variables of this shell the ranks on other hosts see, and the file through which DeepSpeed hands them on.

DeepSpeed reads `KEY=VALUE` lines, crashes on any other line, and puts the values unescaped into a shell command (pdsh)
or into arguments (MPI, Slurm), which every user of a host can read. So the file is written here, from an allow-list and
from the user's own `.deepspeed_env`, and a value that would not arrive as it is is refused. A secret that is named goes
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
# What fits this machine's processors and says nothing about those of other hosts.
_MACHINE = ("DS_ACCELERATOR", "OMP_", "GOMP_", "KMP_", "MKL_", "MALLOC_")
_NEVER = ("CUDA_VISIBLE_DEVICES", "DS_ENV_FILE")  # the launcher's own business
_SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|KEY|APIKEY|PAT)(_|$)", re.IGNORECASE)
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[\w@+=:,./-]*")  # what DeepSpeed hands on without quotes
_QUOTABLE = re.compile(r"[\w@+=:,./ ;&|<>()*?~#!\[\]{}'^-]*")  # what double quotes protect in a shell


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is nobody else's business."""
    return _SECRET.search(name) is not None


def forwarded(environment: Mapping[str, str], named: Iterable[str], launcher: str) -> dict[str, str]:
    """The variables for all ranks: the allow-list, the user's `.deepspeed_env`, and those named, but for secrets.

    Without a name what is set for this machine's processors is not among them either.

    Raises `ConfigError` for a named variable that is not set, a bad line of the file, and a value that cannot be
    handed on.
    """
    missing = [name for name in named if name not in environment]
    if missing:
        raise ConfigError(f"--forward-env {missing[0]}: is not set in this environment")
    chosen = {
        name: value
        for name, value in environment.items()
        if value and name not in _NEVER and name.startswith(_PREFIXES) and not _is_local(name)
    }
    # The other hosts have paths of their own to fall back on, so these are left out where they do not fit.
    chosen |= {name: environment[name] for name in _NAMES if _survives_forwarding(environment.get(name, ""), launcher)}
    chosen |= read_user_files()
    chosen |= {name: environment[name] for name in named}
    shown = {name: value for name, value in chosen.items() if not is_secret(name)}
    for name, value in shown.items():
        _check_value(name, value, launcher)
    return shown


def named_secrets(environment: Mapping[str, str], named: Iterable[str]) -> dict[str, str]:
    """Those secrets that all ranks are to have: of the user's `.deepspeed_env`, and those named."""
    chosen = read_user_files() | {name: environment[name] for name in named if name in environment}
    return {name: value for name, value in chosen.items() if is_secret(name)}


def forward_secrets(path: Path, secrets: dict[str, str]) -> None:
    """Leave them for the ranks, or nothing. Raises `ConfigError` where the storage would show them to others."""
    try:
        if secrets:
            write_secret(path, json.dumps(secrets).encode())
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        remove(path)
        raise ConfigError(f"{path}: cannot be kept from others ({error}); expected storage with permissions") from error


def runner_environment(environment: Mapping[str, str], named: Iterable[str]) -> dict[str, str]:
    """The environment of a launcher over the network: srun and some mpiruns hand on all that they see."""
    shown = [name for name in named if not is_secret(name)]
    return {name: value for name, value in environment.items() if name in shown or not _is_local(name)}


def _is_local(name: str) -> bool:
    return is_secret(name) or name.startswith(_MACHINE)


def named_value(name: str, named: Iterable[str]) -> str | None:
    """The value of a variable that the user hands on to all hosts by its name."""
    return os.environ.get(name) if name in named else read_user_files().get(name)


def read_user_files() -> dict[str, str]:
    """What the user's own files say: in the home directory, then in the working directory, as DeepSpeed reads them."""
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


def write_private_file(path: Path, content: str) -> None:
    """A file that only this user can read: a named secret may be in it."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(content)


def check_argument(argument: str, launcher: str) -> None:
    """Refuse an argument that pdsh and the remote shell would change on its way to the script."""
    fits = _QUOTABLE if " " in argument else _PLAIN  # DeepSpeed quotes for the sake of blanks alone
    if launcher == "pdsh" and not fits.fullmatch(argument):
        raise ConfigError(
            f"{argument!r}: a remote shell would change it; expected letters, digits, blanks and @+=:,./-"
        )


def _check_value(name: str, value: str, launcher: str) -> None:
    if not _survives_forwarding(value, launcher):
        raise ConfigError(
            f"{name}: its value {value!r} does not reach other hosts unchanged through {launcher}; expected letters,"
            f" digits and @+=:./-, or the variable unset"
        )


def _survives_forwarding(value: str, launcher: str) -> bool:
    if not value:
        return False  # an empty one is as good as none, and Slurm would take it for something else
    if launcher == "slurm" and "," in value:
        return False
    return (_QUOTABLE if launcher == "pdsh" else _PLAIN).fullmatch(value) is not None
