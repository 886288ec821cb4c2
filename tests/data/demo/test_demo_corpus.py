"""The demo corpus, from a small made-up library."""

import itertools
import re
from pathlib import Path

import pytest

from tinyllama_ds.data.demo.chinese import chinese_number, chinese_pages
from tinyllama_ds.data.demo.corpus import make_demo_corpus
from tinyllama_ds.data.prepare.inputs import find_inputs
from tinyllama_ds.data.prepare.reading import read_texts
from tinyllama_ds.data.prepare.sources import source_format


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("library")
    for number in range(150):
        package = root / f"package{number % 7}"
        package.mkdir(exist_ok=True)
        docstring = f"What module {number} explains at some length. " * 8
        (package / f"module{number}.py").write_text(f'"""{docstring}"""\n\nVALUE = {number}\n')
    (root / "site-packages").mkdir()
    (root / "site-packages" / "third_party.py").write_text("SECRET = 'site-packages'\n")
    (root / "broken.py").write_text("def broken(:\n")
    (root / "latin1.py").write_bytes(b"# caf\xe9\n")
    return root


def texts_of(root: Path, source: str, split: str) -> list[str]:
    fmt = source_format(source)
    return [text for path in find_inputs(root / source, fmt).splits[split] for text in read_texts(path, fmt)]


def test_both_sources_are_written_as_published(tmp_path: Path, library: Path):
    made = make_demo_corpus(tmp_path, library, max_bytes=2_000_000)
    for source in ("slimpajama", "starcoderdata"):
        splits = {split: texts_of(tmp_path, source, split) for split in ("train", "validation")}
        assert {f"{split} documents": len(texts) for split, texts in splits.items()}.items() <= made[source].items()
        assert sum(len(text.encode()) for texts in splits.values() for text in texts) == made[source]["bytes"]
    code = texts_of(tmp_path, "starcoderdata", "train") + texts_of(tmp_path, "starcoderdata", "validation")
    assert "def broken(:\n" in code
    assert not any("site-packages" in text for text in code)
    prose = texts_of(tmp_path, "slimpajama", "train") + texts_of(tmp_path, "slimpajama", "validation")
    assert sum("explains at some length" in text for text in prose) == 150


def test_the_stand_ins_for_v1_1_are_written_as_published(tmp_path: Path, library: Path):
    sources = ["proof-pile-2", "skypile"]
    made = make_demo_corpus(tmp_path, library, max_bytes=200_000, sources=sources)
    assert list(made) == sources
    for source in sources:
        splits = {split: texts_of(tmp_path, source, split) for split in ("train", "validation")}
        assert {f"{split} documents": len(texts) for split, texts in splits.items()}.items() <= made[source].items()
        assert all(splits.values())
    assert {path.name for path in (tmp_path / "proof-pile-2").iterdir()} == {"open-web-math", "algebraic-stack"}
    held_out = texts_of(tmp_path, "proof-pile-2", "validation")
    prose, code = ([text for text in held_out if text.startswith('"""') == is_code] for is_code in (False, True))
    assert {text.strip() for text in prose} == {text.split('"""')[1].strip() for text in code}, "a module as a whole"


def test_numbers_are_in_two_folders_and_their_prose_in_one_split(tmp_path: Path):
    library = tmp_path / "library"
    library.mkdir()
    for number in range(150):
        letters = "".join("abcdefghij"[int(digit)] for digit in str(number))
        lines = "\n".join(f"{word} of module {letters} is a line" for word in ("first", "second", "third"))
        (library / f"module{number}.py").write_text(f'"""{lines * 4}"""\n')
    made = make_demo_corpus(tmp_path, library, sources=["numbers"])
    assert list(made) == ["numbers"]
    assert {path.name for path in (tmp_path / "numbers").iterdir()} == {"short", "in-prose"}
    lines = {split: set(re.findall("of module [a-j]+ ", "".join(texts_of(tmp_path, "numbers", split)))) for split in
             ("train", "validation")}  # fmt: skip
    assert all(lines.values())
    assert not lines["train"] & lines["validation"]


def test_chinese_numbers_are_read_as_they_are_written():
    words = {0: "零", 7: "七", 10: "十", 15: "十五", 20: "二十", 110: "一百一十", 205: "二百零五", 1000: "一千",
             1001: "一千零一", 1010: "一千零一十", 1200: "一千二百", 9999: "九千九百九十九"}  # fmt: skip
    assert {number: chinese_number(number) for number in words} == words
    assert len({chinese_number(number) for number in range(10_000)}) == 10_000


def test_chinese_pages_are_the_same_in_every_call_and_true():
    first, second = (list(itertools.islice(chinese_pages(), 3)) for _ in range(2))
    assert first == second
    text = "".join(first).replace("\n", "")
    numbers = {chinese_number(number): number for number in range(10_000)}
    sums = re.findall(r"(?<![^。])([^，。]+)加([^，。]+)等于([^，。]+)。", text)
    comparisons = re.findall(r"(?<![^。])([^，。]+)大于([^，。]+)，", text)
    assert min(len(sums), len(comparisons)) > 5
    assert all(numbers[a] + numbers[b] == numbers[c] for a, b, c in sums)
    assert all(numbers[a] > numbers[b] for a, b in comparisons)


def test_a_module_is_held_out_as_a_whole(tmp_path: Path, library: Path):
    make_demo_corpus(tmp_path, library, max_bytes=2_000_000)
    held_out_code = texts_of(tmp_path, "starcoderdata", "validation")
    held_out_prose = "\n".join(texts_of(tmp_path, "slimpajama", "validation"))
    assert held_out_code
    for text in held_out_code:
        if text.startswith('"""'):
            assert text.split('"""')[1].strip() in held_out_prose


def test_the_corpus_is_deterministic_and_stops_at_its_size(tmp_path: Path, library: Path):
    first = make_demo_corpus(tmp_path / "a", library, max_bytes=10_000)
    assert make_demo_corpus(tmp_path / "b", library, max_bytes=10_000) == first
    assert all(0 < counts["bytes"] <= 10_000 for counts in first.values())
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert all((tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes() for path in files)


def test_what_is_there_is_left_alone(tmp_path: Path, library: Path):
    (tmp_path / "slimpajama").mkdir()
    assert list(make_demo_corpus(tmp_path, library, max_bytes=10_000)) == ["starcoderdata"]
    assert make_demo_corpus(tmp_path, library, max_bytes=10_000) == {}
    assert list((tmp_path / "slimpajama").iterdir()) == []
