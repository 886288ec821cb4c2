"""What travels with the package, found by name: `ds_configs/`, `hostfiles/`, and the TOML files inside it."""

from pathlib import Path

from tinyllama_ds.errors import ConfigError, shown

_PACKAGE = Path(__file__).parent


def shipped_folder(name: str) -> Path:
    """Inside the installed package, or in a checkout next to it."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def shipped_config(given: str) -> Path:
    """A DeepSpeed JSON by its path, or a shipped one by its name, such as `zero3`.

    Raises `ConfigError` that lists the names. A path is not checked: its reader does so.
    """
    return _find(given, "DeepSpeed config", {path.stem: path for path in shipped_folder("ds_configs").glob("*.json")})


def shipped_hostfile(given: str) -> Path:
    """The same for a hostfile, such as `a100_2x8`."""
    return _find(
        given, "hostfile", {path.name: path for path in shipped_folder("hostfiles").iterdir() if not path.suffix}
    )


def shipped_toml(given: str, kind: str, folder: Path) -> Path:
    """A TOML file by its path, or by its name a shipped one of a kind, such as a recipe, in the kind's folder.

    Raises `ConfigError` that lists the names. A path is not checked: its reader does so.
    """
    path = Path(given)
    if path.suffix == ".toml":
        return path
    path = folder / f"{given}.toml"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in folder.glob("*.toml")))
        raise ConfigError(f"{kind} {shown(given)} is unknown; the shipped ones are {names}, or give a .toml file")
    return path


def _find(given: str, kind: str, shipped: dict[str, Path]) -> Path:
    path = Path(given)
    if given in shipped and not path.is_file():
        return shipped[given]
    if path.is_file() or path.suffix or path.name != given:
        return path
    names = ", ".join(sorted(shipped))
    raise ConfigError(f"{kind} {shown(given)} is unknown; the shipped ones are {names}, or give a path")
