"""What travels with the package next to its code, found by name: `ds_configs/` and `hostfiles/`."""

from pathlib import Path

from tinyllama_ds.errors import ConfigError

_PACKAGE = Path(__file__).parent


def shipped_folder(name: str) -> Path:
    """Inside the installed package, or in a checkout next to it."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def shipped_config(given: str) -> Path:
    """A DeepSpeed JSON by its path, or a shipped one by its name, such as `zero3`.

    Raises `ConfigError` that lists the names. A path is not checked: its reader does so.
    """
    return _find(given, {path.stem: path for path in shipped_folder("ds_configs").glob("*.json")})


def shipped_hostfile(given: str) -> Path:
    """The same for a hostfile, such as `a100_2x8`."""
    return _find(given, {path.name: path for path in shipped_folder("hostfiles").iterdir() if not path.suffix})


def _find(given: str, shipped: dict[str, Path]) -> Path:
    path = Path(given)
    if given in shipped and not path.is_file():
        return shipped[given]
    if path.is_file() or path.suffix or path.name != given:
        return path
    expected = ", ".join(sorted(shipped))
    raise ConfigError(f"{given!r} is neither a file nor the name of a shipped one; expected a path, or {expected}")
