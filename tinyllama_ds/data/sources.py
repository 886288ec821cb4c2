"""Raw corpora as they lie on disk: files of many documents, read one at a time.

Nothing is dropped in silence: every record of a file comes out as a text, a rejection with its reason, or a fault with
its file and line.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from tinyllama_ds.errors import Refusal

SPLITS = ("train", "validation", "test")
MAX_DOCUMENT_BYTES = 64 * 2**20  # also what keeps a decompression bomb out of memory
_READ_BYTES = 2**16  # also what is lost before the place where a file is cut short
_PARQUET_ROWS = 64  # StarCoderData's rows reach a MB


@dataclass(frozen=True)
class SourceFormat:
    """Where a corpus keeps its text, and which of its subsets are wanted.

    A record's subset is what its metadata says under `subset_field`; where a corpus has no such field, a file's subset
    is its folder. `subsets` are the chosen ones, None for all but `excluded`.
    """

    text_field: str = "text"
    subset_field: str | None = None
    subsets: frozenset[str] | None = None
    excluded: frozenset[str] = frozenset()

    def wants(self, subset: str | None) -> bool:
        return subset not in self.excluded if self.subsets is None else subset in self.subsets

    @property
    def expected_columns(self) -> str:
        """What `columns` looks for, for error messages."""
        return repr(self.text_field)

    def columns(self, present: Sequence[str]) -> list[str]:
        """Which columns of a parquet file are read; none where it has not what is needed."""
        if self.text_field not in present:
            return []
        return [self.text_field] + (["meta"] if self.subset_field is not None and "meta" in present else [])

    def record(self, raw: object, place: str) -> "Record":
        """What a record of a file holds, or why there is nothing to train on; `place` names it."""
        text = raw.get(self.text_field) if isinstance(raw, dict) else None
        if not isinstance(raw, dict) or not isinstance(text, str):
            return Record(fault=f"{place}: expected a record with a text under {self.text_field!r}")
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
            return Record(fault=f"{place}: a lone surrogate at character {error.start} of {self.text_field!r}")
        if not text:
            return Record(rejected="empty text")
        if self.subset_field is not None:
            meta = raw.get("meta")
            subset = meta.get(self.subset_field) if isinstance(meta, dict) else None
            if not self.wants(subset):
                return Record(rejected=f"subset {subset}")
        return Record(text, size)

    def to_dict(self) -> dict:
        return asdict(self) | {
            "subsets": None if self.subsets is None else sorted(self.subsets),
            "excluded": sorted(self.excluded),
        }

    @staticmethod
    def from_dict(raw: dict) -> "SourceFormat":
        subsets = None if raw["subsets"] is None else frozenset(raw["subsets"])
        return SourceFormat(raw["text_field"], raw["subset_field"], subsets, frozenset(raw["excluded"]))


SLIMPAJAMA_SUBSETS = tuple(
    f"RedPajama{name}" for name in ("CommonCrawl", "C4", "Github", "Book", "ArXiv", "Wikipedia", "StackExchange")
)
# SlimPajama's GitHub part is left out because StarCoderData brings the code (TinyLlama paper, section 2.1).
SOURCES: dict[str, SourceFormat] = {
    "slimpajama": SourceFormat("text", "redpajama_set_name", excluded=frozenset({"RedPajamaGithub"})),
    "starcoderdata": SourceFormat("content"),
    "proof-pile-2": SourceFormat("text"),
    "skypile": SourceFormat("text"),
}


def source_format(name: str, text_field: str | None = None, subsets: list[str] | None = None) -> SourceFormat:
    """The format of a published corpus by its name; any other name is a corpus of the user's own.

    Raises `Refusal` for a subset that SlimPajama has not; those of other corpora are folders, which `find_inputs` sees.
    """
    known = SOURCES.get(name, SourceFormat())
    for subset in subsets or []:
        if known.subset_field and subset not in SLIMPAJAMA_SUBSETS:
            raise Refusal(f"{name}: has no subset {subset!r}; its subsets are {', '.join(SLIMPAJAMA_SUBSETS)}")
    chosen = frozenset(subsets) if subsets else None
    return SourceFormat(text_field or known.text_field, known.subset_field, chosen, known.excluded)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class Record:
    """One record of a file: a text to train on or the turns of a conversation, or why there is neither.

    `rejected` is a reason by rule (an unwanted subset, an empty text); `fault` is a place and what is wrong there.
    """

    text: str = ""
    text_bytes: int = 0
    rejected: str | None = None
    fault: str | None = None
    messages: tuple["Message", ...] = ()
    shortened: str | None = None  # what was left out of a conversation


def find_inputs(directory: Path, fmt: SourceFormat) -> dict[str, list[Path]]:
    """The readable files below a directory (or the one file named) by split, sorted so that no order is the disk's.

    A file belongs to the split whose name is a folder on its path, wherever it stands (`train/chunk1/`,
    `arxiv/train/`), else to `train`. Raises `Refusal` where nothing is found, or a chosen subset has no folder.
    """
    if not directory.exists():
        raise Refusal(f"{directory}: the input is missing")
    if directory.is_file():
        return {"train": [directory]}
    found = [path for path in directory.rglob("*") if path.name.endswith(tuple(READERS)) and path.is_file()]
    if fmt.subset_field is None and fmt.subsets is not None:
        found = _select_folders(directory, found, fmt.subsets)
    if not found:
        raise Refusal(f"{directory}: holds no file of a known kind; expected one of {', '.join(READERS)}")
    splits = {path: _split_of(path.relative_to(directory)) for path in found}
    return {
        split: sorted(path for path in found if splits[path] == split) for split in SPLITS if split in splits.values()
    }


def count_other_files(directory: Path) -> int:
    """How many files below a directory are of no kind that is read."""
    known = tuple(READERS)
    return sum(path.is_file() and not path.name.endswith(known) for path in directory.rglob("*"))


def _select_folders(directory: Path, paths: list[Path], subsets: frozenset[str]) -> list[Path]:
    folder_of = {path: _folder_of(path.relative_to(directory)) for path in paths}
    unknown = sorted(subsets - set(folder_of.values()))
    if unknown:
        folders = ", ".join(sorted(set(folder_of.values()) - {""}))
        raise Refusal(f"{directory}: has no subset {unknown[0]!r}; its folders are {folders}")
    return [path for path in paths if folder_of[path] in subsets]


def _folder_of(relative: Path) -> str:
    return next((part for part in relative.parts[:-1] if part not in SPLITS), "")


def _split_of(relative: Path) -> str:
    return next((part for part in relative.parts[:-1] if part in SPLITS), "train")


def read_texts(path: Path, fmt: SourceFormat) -> Iterator[str]:
    """The texts of one file; raises `Refusal` at the first fault."""
    for record in read_records(path, fmt):
        if record.fault:
            raise Refusal(record.fault)
        if not record.rejected:
            yield record.text


def read_records(path: Path, fmt: SourceFormat) -> Iterator[Record]:
    """All records of one file, in order, in flat memory. What damages a whole file is its last record's fault."""
    reader = next((reader for suffix, reader in READERS.items() if path.name.endswith(suffix)), None)
    if reader is None:
        raise Refusal(f"{path}: unknown kind of file; expected one of {', '.join(READERS)}")
    try:
        if path.stat().st_size == 0:
            yield Record(fault=f"{path}: the file is empty")
        else:
            yield from reader(path, fmt)
    except (OSError, pyarrow.ArrowException) as error:
        yield Record(fault=f"{path}: the file is damaged or cut short ({error})")


def _read_jsonl(compression: str | None, path: Path, fmt: SourceFormat) -> Iterator[Record]:
    # Arrow reads all frames of a file and reports one that is cut short; python-zstandard takes that for the end.
    with io.BufferedReader(pyarrow.input_stream(path, compression=compression), _READ_BYTES) as file:
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield _parse(line, fmt, f"{path}:{number}")


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines; one that is too long comes cut at a byte past the limit, and its rest is passed over."""
    while line := file.readline(MAX_DOCUMENT_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_DOCUMENT_BYTES + 1)


def _parse(line: bytes, fmt: SourceFormat, place: str) -> Record:
    if len(line) > MAX_DOCUMENT_BYTES:
        return Record(fault=f"{place}: the line is longer than {MAX_DOCUMENT_BYTES:,} bytes")
    try:
        raw = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # ValueError covers invalid UTF-8
        return Record(fault=f"{place}: not a line of JSON in UTF-8 ({error})")
    return fmt.record(raw, place)


def _read_parquet(path: Path, fmt: SourceFormat) -> Iterator[Record]:
    # Without these two a row group, which may be the whole file, is read at once.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_READ_BYTES) as file:
        names = file.schema_arrow.names
        columns = fmt.columns(names)
        if not columns:
            yield Record(fault=f"{path}: has no column {fmt.expected_columns}; it has {', '.join(names)}")
            return
        row = 0
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for values in zip(*(batch.column(name) for name in columns), strict=True):
                row += 1
                yield _parse_row(dict(zip(columns, values, strict=True)), fmt, f"{path}: row {row}")


def _parse_row(row: dict[str, pyarrow.Scalar], fmt: SourceFormat, place: str) -> Record:
    try:
        return fmt.record({name: value.as_py() for name, value in row.items()}, place)
    except UnicodeDecodeError as error:
        return Record(fault=f"{place}: not UTF-8 at byte {error.start}")


def _read_text(path: Path, fmt: SourceFormat) -> Iterator[Record]:
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        yield Record(fault=f"{path}: is one document of more than {MAX_DOCUMENT_BYTES:,} bytes")
        return
    try:
        yield fmt.record({fmt.text_field: path.read_bytes().decode()}, str(path))
    except UnicodeDecodeError as error:
        yield Record(fault=f"{path}: not UTF-8 at byte {error.start}")


READERS: dict[str, Callable[[Path, SourceFormat], Iterator[Record]]] = {
    ".jsonl.zst": partial(_read_jsonl, "zstd"),
    ".jsonl.gz": partial(_read_jsonl, "gzip"),
    ".jsonl": partial(_read_jsonl, None),
    ".parquet": _read_parquet,
    ".txt": _read_text,
}
