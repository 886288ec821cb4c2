"""Damaged forms of a file that is right, by chance: what power losses, editors and other programs make of it.

    @given(content=mutations(VALID))
    def test_a_damaged_one_is_rejected(content: bytes) -> None:
        returns_or_refuses(read_it, content, "it.json")

60 of them for each test, with --all-faults 2,000; the same ones in every run.
"""

import json
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tinyllama_ds.errors import ConfigError

FEW, MANY = 60, 2000
# Values as text, because JSON libraries write neither of some: other types, ends of ranges, what parsers trip over.
ODD_VALUES = [
    *("null", "true", "false", "0", "-1", "1", "0.5", "-0.0", "NaN", "Infinity", "-Infinity", "1e999", "1e9", "1e-320"),
    *("2147483648", "-9223372036854775809", "18446744073709551616", "9" * 400, "9" * 5000, "0x10", "1_000", "007"),
    *('""', '" "', '"0"', '"x"', '"NaN"', '"../.."', '"\\u0000"', '"\\ud800"', '"\\ufeff"', '"' + "a" * 9000 + '"'),
    *("[]", "{}", "[[]]", "[null]", "[1, 2]", '{"": null}', '{"a": {"a": 1}}', '{"a": 1, "a": 2}', '["x"]'),
    *("[" * 3000, "[" * 100_000, '{"a":' * 2000, "[" * 900 + "]" * 900, "undefined", "'x'", "// x", ""),
]
_ODD_BYTES = [b"\0", b"\0" * 64, b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b"\x1a", b"\\", b'"', b"}"]
_TOKEN = re.compile(rb'"[^"\n]*"|[\w.+-]+|\S')
_ODD = "\N{REPLACEMENT CHARACTER}odd\N{REPLACEMENT CHARACTER}"


def pytest_configure(config: pytest.Config) -> None:
    count = MANY if config.getoption("--all-faults") else FEW
    settings.register_profile(
        "mutations",
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("mutations")


def mutations(content: bytes) -> st.SearchStrategy[bytes]:
    """Damaged forms of what a file holds: of its bytes, of its words, and where it is JSON of any of its values."""
    kinds = [_other_bytes(content), _other_words(content)]
    with suppress(ValueError):
        kinds.append(_other_values(json.loads(content)))
    return st.one_of(kinds)


def returns_or_refuses(read: Callable[[Path], object], content: bytes, name: str) -> None:
    """Call `read` with a file of this content: it returns, or refuses in one sentence, and leaves the file alone."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            read(path)
        except ConfigError as error:
            sentence = str(error)
            assert name in sentence
            assert "\n" not in sentence
            assert len(sentence) < 2000
        assert path.read_bytes() == content
        assert [path.name for path in Path(folder).iterdir()] == [name]


@st.composite
def _other_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut short, overwritten, in another encoding, or with a piece taken out, put in or twice."""
    start, end = sorted((_place(draw, content), _place(draw, content)))
    before, piece, after = content[:start], content[start:end], content[end:]
    return draw(
        st.sampled_from(
            [
                before,
                after,
                before + after,
                before + piece + piece + after,
                before + bytes(len(piece)) + after,
                bytes(len(content)),
                before + draw(st.sampled_from(_ODD_BYTES)) + piece + after,
                before + draw(st.binary(min_size=1, max_size=16)) + after,
                _flip(draw, content),
                content.decode("latin-1").encode("utf-16"),
                b"\xef\xbb\xbf" + content,
                content.replace(b"\n", b"\r\n"),
            ]
        )
    )


def _place(draw: st.DrawFn, content: bytes) -> int:
    return draw(st.integers(0, len(content)))


def _flip(draw: st.DrawFn, content: bytes) -> bytes:
    place = draw(st.integers(0, max(0, len(content) - 1)))
    return (
        content[:place]
        + bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in content[place : place + 1])
        + (content[place + 1 :])
    )


@st.composite
def _other_words(draw: st.DrawFn, content: bytes) -> bytes:
    """One or two words, numbers or signs replaced by an odd one or by another of the file."""
    for _ in range(draw(st.integers(1, 2))):
        words = list(_TOKEN.finditer(content))
        if not words:
            break
        word = draw(st.sampled_from(words))
        instead = draw(st.sampled_from([text.encode() for text in ODD_VALUES] + [other[0] for other in words]))
        content = content[: word.start()] + instead + content[word.end() :]
    return content


@st.composite
def _other_values(draw: st.DrawFn, valid: object) -> bytes:
    """One value at any depth replaced, left out, under another name, or beside one more."""
    copy = [json.loads(json.dumps(valid))]
    container, key = draw(st.sampled_from(list(_places(copy))))
    change = draw(st.sampled_from(["replace", "replace", "replace", "leave out", "rename", "add"]))
    if change == "replace" or (container is copy and change != "add"):
        container[key] = _ODD
    elif change == "leave out":
        del container[key]
    elif isinstance(container, dict) and change == "rename":
        container[f"{key}_"] = container.pop(key)
    elif isinstance(container[key], dict):
        container[key][draw(st.sampled_from(["", "x", "\0", "type", "__class__"]))] = _ODD
    elif isinstance(container[key], list):
        container[key].append(_ODD)
    text = json.dumps(copy[0], indent=draw(st.sampled_from([None, 1])))
    return text.replace(json.dumps(_ODD), draw(st.sampled_from(ODD_VALUES))).encode()


def _places(container: list | dict) -> list[tuple[list | dict, int | str]]:
    """Every value, as what holds it and where."""
    entries = container.items() if isinstance(container, dict) else enumerate(container)
    found: list = []
    for key, value in entries:
        found.append((container, key))
        if isinstance(value, list | dict):
            found += _places(value)
    return found
