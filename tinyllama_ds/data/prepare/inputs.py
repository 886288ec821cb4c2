"""Which files below a directory are read, which split each belongs to, and which are skipped, and why.

No file is skipped silently, and files with a held-out name are never training data.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tinyllama_ds.data.prepare.reading import READERS, known_suffix
from tinyllama_ds.data.prepare.sources import SPLITS, SourceFormat
from tinyllama_ds.errors import ConfigError

# The words that the datasets library recognises, too; "eval" is a validation split here.
_SPLIT_WORD = re.compile(
    r"(?<![a-z])(?:(train|training)|(valid|validation|val|dev|eval|evaluation|h[eo]ld[-_ ]?out)|(test|testing))"
    r"(?:[-_ ]?set)?(?![a-z])",
    re.IGNORECASE,
)
OTHER_KIND = "unsupported file type"
_NAMED = 5  # at most, of the files of one reason, on the console

_Item = TypeVar("_Item")
Identity = tuple[int, int]  # of a file or folder: device and inode


@dataclass
class Inputs:
    """The files that are read, by split, and the skipped ones."""

    directory: Path
    splits: dict[str, list[Path]] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)  # by reason, names below the directory

    def skip(self, path: Path, why: str) -> None:
        self.skipped.setdefault(why, []).append(str(path.relative_to(self.directory)))

    def notes(self) -> list[str]:
        """What a user should know before reading: a line for each held-out split, and each reason of skipped files."""
        lines = [
            f"{self.directory}: {_belong(len(paths), split)}: {_some(self._relative(paths))}"
            for split, paths in self.splits.items()
            if split != "train"
        ]
        if "train" not in self.splits:
            lines.append(f"{self.directory}: has no training data, judging by file names")
        elif named := self._held_out_by_name():
            lines.append(f"{self.directory}: is read as training data, although it is in {named!r}")
        for why, names in self.skipped.items():
            lines.append(f"{self.directory}: not read, {why}: {_some(sorted(names))}")
        return lines

    def _held_out_by_name(self) -> str | None:
        """The name of the directory, or of a parent, that may mean held-out data."""
        names = self.directory.parts[-3:]
        return next((name for name in names if _SPLIT_WORD.fullmatch(name) and _split_word(name) != "train"), None)

    def _relative(self, paths: Iterable[Path]) -> list[str]:
        return [str(path.relative_to(self.directory)) if path != self.directory else path.name for path in paths]


def find_inputs(directory: Path, fmt: SourceFormat) -> Inputs:
    """The readable files below a directory (or the one file named) by split, sorted.

    Links are followed, and a file or folder with several names is read once. A file whose name, or the name of a folder
    above it, contains `validation` or `test` in a usual form belongs to that split, else to `train`.

    Raises `ConfigError` where nothing is found, a chosen subset has no folder, a link leads nowhere, a folder cannot be
    listed, a file is held out by one of its names only, or is there packed and unpacked.
    """
    if directory.is_symlink() and not directory.exists():
        raise ConfigError(f"{directory}: is a link to {directory.readlink()}, which is missing")
    if not directory.exists():
        raise ConfigError(f"{directory}: the input is missing")
    inputs = Inputs(directory)
    if not directory.is_dir():
        if not directory.is_file():
            raise ConfigError(f"{directory}: is neither a file nor a folder; expected files on a disk")
        known_suffix(directory)
        inputs.splits = {split_of(Path(directory.name), frozenset()): [directory]}
        return inputs
    found = _select(inputs, _readable(inputs), fmt)
    _reject_twice_packed(found)
    splits = {path: split_of(path.relative_to(directory), fmt.folders) for path in found}
    inputs.splits = {
        split: sorted(path for path in found if splits[path] == split) for split in SPLITS if split in splits.values()
    }
    return inputs


# --- the files below the directory ------------------------------------------------------------------------------------


def _readable(inputs: Inputs) -> list[Path]:
    """Regular files of a known kind, each once; files and folders come before links, which may lead to them."""
    files: dict[Identity, Path] = {}
    folders: dict[Identity, Path] = {}
    waiting = [inputs.directory]
    linked_folders: list[Path] = []
    linked_files: list[Path] = []
    while waiting or linked_folders:
        folder = waiting.pop() if waiting else linked_folders.pop(0)
        if not _is_first(inputs, folder, folders):
            continue
        for path, mode in _entries(inputs, folder):
            if stat.S_ISDIR(mode):
                (linked_folders if path.is_symlink() else waiting).append(path)
            elif not stat.S_ISREG(mode):
                inputs.skip(path, "not a regular file")
            elif not path.name.lower().endswith(tuple(READERS)):
                inputs.skip(path, OTHER_KIND)
            elif path.is_symlink():
                linked_files.append(path)
            else:
                _is_first(inputs, path, files)
    for path in sorted(linked_files):
        _is_first(inputs, path, files)
    return sorted(files.values())


def _entries(inputs: Inputs, folder: Path) -> Iterator[tuple[Path, int]]:
    """The entries of a folder that are not hidden, with their modes, those of links resolved."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be listed ({error.strerror})") from error
    for path in map(folder.joinpath, names):
        if path.name.startswith("."):
            inputs.skip(path, "hidden")
            continue
        try:
            path.name.encode()
            yield path, path.stat().st_mode
        except UnicodeEncodeError as error:
            raise ConfigError(f"{folder}: holds the name {path.name!a}, which is not UTF-8; rename it") from error
        except OSError as error:
            what = f"is a link to {path.readlink()}, which is missing" if path.is_symlink() else "cannot be found"
            raise ConfigError(f"{path}: {what} ({error.strerror}); bring what is missing, or remove it") from error


def _is_first(inputs: Inputs, path: Path, seen: dict[Identity, Path]) -> bool:
    """Record a file or folder; one that is already recorded under a different name is skipped.

    Raises `ConfigError` where the two names mean different splits.
    """
    status = path.stat()
    first = seen.setdefault((status.st_dev, status.st_ino), path)
    if first == path:
        return True
    if first in path.parents:
        inputs.skip(path, "links to a parent folder")
        return False
    here, there = path.relative_to(inputs.directory), first.relative_to(inputs.directory)
    if split_of(here, frozenset()) != split_of(there, frozenset()):
        raise ConfigError(
            f"{path}: is the same file as {first}, and their names mean different splits; remove one of them"
        )
    inputs.skip(path, "duplicates under other names")
    return False


def _reject_twice_packed(paths: Iterable[Path]) -> None:
    """`gunzip --keep` and similar programs leave the same documents twice."""
    unpacked: dict[Path, Path] = {}
    for path in paths:
        suffix = known_suffix(path)
        if ".json" in suffix:
            name = path.with_name(path.name[: -len(suffix)])
            if name in unpacked:
                raise ConfigError(
                    f"{path}: has the name of {unpacked[name].name} next to it, apart from the compression; the same"
                    " documents would count twice; remove one or rename it"
                )
            unpacked[name] = path


# --- splits and subsets -----------------------------------------------------------------------------------------------


def split_of(relative: Path, subsets: frozenset[str]) -> str:
    """The held-out split in the names of a path, the outermost first; `train` without one.

    So `train-00000.parquet` in a folder `validation` is held out, and so is `test.jsonl` in a folder `train`. The
    folder of a chosen subset is ignored.
    """
    splits = (_split_word(name) for name in relative.parts if name not in subsets)
    return next((split for split in splits if split not in (None, "train")), None) or "train"


def _split_word(name: str) -> str | None:
    """The split in a name, if there is exactly one."""
    splits = {SPLITS[match.lastindex - 1] for match in _SPLIT_WORD.finditer(name) if match.lastindex}
    return splits.pop() if len(splits) == 1 else None


def _select(inputs: Inputs, paths: list[Path], fmt: SourceFormat) -> list[Path]:
    """The files below the folders of the chosen subsets, where a corpus has its subsets in folders."""
    if fmt.folders:
        folders = {path: set(path.relative_to(inputs.directory).parts[:-1]) for path in paths}
        present = set().union(*folders.values())
        unknown = sorted(fmt.folders - present)
        if unknown:
            names = ", ".join(sorted(name for name in present if not _split_word(name)))
            raise ConfigError(f"{inputs.directory}: has no subset {unknown[0]!r}; its folders are {names}")
        for path in paths:
            if not folders[path] & fmt.folders:
                inputs.skip(path, "of other subsets" if folders[path] else "without a subset folder")
        paths = [path for path in paths if folders[path] & fmt.folders]
    if not paths:
        others = inputs.skipped.get(OTHER_KIND)
        there = f"; there are {_some(sorted(others))}" if others else ""
        raise ConfigError(
            f"{inputs.directory}: holds no file of a known kind; expected one of {', '.join(READERS)}{there}"
        )
    return paths


def grouped_by_size(items: Iterable[_Item], size_of: Callable[[_Item], float], limit: float) -> Iterator[list[_Item]]:
    """Consecutive items in groups, each closed by the item with which its size reaches the limit."""
    group: list[_Item] = []
    size = 0.0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= limit:
            yield group
            group, size = [], 0.0
    if group:
        yield group


def _belong(count: int, split: str) -> str:
    if count == 1:
        return f"1 file belongs to {split} by its name"
    return f"{count:,} files belong to {split} by their names"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
