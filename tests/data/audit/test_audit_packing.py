"""What the audit counts of rows, against counts of another kind: token by token, and row by row of the training."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from chats import conversations, prepare_chat, write_records
from corpora import made_up_text, write_jsonl
from megatron import read_mmididx
from recipes import VALID

from tinyllama_ds.cli import main
from tinyllama_ds.data.audit.audit import DataAudit
from tinyllama_ds.data.audit.packing import audit_packing
from tinyllama_ds.data.audit.page import verdict
from tinyllama_ds.data.packing import PackedStream, open_stream
from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.prepare.sources import source_format
from tinyllama_ds.data.tokenizers.abstract import Tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Two sources of several shards, with documents of a few tokens to some hundreds."""
    root = tmp_path_factory.mktemp("packing")
    for source, longest in (("slimpajama", 20), ("other", 90)):
        for part in range(3):
            texts = [made_up_text(100 * part + number, 1 + number % longest) for number in range(50)]
            write_jsonl(root / source / f"{part}.jsonl", texts)
        job = Preparation(source, root / source, source_format("mine"), tokenizer.path, root / "data", shard_bytes=1)
        prepare(job)
    return root / "data"


def count_cut(rows_of_tokens: list[list[int]]) -> dict[str, int]:
    """Given the row of each token of each document, in its order."""
    cut = [rows for rows in rows_of_tokens if len(set(rows)) > 1]
    return {"documents": len(cut), "tokens": sum(row != rows[0] for rows in cut for row in rows)}


def documents_of(data: Path, source: str) -> list[list[int]]:
    prefixes = sorted(path.with_suffix("") for path in (data / source / "train").glob("*.bin"))
    return [document for prefix in prefixes for document in read_mmididx(prefix)]


@pytest.mark.parametrize("T", [16, 64])
@pytest.mark.parametrize("source", ["slimpajama", "other"])
def test_cuts_and_padding_are_counted(data: Path, source: str, T: int) -> None:
    documents = documents_of(data, source)
    place = iter(range(sum(map(len, documents))))
    stream = open_stream(data / source / "train", "best_fit")
    assert isinstance(stream, PackedStream)
    padding, pieces = 0, []
    for row in range(stream.num_samples(T)):
        held = stream.documents(row, T)
        padding += stream.document_ids(row, T).tolist().count(len(held))
        pieces += [piece.tolist() for piece in held]
    found = audit_packing(data, source, T)
    assert asdict(found) == {
        "source": source,
        "sequence_length": T,
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "longest": max(map(len, documents)),
        "concatenated": count_cut([[next(place) // T for _ in document] for document in documents]),
        "best_fit": count_cut([[place // T for place in range(len(document))] for document in documents]),
        "rows": stream.num_samples(T),
        "padding": padding,
    }
    whole = [document for document in documents if document in pieces]
    assert len(documents) - len(whole) == found.best_fit.documents <= found.concatenated.documents
    share = found.concatenated.tokens / found.tokens
    printed = verdict(DataAudit([], packing=[found]))
    assert re.search(rf"{source} +\d+ +\d+ +{found.concatenated.documents} .* {share:.2%} ", printed)


def test_a_conversation_that_is_longer_is_a_warning(
    data: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Conversations are not cut, so training at this length would reject the source."""
    write_records(tmp_path / "raw" / "a.jsonl", [{"messages": messages} for messages in conversations(9)])
    prepare_chat(tmp_path / "raw", tokenizer.path, tmp_path / "data")
    assert main(["audit", str(tmp_path / "data"), "--sequence-length", "16", "--workers", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packing"] == []
    assert ["holds a conversation of" in text for text in found["warnings"]] == [True]
    assert audit_packing(tmp_path / "data", "chat", 96).best_fit.documents == 0


def test_a_recipe_that_packs_is_audited_at_its_length(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its samples are those of its rows."""
    recipe, page = tmp_path / "mine.toml", tmp_path / "audit.html"
    recipe.write_text(VALID.replace("seed = 1", 'seed = 1\ndocument_mask = true\npacking = "best_fit"'))
    arguments = ["audit", str(data), "--recipe", str(recipe), "--workers", "1", "--json", "--output", str(page)]
    assert main(arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)["packing"]
    assert page.read_text().count("<svg") == 5
    assert (row["source"], row["sequence_length"]) == ("slimpajama", 32)
    shown = ["data", "show", "0", "--recipe", str(recipe), "--data", str(data), "--json"]
    assert main(shown) == 0
    for sample in json.loads(capsys.readouterr().out)["samples"]:
        assert sample["sample"] < row["rows"]
