"""Which files below a directory are read, which split each belongs to, and which are passed over, and why.

Nothing is passed over in silence, and what its name says is held out never counts as training data.
"""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tinyllama_ds.data.prepare.reading import READERS
from tinyllama_ds.data.prepare.sources import SPLITS, SourceFormat
from tinyllama_ds.errors import ConfigError

# The words by which the datasets library knows a split, too; "eval" is a validation split here.
_SPLIT_WORD = re.compile(
    r"(?<![a-z])(?:(train|training)|(valid|validation|val|dev|eval|evaluation|h[eo]ld[-_ ]?out)|(test|testing))"
    r"(?:[-_ ]?set)?(?![a-z])",
    re.IGNORECASE,
)
OTHER_KIND = "of another kind than is read"
_NAMED = 5  # files of one reason that are named on the console

Identity = tuple[int, int]  # of a file or folder, by whatever name: device and inode


@dataclass
class Inputs:
    """The files that are read, by split, and those that are not."""

    directory: Path
    splits: dict[str, list[Path]] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)  # why to names below the directory

    def skip(self, path: Path, why: str) -> None:
        self.skipped.setdefault(why, []).append(str(path.relative_to(self.directory)))

    def notes(self) -> list[str]:
        """What a user should know before this is read: a line for each held-out split, and for each reason."""
        lines = [
            f"{self.directory}: {_belong(len(paths), split)}: {_some(self._relative(paths))}"
            for split, paths in self.splits.items()
            if split != "train"
        ]
        if "train" not in self.splits:
            lines.append(f"{self.directory}: holds no training data, by the names of its files")
        elif named := self._held_out_by_name():
            lines.append(f"{self.directory}: is read as training data, though it lies in {named!r}")
        for why, names in self.skipped.items():
            lines.append(f"{self.directory}: not read, {why}: {_some(sorted(names))}")
        return lines

    def _held_out_by_name(self) -> str | None:
        """The name of the directory, or of one that it lies in, which may be where somebody keeps held-out data."""
        names = self.directory.parts[-3:]
        return next((name for name in names if _SPLIT_WORD.fullmatch(name) and _split_word(name) != "train"), None)

    def _relative(self, paths: Iterable[Path]) -> list[str]:
        return [str(path.relative_to(self.directory)) if path != self.directory else path.name for path in paths]


def find_inputs(directory: Path, fmt: SourceFormat) -> Inputs:
    """The readable files below a directory (or the one file named) by split, sorted so that no order is the disk's.

    Links are followed, and a file or folder that is there under several names is read once. A file whose name, or a
    folder on whose path, says `validation` or `test` in one of the usual ways belongs to that split, wherever it
    stands, else to `train`.

    Raises `ConfigError` where nothing is found, a chosen subset has no folder, a link leads nowhere, a folder cannot be
    listed, a file is held out by one of its names only, or is there packed and unpacked.
    """
    if directory.is_symlink() and not directory.exists():
        raise ConfigError(f"{directory}: is a link to {directory.readlink()}, which is missing")
    if not directory.exists():
        raise ConfigError(f"{directory}: the input is missing")
    inputs = Inputs(directory)
    if not directory.is_dir():
        _reject_unreadable(directory)
        inputs.splits = {split_of(Path(directory.name), frozenset()): [directory]}
        return inputs
    found = _select(inputs, _readable(inputs), fmt)
    _reject_twice_packed(found)
    splits = {path: split_of(path.relative_to(directory), fmt.folders) for path in found}
    inputs.splits = {
        split: sorted(path for path in found if splits[path] == split) for split in SPLITS if split in splits.values()
    }
    return inputs


def _reject_unreadable(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: is neither a file nor a folder; expected files on a disk")
    if not _is_known(path):
        raise ConfigError(f"{path}: unknown kind of file; expected one of {', '.join(READERS)}")


def _is_known(path: Path) -> bool:
    return path.name.lower().endswith(tuple(READERS))


# --- what lies below the directory ------------------------------------------------------------------------------------


def _readable(inputs: Inputs) -> list[Path]:
    """Regular files of a known kind, each once. What is there itself comes before links, which may lead to it."""
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
            elif not _is_known(path):
                inputs.skip(path, OTHER_KIND)
            elif path.is_symlink():
                linked_files.append(path)
            else:
                _is_first(inputs, path, files)
    for path in sorted(linked_files):
        _is_first(inputs, path, files)
    return sorted(files.values())


def _entries(inputs: Inputs, folder: Path) -> Iterator[tuple[Path, int]]:
    """What a folder holds and is not hidden, with the mode of what it leads to."""
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
    """Note a file or folder; one that is there already, under another name, is passed over.

    Raises `ConfigError` where the two names say different splits.
    """
    status = path.stat()
    first = seen.setdefault((status.st_dev, status.st_ino), path)
    if first == path:
        return True
    if first in path.parents:
        inputs.skip(path, "as links to a folder above them")
        return False
    here, there = path.relative_to(inputs.directory), first.relative_to(inputs.directory)
    if split_of(here, frozenset()) != split_of(there, frozenset()):
        raise ConfigError(f"{path}: is the same as {first}, and their names say different splits; remove one of them")
    inputs.skip(path, "as they are there under another name too")
    return False


def _reject_twice_packed(paths: Iterable[Path]) -> None:
    """`gunzip --keep` and its like leave the same documents twice."""
    unpacked: dict[Path, Path] = {}
    for path in paths:
        lower = path.name.lower()
        end = next(suffix for suffix in READERS if lower.endswith(suffix))
        if ".json" in end:
            name = path.with_name(path.name[: -len(end)])
            if name in unpacked:
                raise ConfigError(
                    f"{path}: has the name of {unpacked[name].name} beside it, but for its compression; the same"
                    " documents would count twice; remove one or rename it"
                )
            unpacked[name] = path


# --- splits and subsets -----------------------------------------------------------------------------------------------


def split_of(relative: Path, subsets: frozenset[str]) -> str:
    """The held-out split that a name on a path says, the outermost first; `train` where none does.

    So `train-00000.parquet` in a folder `validation` is held out, and so is `test.jsonl` in a folder `train`. The
    folder of a chosen subset says nothing.
    """
    said = (_split_word(name) for name in relative.parts if name not in subsets)
    return next((split for split in said if split not in (None, "train")), None) or "train"


def _split_word(name: str) -> str | None:
    """The one split that a name says."""
    said = {SPLITS[match.lastindex - 1] for match in _SPLIT_WORD.finditer(name) if match.lastindex}
    return said.pop() if len(said) == 1 else None


def _select(inputs: Inputs, paths: list[Path], fmt: SourceFormat) -> list[Path]:
    """Those below the folders of the chosen subsets, where a corpus keeps its subsets in folders."""
    if fmt.folders:
        folders = {path: set(path.relative_to(inputs.directory).parts[:-1]) for path in paths}
        present = set().union(*folders.values())
        unknown = sorted(fmt.folders - present)
        if unknown:
            names = ", ".join(sorted(name for name in present if not _split_word(name)))
            raise ConfigError(f"{inputs.directory}: has no subset {unknown[0]!r}; its folders are {names}")
        for path in paths:
            if not folders[path] & fmt.folders:
                inputs.skip(path, "as they are of other subsets" if folders[path] else "as no folder says their subset")
        paths = [path for path in paths if folders[path] & fmt.folders]
    if not paths:
        others = inputs.skipped.get(OTHER_KIND)
        there = f"; there are {_some(sorted(others))}" if others else ""
        raise ConfigError(
            f"{inputs.directory}: holds no file of a known kind; expected one of {', '.join(READERS)}{there}"
        )
    return paths


def _belong(count: int, split: str) -> str:
    if count == 1:
        return f"1 file belongs to {split} by its name"
    return f"{count:,} files belong to {split} by their names"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
