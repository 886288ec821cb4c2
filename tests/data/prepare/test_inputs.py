"""Which files are input: splits by name, links, what is passed over and why."""

import os
import random
from pathlib import Path

import pytest
from corpora import write_jsonl

from tinyllama_ds.data.prepare.inputs import find_inputs
from tinyllama_ds.data.prepare.sources import SourceFormat, source_format
from tinyllama_ds.errors import ConfigError

PLAIN = SourceFormat()


def test_inputs_are_sorted_whatever_the_file_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("b/2.jsonl", "a/10.jsonl", "a/9.jsonl", "train/c.jsonl", "b/1.jsonl", "validation/v.jsonl"):
        write_jsonl(tmp_path / name, ["x"])
    expected = find_inputs(tmp_path, PLAIN)
    listing = os.listdir
    for seed in range(5):
        monkeypatch.setattr(
            os, "listdir", lambda folder, seed=seed: random.Random(seed).sample(names := listing(folder), len(names))
        )
        assert find_inputs(tmp_path, PLAIN) == expected
    assert [str(path.relative_to(tmp_path)) for path in expected.splits["train"]] == [
        "a/10.jsonl",
        "a/9.jsonl",
        "b/1.jsonl",
        "b/2.jsonl",
        "train/c.jsonl",
    ]


def test_files_next_to_the_split_folders_are_not_lost(tmp_path: Path):
    for name in ("train/a.jsonl", "validation/b.jsonl", "more/c.jsonl", "d.jsonl"):
        write_jsonl(tmp_path / name, ["x"])
    found = find_inputs(tmp_path, PLAIN)
    assert {split: [path.name for path in paths] for split, paths in found.splits.items()} == {
        "train": ["d.jsonl", "c.jsonl", "a.jsonl"],
        "validation": ["b.jsonl"],
    }


def test_one_file_can_be_named(tmp_path: Path):
    path = write_jsonl(tmp_path / "x.jsonl", ["x"])
    assert find_inputs(path, PLAIN).splits == {"train": [path]}


def test_files_that_are_not_read_are_named(tmp_path: Path):
    raw = tmp_path / "raw"
    for name in ("a.jsonl", "more/b.json", "more/c.jsonl.xz", "README.md", ".cache/a.jsonl", "._a.jsonl"):
        write_jsonl(raw / name, ["x"])
    os.mkfifo(raw / "pipe.jsonl")
    assert find_inputs(raw, PLAIN).notes() == [
        f"{raw}: not read, hidden: ._a.jsonl, .cache",
        f"{raw}: not read, unsupported file type: README.md, more/b.json, more/c.jsonl.xz",
        f"{raw}: not read, not a regular file: pipe.jsonl",
    ]


def test_nothing_to_read_is_rejected(tmp_path: Path):
    (tmp_path / "README.md").write_text("no corpus")
    with pytest.raises(ConfigError, match="holds no file of a known kind"):
        find_inputs(tmp_path, PLAIN)
    with pytest.raises(ConfigError, match="the input is missing"):
        find_inputs(tmp_path / "absent", PLAIN)


# --- splits by name ---------------------------------------------------------------------------------------------------

SPLIT_OF = {
    "train": [
        *(
            "data/train-00000-of-00001.parquet",
            "a.jsonl",
            "train/chunk1/example_train_0.jsonl.zst",
            "c4-train.0.json.gz",
        ),
        *("latest/contest.jsonl", "invalid.txt", "evaluator/a.jsonl", "developers/valley.txt", "x/retrain_01.jsonl"),
        *("my-training-corpus/a.jsonl", "train-test-split/a.jsonl", "2020-40_zh_head_0000.jsonl", "TRAIN.JSONL"),
    ],
    "validation": [
        *("data/validation-00000-of-00001.parquet", "valid/a.jsonl", "val/a.jsonl", "dev/a.jsonl", "eval/x/a.txt"),
        *("file_val.jsonl", "c4-validation.00000.json.gz", "Valid/a.jsonl", "DEV.JSONL", "dev2.jsonl", "devset.txt"),
        *("heldout/a.jsonl", "held-out/a.jsonl", "held_out.jsonl", "holdout_3.jsonl", "VALIDATION/a.jsonl"),
        *(
            "validation/python/train-00000-of-00001.parquet",
            "train/dev.jsonl",
            "wiki.valid.jsonl",
            "evaluation.parquet",
        ),
        *("my-training-corpus/validation/a.jsonl", "train-test-split/val/a.jsonl"),
    ],
    "test": [
        *("data/test-00000-of-00001.parquet", "test/chunk1/example_holdout_100.jsonl.zst", "testing/a.jsonl"),
        *("test/validation/a.jsonl", "unit-test.jsonl", "test.txt", "train/test-0.jsonl", "testset.jsonl.gz"),
    ],
}


@pytest.mark.parametrize(("name", "split"), [(name, split) for split, names in SPLIT_OF.items() for name in names])
def test_a_files_split_is_what_a_name_on_its_path_says(tmp_path: Path, name: str, split: str):
    path = write_jsonl(tmp_path / "raw" / name, ["x"])
    assert find_inputs(tmp_path / "raw", PLAIN).splits == {split: [path]}
    if "/" not in name:
        assert find_inputs(path, PLAIN).splits == {split: [path]}


def test_what_is_held_out_is_named(tmp_path: Path):
    for name in ("a.jsonl", "dev/b.jsonl", *(f"val/{number}.jsonl" for number in range(6)), "test.jsonl"):
        write_jsonl(tmp_path / "raw" / name, ["x"])
    assert find_inputs(tmp_path / "raw", PLAIN).notes() == [
        f"{tmp_path}/raw: 7 files belong to validation by their names: dev/b.jsonl, val/0.jsonl, val/1.jsonl,"
        " val/2.jsonl, val/3.jsonl and 2 more",
        f"{tmp_path}/raw: 1 file belongs to test by its name: test.jsonl",
    ]
    assert find_inputs(tmp_path / "raw" / "dev", PLAIN).notes() == [
        f"{tmp_path}/raw/dev: is read as training data, although it is in 'dev'"
    ]
    assert find_inputs(tmp_path / "raw" / "val" / "0.jsonl", PLAIN).notes() == [
        f"{tmp_path}/raw/val/0.jsonl: is read as training data, although it is in 'val'"
    ]
    assert find_inputs(tmp_path / "raw" / "test.jsonl", PLAIN).notes() == [
        f"{tmp_path}/raw/test.jsonl: 1 file belongs to test by its name: test.jsonl",
        f"{tmp_path}/raw/test.jsonl: has no training data, judging by file names",
    ]


def test_a_chosen_subset_may_be_named_like_a_split(tmp_path: Path):
    for name in ("dev/a.jsonl", "main/b.jsonl", "c.jsonl"):
        write_jsonl(tmp_path / "raw" / name, ["x"])
    found = find_inputs(tmp_path / "raw", source_format("mine", subsets=["dev"]))
    assert found.splits == {"train": [tmp_path / "raw" / "dev" / "a.jsonl"]}
    assert found.notes() == [
        f"{tmp_path}/raw: not read, without a subset folder: c.jsonl",
        f"{tmp_path}/raw: not read, of other subsets: main/b.jsonl",
    ]


# --- links ------------------------------------------------------------------------------------------------------------


def names_below(raw: Path) -> dict[str, list[str]]:
    splits = find_inputs(raw, PLAIN).splits
    return {split: [str(path.relative_to(raw)) for path in paths] for split, paths in splits.items()}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """One file, beside a folder on another disk."""
    write_jsonl(tmp_path / "raw" / "a.jsonl", ["one"])
    write_jsonl(tmp_path / "elsewhere" / "b.jsonl", ["two"])
    return tmp_path / "raw"


def test_links_to_folders_and_files_are_read(raw: Path):
    (raw / "chunk2").symlink_to(raw.parent / "elsewhere")
    write_jsonl(raw.parent / "blobs" / "0123abcd", ["three"])
    (raw / "c.jsonl").symlink_to("../blobs/0123abcd")
    assert names_below(raw) == {"train": ["a.jsonl", "c.jsonl", "chunk2/b.jsonl"]}
    (raw.parent / "link").symlink_to(raw)
    assert names_below(raw.parent / "link") == names_below(raw)


@pytest.mark.parametrize("link", ["c.jsonl", "chunk3"])
def test_a_link_to_nothing_is_rejected(raw: Path, link: str):
    (raw / link).symlink_to("/nowhere/c.jsonl")
    with pytest.raises(ConfigError, match=rf"raw/{link}: is a link to /nowhere/c.jsonl, which is missing"):
        find_inputs(raw, PLAIN)
    with pytest.raises(ConfigError, match=rf"raw/{link}: is a link to /nowhere/c.jsonl, which is missing"):
        find_inputs(raw / link, PLAIN)


def test_links_in_a_circle(raw: Path):
    (raw / "again").symlink_to(raw)
    (raw / "deep").mkdir()
    (raw / "deep" / "up").symlink_to("..")
    assert names_below(raw) == {"train": ["a.jsonl"]}
    assert find_inputs(raw, PLAIN).notes() == [f"{raw}: not read, links to a parent folder: again, deep/up"]
    (raw / "itself").symlink_to("itself")
    with pytest.raises(ConfigError, match=r"raw/itself: is a link to itself, which is missing \(Too many levels"):
        find_inputs(raw, PLAIN)


def test_a_file_or_folder_under_two_names_is_read_once(raw: Path):
    (raw / "0.jsonl").symlink_to("a.jsonl")
    os.link(raw / "a.jsonl", raw / "hard.jsonl")
    for name in ("x", "y"):
        (raw / name).symlink_to(raw.parent / "elsewhere")
    assert names_below(raw) == {"train": ["a.jsonl", "x/b.jsonl"]}
    assert find_inputs(raw, PLAIN).notes() == [f"{raw}: not read, duplicates under other names: 0.jsonl, hard.jsonl, y"]


@pytest.mark.parametrize(("name", "target"), [("validation", "elsewhere"), ("val.jsonl", "elsewhere/b.jsonl")])
def test_what_is_held_out_by_one_of_its_names_only_is_rejected(raw: Path, name: str, target: str):
    (raw / "chunk.jsonl" if name.endswith(".jsonl") else raw / "chunk").symlink_to(raw.parent / target)
    (raw / name).symlink_to(raw.parent / target)
    with pytest.raises(
        ConfigError, match=f"raw/{name}: is the same file as .*/raw/chunk.*, and their names mean different"
    ):
        find_inputs(raw, PLAIN)


# --- other bad days ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_a_file_packed_and_unpacked_is_rejected(raw: Path, end: str):
    write_jsonl(raw / f"a.jsonl{end}", ["one"])
    with pytest.raises(
        ConfigError, match=rf"raw/a.jsonl{end}: has the name of a.jsonl next to it, apart from the compression"
    ):
        find_inputs(raw, PLAIN)


def test_a_name_that_is_not_utf_8_is_rejected(raw: Path):
    write_jsonl(raw / os.fsdecode(b"caf\xe9.jsonl"), ["x"])
    with pytest.raises(ConfigError, match=r"raw: holds the name 'caf\\udce9.jsonl', which is not UTF-8; rename it"):
        find_inputs(raw, PLAIN)


def test_a_folder_that_cannot_be_listed_is_rejected(raw: Path, monkeypatch: pytest.MonkeyPatch):
    listing = os.listdir
    (raw / "closed").mkdir()

    def list_open(folder: Path) -> list[str]:
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        return listing(folder)

    monkeypatch.setattr(os, "listdir", list_open)
    with pytest.raises(ConfigError, match=r"raw/closed: cannot be listed \(Permission denied\)"):
        find_inputs(raw, PLAIN)


def test_a_pipe_cannot_be_the_input(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ConfigError, match="is neither a file nor a folder"):
        find_inputs(tmp_path / "pipe.jsonl", PLAIN)
