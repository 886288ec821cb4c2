"""A file gets no progress bar, but a line a minute; a terminal gets the bar."""

import ast
import io
import sys
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from tqdm import tqdm

from tinyllama_ds.bars import ProgressLines, bars_as_lines, progress

ROOT = Path(__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_file_gets_a_line_a_minute_and_one_at_the_end() -> None:
    file, clock = io.StringIO(), Clock()
    with tqdm(total=10, desc="work", unit="shard", file=ProgressLines(file, clock), mininterval=0, miniters=1) as bar:
        for clock.seconds in (10, 20, 59, 61, 70, 120, 122, 130, 140, 150):
            bar.update()
    lines = file.getvalue().splitlines()
    assert [line.split("[")[0] for line in lines] == ["work: 40% 4/10 ", "work: 70% 7/10 ", "work: 100% 10/10 "]
    assert all("shard/s]" in line and "<" in line for line in lines)
    assert "\r" not in file.getvalue()
    assert "|" not in file.getvalue()


@pytest.mark.parametrize("name", ["", "work: "])
def test_the_end_after_a_minute_is_one_line(name: str) -> None:
    file, clock = io.StringIO(), Clock()
    with tqdm(total=2, desc=name.rstrip(": "), file=ProgressLines(file, clock), mininterval=0, miniters=1) as bar:
        for clock.seconds in (61, 122):
            bar.update()
    assert [line.split("[")[0] for line in file.getvalue().splitlines()] == [f"{name}50% 1/2 ", f"{name}100% 2/2 "]


def test_a_bar_that_does_not_stay_leaves_no_line() -> None:
    file = io.StringIO()
    with progress(total=3, file=file, leave=False) as bar:
        bar.update(3)
    assert file.getvalue() == ""


def test_a_terminal_gets_the_bar() -> None:
    terminal = Terminal()
    with progress(total=3, file=terminal, mininterval=0) as bar:
        bar.update(3)
    assert "\r" in terminal.getvalue()
    assert "100%|" in terminal.getvalue()


def test_bars_of_libraries_and_other_text() -> None:
    file = io.StringIO()
    with redirect_stderr(file), bars_as_lines():
        for _ in tqdm(range(3), desc="outer", leave=False):
            for _ in tqdm(range(2), desc="inner"):
                print("a word", "another", file=sys.stderr)
    assert "\r" not in file.getvalue()
    lines = [line.split("[")[0] for line in file.getvalue().splitlines()]
    assert lines.count("a word another") == 6
    assert set(lines) <= {"a word another", "inner: 100% 2/2 ", ""}


@pytest.mark.parametrize("folder", ["tinyllama_ds", "scripts", "benchmarks"])
def test_all_bars_are_made_in_one_place(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom) and "tqdm" in ast.unparse(node)
            for alias in node.names
        }
        assert not names or path.name == "bars.py", path
