"""A demo corpus made from the Python installation itself, without downloads and without executing any of it.

Prose (pydoc's topics and docstrings) is written in the format of SlimPajama, code (the standard library's sources) of
StarCoderData, mathematics (docstrings and sources of sympy and mpmath, on which torch depends) of Proof-Pile-2, and the
sentences of a small Chinese grammar (`chinese.py`) of SkyPile. Splits are by module, docstrings and source together, so
that validation text is never in the training data under a different name. Texts of numbers (`numbers.py`) are published
nowhere; they are for the rehearsal of a longer context.
"""

import ast
import hashlib
import json
import multiprocessing
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pyarrow
import pyarrow.parquet

from tinyllama_ds.bars import progress
from tinyllama_ds.data.demo.chinese import chinese_pages
from tinyllama_ds.data.demo.numbers import short_texts, texts_with_prose
from tinyllama_ds.outputs import new_folder

PROSE_PACKAGES = ("numpy", "torch", "transformers")
MATHEMATICS_PACKAGES = ("sympy", "mpmath")
DEMO_SOURCES = ("slimpajama", "starcoderdata", "proof-pile-2", "skypile", "numbers")
FILES_PER_SPLIT = {"train": 4, "validation": 1}
_FILE_NAMES = {  # as published; SkyPile has no held-out part
    "slimpajama": "{split}/chunk{chunk}/example_{split}_0.jsonl.zst",
    "starcoderdata": "{split}/python/train-{number:05d}-of-{files:05d}.parquet",
    "proof-pile-2": "{subset}/{split}/part{number:04d}.jsonl.zst",
    "skypile": "{folder}/part_{number:04d}.jsonl",
    "numbers": "{subset}/{split}/part_{number:04d}.jsonl",
}
_NUMBERS = {"short": short_texts, "in-prose": texts_with_prose}
_SUBSETS = {"proof-pile-2": ("open-web-math", "algebraic-stack"), "numbers": tuple(_NUMBERS)}
MAX_BYTES_PER_SOURCE = 8_000_000
_HELD_OUT_PERCENT = 4
_MIN_DOCSTRING = 200  # characters; shorter ones are one-liners, not prose


@dataclass(frozen=True)
class Document:
    module: str  # decides the split
    path: str
    text: str
    subset: str = ""  # the folder that it lies in


def make_demo_corpus(
    output: Path,
    code_root: Path | None = None,
    max_bytes: int = MAX_BYTES_PER_SOURCE,
    sources: Sequence[str] = DEMO_SOURCES[:2],
) -> dict[str, dict[str, int]]:
    """Write `output/<source>` for each of some `DEMO_SOURCES`; returns documents and bytes by source and split.

    All but the Chinese come from the Python sources below `code_root` (default: the standard library, for prose also
    `PROSE_PACKAGES`, for mathematics `MATHEMATICS_PACKAGES`), each up to `max_bytes`. A source that exists already is
    kept.
    """
    stdlib = code_root or Path(sysconfig.get_paths()["stdlib"])
    # Packages come first, because their docstrings are the longest.
    prose = [stdlib] if code_root else [*_package_roots(PROSE_PACKAGES), stdlib]
    mathematics = [stdlib] if code_root else list(_package_roots(MATHEMATICS_PACKAGES))
    collections = {
        "slimpajama": _prose(prose),
        "starcoderdata": _code(stdlib),
        "proof-pile-2": _mathematics(mathematics),
        "skypile": _chinese(),
        "numbers": _numbers(_prose(prose)),
    }
    return {
        name: _write_source(output / name, documents, max_bytes)
        for name, documents in collections.items()
        if name in sources and not (output / name).exists()
    }


def _package_roots(packages: Sequence[str]) -> Iterator[Path]:
    for package in packages:
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            yield Path(spec.origin).parent


def python_files(root: Path) -> list[Path]:
    """Python files, without third-party packages, deliberately broken files, and pydoc's topics, which are prose."""
    excluded = {"site-packages", "lib2to3", "pydoc_data", "__pycache__"}
    return [path for path in sorted(root.rglob("*.py")) if not excluded & set(path.relative_to(root).parts)]


def _code(root: Path) -> Iterator[Document]:
    for path in python_files(root):
        text = read_source(path)
        if text.strip():
            yield Document(_module(root, path), str(path.relative_to(root)), text)


def _prose(roots: list[Path]) -> Iterator[Document]:
    """pydoc's topics, then the docstrings of modules."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"pydoc/{name}", f"pydoc/{name}", topics[name])
    files = [(root, path) for root in roots for path in python_files(root)]
    for root, path, text in _with_docstrings(files):
        if text:
            yield Document(_module(root, path), f"{root.name}/{path.relative_to(root)}", text)


def _mathematics(roots: list[Path]) -> Iterator[Document]:
    """The docstrings of a module as a web page, its source as code of the algebraic stack."""
    files = [(root, path) for root in roots for path in python_files(root) if "tests" not in path.parts]
    for root, path, text in _with_docstrings(files):
        module, place = _module(root, path), f"{root.name}/{path.relative_to(root)}"
        if text:
            yield Document(module, place, text, "open-web-math")
        if source := read_source(path):
            yield Document(module, place, source, "algebraic-stack")


def _chinese() -> Iterator[Document]:
    for number, page in enumerate(chinese_pages()):
        yield Document(f"skypile/{number}", f"page {number}", page)


def _numbers(documents: Iterable[Document]) -> Iterator[Document]:
    for document in documents:
        for subset, texts_of in _NUMBERS.items():
            for text in texts_of(document.text):
                yield Document(document.module, document.path, text, subset)


def _with_docstrings(files: list[tuple[Path, Path]]) -> Iterator[tuple[Path, Path, str]]:
    """Each (root, file) with its long docstrings, without those of files before it."""
    seen: set[bytes] = set()
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        docstrings_of = pool.imap(_docstrings, [path for _, path in files], chunksize=32)
        for (root, path), docstrings in zip(files, docstrings_of, strict=True):
            yield root, path, "\n\n".join(docstring for docstring in docstrings if _is_new(docstring, seen))


def _docstrings(path: Path) -> list[str]:
    """The long docstrings of a file, in order; none where it is not valid Python."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(parse_source(path)) if isinstance(node, kinds)]
    return [text for text in found if text and len(text) >= _MIN_DOCSTRING]


def parse_source(path: Path) -> ast.Module:
    """The syntax tree of a source file; an empty one where it is not valid Python."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about invalid escapes in strings
            return ast.parse(read_source(path))
    except (SyntaxError, ValueError, RecursionError):
        return ast.Module([], [])


def read_source(path: Path) -> str:
    """The text of a source file; none where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _module(root: Path, path: Path) -> str:
    """The top-level folder of a package and the file's stem: `x.py` and `test_x.py` share a split."""
    relative = path.relative_to(root)
    return f"{relative.parts[0]}/{relative.stem.removeprefix('test_')}"


def _is_new(text: str, seen: set[bytes]) -> bool:
    key = hashlib.sha256(" ".join(text.split()).encode()).digest()
    is_new = key not in seen
    seen.add(key)
    return is_new


def is_held_out(module: str) -> bool:
    """Whether a module belongs to the validation split."""
    return int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "little") % 100 < _HELD_OUT_PERCENT


def _write_source(root: Path, documents: Iterable[Document], max_bytes: int) -> dict[str, int]:
    splits: dict[str, list[Document]] = {"train": [], "validation": []}
    seen: set[bytes] = set()
    total = 0
    with progress(total=max_bytes, desc=f"demo {root.name}", unit="B", unit_scale=True, leave=False) as bar:
        for document in documents:
            size = len(document.text.encode())
            if total + size > max_bytes:
                break
            if _is_new(document.text, seen):
                splits["validation" if is_held_out(document.module) else "train"].append(document)
                total += size
                bar.update(size)
    with new_folder(root) as folder:
        for split, held in splits.items():
            for number, subset in product(range(FILES_PER_SPLIT[split]), _SUBSETS.get(root.name, [""])):
                chosen = [document for document in held[number :: FILES_PER_SPLIT[split]] if document.subset == subset]
                name = _FILE_NAMES[root.name].format(
                    split=split,
                    folder="data" if split == "train" else split,
                    subset=subset,
                    number=number,
                    chunk=number + 1,
                    files=FILES_PER_SPLIT[split],
                )
                write_columns(folder / name, _columns(root.name, chosen))
    return {"bytes": total} | {f"{split} documents": len(held) for split, held in splits.items()}


def _columns(source: str, documents: list[Document]) -> dict[str, list]:
    """The fields of the documents as the published corpus has them."""
    texts, paths = [document.text for document in documents], [document.path for document in documents]
    match source:
        case "slimpajama":
            return {"text": texts, "meta": [{"redpajama_set_name": "RedPajamaCommonCrawl"}] * len(texts)}
        case "starcoderdata":
            return {
                "max_stars_repo_path": paths,
                "max_stars_repo_name": ["python/cpython"] * len(texts),
                "max_stars_count": [0] * len(texts),
                "id": list(map(str, range(len(texts)))),
                "content": texts,
            }
        case "proof-pile-2":
            return {"text": texts, "meta": [{"path": path} for path in paths]}
        case _:
            return {"text": texts}


def write_columns(path: Path, columns: Mapping[str, list]) -> None:
    """Write records, given by column, as parquet or as JSON lines, by the suffix of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        return
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    with pyarrow.output_stream(path, compression="zstd" if path.suffix == ".zst" else None) as file:
        file.write(text)
