"""A demo chat corpus made from the Python installation: questions about functions and classes, answered by docstrings.

Written in all formats that are read: Guanaco's text and messages, JSON lines and parquet. Splits are by module.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from tinyllama_ds.data.demo.corpus import is_held_out, parse_source, python_files, write_columns
from tinyllama_ds.outputs import new_folder

SOURCE = "chat"
_EXCLUDED = {"test", "tests", "idlelib"}
_ANSWER_CHARACTERS = range(12, 160)
_QUESTIONS = {
    "function": ("What does {} do?", "What is {} for?", "Explain {}."),
    "class": ("What is {}?", "What is {} for?", "Explain {}."),
}

_Exchanges = list[str]  # question, answer, question, answer ...
_Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def make_demo_chat(output: Path, code_root: Path | None = None) -> dict[str, int]:
    """Write `output/chat`; returns the conversations by split, or nothing where it exists already.

    The questions are about the Python sources below `code_root` (default: the standard library).
    """
    root = output / SOURCE
    if root.exists():
        return {}
    splits: dict[str, list[_Exchanges]] = {"train": [], "validation": []}
    for module, exchanges in _conversations(code_root or Path(sysconfig.get_paths()["stdlib"])):
        splits["validation" if is_held_out(module) else "train"].append(exchanges)
    with new_folder(root) as folder:
        write_columns(folder / "train" / "guanaco.jsonl", {"text": [_guanaco(one) for one in splits["train"][::2]]})
        write_columns(
            folder / "train" / "messages.parquet", {"messages": [_messages(one) for one in splits["train"][1::2]]}
        )
        write_columns(
            folder / "validation" / "messages.jsonl", {"messages": [_messages(one) for one in splits["validation"]]}
        )
    return {f"{split} conversations": len(held) for split, held in splits.items()}


def _conversations(root: Path) -> Iterator[tuple[str, _Exchanges]]:
    for path in python_files(root):
        relative = path.relative_to(root)
        if _EXCLUDED & set(relative.parts):
            continue
        parts = relative.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        for name, kind, node in _documented(path):
            sentence = _first_sentence(ast.get_docstring(node) or "")
            if len(sentence) in _ANSWER_CHARACTERS:
                yield module, _exchanges(module, f"{module}.{name}", kind, sentence)


def _documented(path: Path) -> Iterator[tuple[str, str, _Documented]]:
    """The public functions, classes and methods of a file; none where it is not valid Python."""
    for node in parse_source(path).body:
        if isinstance(node, _Documented) and not node.name.startswith("_"):
            yield node.name, "class" if isinstance(node, ast.ClassDef) else "function", node
            for method in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", "function", method


def _first_sentence(docstring: str) -> str:
    text = " ".join(docstring.partition("\n\n")[0].split())
    return text.partition(". ")[0].rstrip(".:") + "." if text else ""


def _exchanges(module: str, name: str, kind: str, answer: str) -> _Exchanges:
    """One exchange, and for half of the names a second that refers to the first."""
    choice = hashlib.sha256(name.encode()).digest()
    questions = _QUESTIONS[kind]
    first = [questions[choice[0] % len(questions)].format(name), answer]
    return [*first, "Where is it defined?", f"In the module {module}."] if choice[1] % 2 else first


def _guanaco(exchanges: _Exchanges) -> str:
    turns = zip(cycle(("Human", "Assistant")), exchanges, strict=False)
    return "".join(f"### {speaker}: {text}" for speaker, text in turns)


def _messages(exchanges: _Exchanges) -> list[dict[str, str]]:
    turns = zip(cycle(("user", "assistant")), exchanges, strict=False)
    return [{"role": role, "content": text} for role, text in turns]
