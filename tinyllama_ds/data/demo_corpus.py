"""A demo corpus made from the Python installation itself: nothing is downloaded, nothing of it is executed.

Prose (pydoc's topics and docstrings) is written as SlimPajama is published, code (the standard library's sources) as
StarCoderData is. A module is held out whole, its docstrings and its source together, so that no validation text was
seen in training under another name.
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard
from tqdm import tqdm

PROSE_PACKAGES = ("numpy", "torch", "transformers")
FILES_PER_SPLIT = {"train": 4, "validation": 1}
MAX_BYTES_PER_SOURCE = 16_000_000
_HELD_OUT_PERCENT = 4
_MIN_DOCSTRING = 200  # characters; shorter ones are one-liners, not prose


@dataclass(frozen=True)
class Document:
    module: str  # decides the split
    path: str
    text: str


_Writer = Callable[[Path, str, int, list[Document]], None]


def make_demo_corpus(output: Path) -> dict[str, dict[str, int]]:
    """Write `output/slimpajama` and `output/starcoderdata`; returns documents and bytes by source and split.

    A source that is already there is left alone.
    """
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sources = list(_stdlib_files(stdlib))
    documents = {
        "slimpajama": (lambda: _prose(stdlib, sources), _write_slimpajama),
        "starcoderdata": (lambda: _code(stdlib, sources), _write_starcoderdata),
    }
    return {
        name: _write_source(output / name, collect(), write)
        for name, (collect, write) in documents.items()
        if not (output / name).exists()
    }


def _stdlib_files(stdlib: Path) -> Iterator[Path]:
    """Sources of the standard library, without third-party packages and the test suite's deliberately broken files."""
    for path in sorted(stdlib.rglob("*.py")):
        if not {"site-packages", "lib2to3", "__pycache__"} & set(path.relative_to(stdlib).parts):
            yield path


def _code(stdlib: Path, sources: list[Path]) -> Iterator[Document]:
    for path in tqdm(sources, desc="demo code", unit="file", leave=False):
        text = _read(path)
        if text.strip():
            yield Document(_module(stdlib, path), str(path.relative_to(stdlib)), text)


def _prose(stdlib: Path, sources: list[Path]) -> Iterator[Document]:
    yield from _pydoc_topics()
    files = [(stdlib, path) for path in sources]
    for package in PROSE_PACKAGES:
        spec = find_spec(package)
        if spec is not None and spec.origin is not None:
            root = Path(spec.origin).parent
            files += [(root.parent, path) for path in sorted(root.rglob("*.py"))]
    seen: set[bytes] = set()
    for root, path in tqdm(files, desc="demo prose", unit="file", leave=False):
        docstrings = [text for text in _docstrings(_read(path)) if _is_new(text, seen)]
        if docstrings:
            yield Document(_module(root, path), str(path.relative_to(root)), "\n\n".join(docstrings))


def _pydoc_topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"pydoc/{name}", f"pydoc/{name}", topics[name])


def _docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _MIN_DOCSTRING:
                yield text


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return ""


def _module(root: Path, path: Path) -> str:
    """The top-level folder of a package and the file's stem: twins such as `x.py` and `test_x.py` share a split."""
    relative = path.relative_to(root)
    return f"{relative.parts[0]}/{relative.stem.removeprefix('test_')}"


def _is_new(text: str, seen: set[bytes]) -> bool:
    key = hashlib.sha256(" ".join(text.split()).encode()).digest()
    is_new = key not in seen
    seen.add(key)
    return is_new


def _is_held_out(document: Document) -> bool:
    return int.from_bytes(hashlib.sha256(document.module.encode()).digest()[:8], "little") % 100 < _HELD_OUT_PERCENT


def _write_source(root: Path, documents: Iterable[Document], write: _Writer) -> dict[str, int]:
    splits: dict[str, list[Document]] = {"train": [], "validation": []}
    seen: set[bytes] = set()
    total = 0
    for document in documents:
        size = len(document.text.encode())
        if total + size <= MAX_BYTES_PER_SOURCE and _is_new(document.text, seen):
            splits["validation" if _is_held_out(document) else "train"].append(document)
            total += size
    partial = root.with_name(f".{root.name}.partial")
    for split, held in splits.items():
        for number in range(FILES_PER_SPLIT[split]):
            write(partial / split, split, number, held[number :: FILES_PER_SPLIT[split]])
    partial.rename(root)
    return {"bytes": total} | {f"{split} documents": len(held) for split, held in splits.items()}


def _write_slimpajama(directory: Path, split: str, number: int, documents: list[Document]) -> None:
    folder = directory / f"chunk{number + 1}"
    folder.mkdir(parents=True, exist_ok=True)
    with zstandard.open(folder / f"example_{split}_0.jsonl.zst", "wt", encoding="utf-8") as file:
        for document in documents:
            record = {"text": document.text, "meta": {"redpajama_set_name": "RedPajamaCommonCrawl"}}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _write_starcoderdata(directory: Path, split: str, number: int, documents: list[Document]) -> None:
    folder = directory / "python"
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "max_stars_repo_path": [document.path for document in documents],
        "max_stars_repo_name": ["python/cpython"] * len(documents),
        "max_stars_count": [0] * len(documents),
        "id": [str(index) for index in range(len(documents))],
        "content": [document.text for document in documents],
    }
    name = f"train-{number:05d}-of-{FILES_PER_SPLIT[split]:05d}.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / name)
