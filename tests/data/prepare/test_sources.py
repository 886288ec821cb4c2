"""The published corpora, as they lie on disk: where their texts are, and which of their subsets are read."""

import json
from pathlib import Path

import fast_folders
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from corpora import AWKWARD_TEXTS, write_jsonl

from tinyllama_ds.data.prepare.inputs import find_inputs
from tinyllama_ds.data.prepare.reading import read_records, read_texts
from tinyllama_ds.data.prepare.sources import SourceFormat, source_format
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import ConfigError

PLAIN = SourceFormat()


def write_parquet(path: Path, texts: list[str | None], column: str = "text") -> None:
    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path, row_group_size=3)


def slimpajama_line(text: str, subset: str) -> str:
    return json.dumps({"text": text, "meta": {"redpajama_set_name": subset}}) + "\n"


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_a_text_that_is_too_short_by_its_bytes_is_so_by_its_tokens(kind: str, tokenizer: Tokenizer, tmp_path: Path):
    """Such a text is rejected without encoding it: no tokenizer makes more tokens than bytes, EOS and a space."""
    one = tokenizer if kind == "sentencepiece" else load_tokenizer(fast_folders.smollm2(tmp_path))
    for text in [*AWKWARD_TEXTS, "\x00", "\x7f" * 3, "é", "\U0010ffff" * 2]:
        tokens = len(one.encode(text)) + 1
        assert SourceFormat(min_tokens=tokens).record({"text": text}, "here").text == text, text
        rejected = SourceFormat(min_tokens=len(text.encode()) + 3).record({"text": text}, "here").rejected
        assert rejected == f"fewer than {len(text.encode()) + 3} tokens"


def test_slimpajama_leaves_github_out_and_counts_it(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(slimpajama_line("prose", "RedPajamaC4") + slimpajama_line("code", "RedPajamaGithub"))
    assert [(record.text, record.rejected) for record in read_records(path, source_format("slimpajama"))] == [
        ("prose", None),
        ("", "subset RedPajamaGithub"),
    ]
    chosen = source_format("slimpajama", subsets=["RedPajamaGithub"])
    assert list(read_texts(path, chosen)) == ["code"]
    with pytest.raises(ConfigError, match="has no subset 'Github'; its subsets are RedPajamaCommonCrawl, "):
        source_format("slimpajama", subsets=["Github"])


def test_slimpajama_as_parquet_leaves_github_out_too(tmp_path: Path):
    rows = {
        "text": ["prose", "code"],
        "meta": [{"redpajama_set_name": name} for name in ("RedPajamaC4", "RedPajamaGithub")],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "x.parquet")
    assert list(read_texts(tmp_path / "x.parquet", source_format("slimpajama"))) == ["prose"]


def test_an_empty_text_is_rejected_by_name(tmp_path: Path):
    write_jsonl(tmp_path / "x.jsonl", ["", "text"])
    assert [record.rejected for record in read_records(tmp_path / "x.jsonl", PLAIN)] == ["empty text", None]


def test_starcoderdata_languages_are_chosen_by_folder(tmp_path: Path):
    for language in ("python", "java", "jupyter-scripts-dedup-filtered"):
        (tmp_path / language).mkdir()
        write_parquet(tmp_path / language / "train-00000-of-00001.parquet", [f"# {language}"], "content")
    fmt = source_format("starcoderdata", subsets=["python", "jupyter-scripts-dedup-filtered"])
    found = find_inputs(tmp_path, fmt).splits
    assert [path.parent.name for path in found["train"]] == ["jupyter-scripts-dedup-filtered", "python"]
    assert list(read_texts(found["train"][1], fmt)) == ["# python"]
    with pytest.raises(ConfigError, match="has no subset 'cobol'; its folders are java, jupyter"):
        find_inputs(tmp_path, source_format("starcoderdata", subsets=["cobol"]))


def test_proof_pile_2_keeps_its_splits_below_its_subsets(tmp_path: Path):
    metas: list[object] = [{"config": "arxiv"}, json.dumps({"url": "x"}), None]
    for subset, meta in zip(("arxiv", "open-web-math", "algebraic-stack"), metas, strict=True):
        for split in ("train", "validation", "test"):
            folder = tmp_path / subset / split
            folder.mkdir(parents=True)
            line = json.dumps({"text": f"{subset} {split}", "meta": meta}).encode()
            (folder / "0.jsonl.zst").write_bytes(zstandard.compress(line))
    fmt = source_format("proof-pile-2", subsets=["arxiv", "algebraic-stack"])
    found = find_inputs(tmp_path, fmt).splits
    texts = {split: [text for path in paths for text in read_texts(path, fmt)] for split, paths in found.items()}
    assert texts == {split: [f"algebraic-stack {split}", f"arxiv {split}"] for split in ("train", "validation", "test")}


def test_skypile_is_jsonl_of_chinese(tmp_path: Path):
    write_jsonl(tmp_path / "data" / "2020-40_zh_head_0000.jsonl", ["北京是中国的首都。"])
    fmt = source_format("skypile")
    (path,) = find_inputs(tmp_path, fmt).splits["train"]
    assert list(read_texts(path, fmt)) == ["北京是中国的首都。"]


def test_a_corpus_of_ones_own_names_its_text_field(tmp_path: Path):
    write_jsonl(tmp_path / "x.jsonl", ["mine"], field="body")
    assert list(read_texts(tmp_path / "x.jsonl", source_format("mine", "body"))) == ["mine"]


NAME = {"redpajama_set_name": "RedPajamaC4"}
GITHUB = {"redpajama_set_name": "RedPajamaGithub"}
SHAPES = {
    "as published": lambda said: {"meta": said},
    "as JSON": lambda said: {"meta": json.dumps(said)},
    "in the record": lambda said: said,
    "beside another meta": lambda said: {"meta": {"url": "x"}} | said,
    "beside a meta of text": lambda said: {"meta": "no JSON"} | said,
}
UNKNOWN = {
    "no meta": {},
    "another meta": {"meta": {"pile_set_name": "Github"}},
    "null": {"meta": None},
    "an array": {"meta": ["RedPajamaC4"]},
    "deep": {"meta": "[" * 100_000},
    "null name": {"meta": {"redpajama_set_name": None}},
    "another name": {"meta": {"redpajama_set_name": "Github"}},
    "no text": {"meta": {"redpajama_set_name": ["RedPajamaC4"]}},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_set_name_is_found_in_every_shape(tmp_path: Path, shape: str, kind: str):
    rows = [{"text": "prose"} | SHAPES[shape](NAME), {"text": "code"} | SHAPES[shape](GITHUB)]
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_texts(path, source_format("slimpajama"))) == ["prose"]
    assert list(read_texts(path, source_format("slimpajama", subsets=["RedPajamaGithub"]))) == ["code"]


@pytest.mark.parametrize("case", UNKNOWN)
@pytest.mark.parametrize("subsets", [None, ["RedPajamaC4"]])
def test_a_record_of_an_unknown_set_is_a_fault(tmp_path: Path, case: str, subsets: list[str] | None):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"text": "x"} | UNKNOWN[case]))
    (record,) = read_records(path, source_format("slimpajama", subsets=subsets))
    assert record.text == ""
    assert "redpajama_set_name" in (record.fault or "")


def test_subsets_in_folders_are_found_at_any_depth(tmp_path: Path):
    for name in ("data/python/train-0.parquet", "data/java/train-0.parquet", "stray.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_parquet(tmp_path / name, ["x"], "content")
    found = find_inputs(tmp_path, source_format("starcoderdata", subsets=["python"])).splits
    assert found == {"train": [tmp_path / "data" / "python" / "train-0.parquet"]}
