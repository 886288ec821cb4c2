"""A teacher's cached predictions: those of transformers, the same bytes from any number of workers after any crash."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hf_folders import write_hf_folder

from tinyllama_ds.cli import main
from tinyllama_ds.data.packing import open_stream
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.data.teacher import TeacherCache
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import EXIT_CONFIG, ConfigError
from tinyllama_ds.hf import teacher
from tinyllama_ds.hf.teacher import Teaching, teach
from tinyllama_ds.model.config import MODEL_SIZES

T, K = 32, 8


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    shape = replace(MODEL_SIZES["test"], tie_word_embeddings=True)
    return write_hf_folder(tmp_path_factory.mktemp("teacher") / "hf", shape, tokenizer)


@pytest.fixture
def data(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the data directory; a shard of predictions has two batches of 150 samples."""
    monkeypatch.setitem(teacher._BATCH_TOKENS, "cpu", 150 * T)
    monkeypatch.setattr(teacher, "_SHARD_BYTES", 300 * T * (2 * K + 2 * (K + 1)))
    shutil.copytree(data_dir, tmp_path / "data")
    return tmp_path / "data"


def cache(data: Path, hf_folder: Path, workers: int = 1, **changes: object) -> dict:
    options = {"sequence_length": T, "document_mask": False, "teacher_top_k": K, "source": "slimpajama"} | changes
    return teach(Teaching(teacher=hf_folder, output=data, **options), workers)


def contents(data: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (data / "slimpajama" / "train" / "teacher").iterdir()}


def stream_of(data: Path) -> TokenStream:
    return open_stream(data / "slimpajama" / "train")


def test_predictions_are_those_of_transformers(data: Path, hf_folder: Path) -> None:
    row = cache(data, hf_folder)
    stream = stream_of(data)
    cached = TeacherCache(stream, T, document_mask=False)
    assert row["shards"] == len(cached.manifests) > 2
    assert row["bytes_per_token"] == cached.manifests[0].bytes_per_token == 2 * K + 2 * (K + 1)
    model = transformers.LlamaForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    for sample in (0, 5, 8, stream.num_samples(T) - 1):
        records = cached.read(sample)
        with torch.no_grad():
            logits = model(torch.from_numpy(stream.sample(sample, T)[None, :T].astype(np.int64))).logits[0]
        expected = torch.log_softmax(logits, -1).topk(K)
        probs = np.exp(records["log_probs"].astype(np.float32))
        np.testing.assert_allclose(records["log_probs"][:, :K], expected.values, atol=5e-3)
        np.testing.assert_allclose(probs[:, K], 1 - expected.values.exp().sum(1), atol=1e-3)
        assert (torch.log_softmax(logits, -1).gather(1, torch.from_numpy(records["ids"].astype(np.int64))) > -99).all()
        assert (records["ids"][:, 0] == expected.indices[:, 0].numpy()).mean() > 0.99


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_with_a_document_mask_the_teacher_sees_its_document_alone(data: Path, hf_folder: Path, packing: str) -> None:
    cache(data, hf_folder, document_mask=True, packing=packing)
    stream = open_stream(data / "slimpajama" / "train", packing)
    cached = TeacherCache(stream, T, True, packing)
    with pytest.raises(ConfigError, match=f'have packing "{packing}"; expected the recipe\'s "'):
        TeacherCache(stream, T, True, "concatenate" if packing == "best_fit" else "best_fit")
    model = transformers.LlamaForCausalLM.from_pretrained(hf_folder, dtype=torch.float32)
    sample = next(index for index in range(stream.num_samples(T)) if stream.document_ids(index, T).max())
    second = stream.document_ids(sample, T) == 1
    ids = torch.from_numpy(stream.sample(sample, T)[:T][second].astype(np.int64))
    with torch.no_grad():
        expected = torch.log_softmax(model(ids[None]).logits[0], -1).topk(K)
    np.testing.assert_allclose(cached.read(sample)["log_probs"][second][:, :K], expected.values, atol=5e-3)


def test_workers_and_interruptions_change_no_byte(data: Path, hf_folder: Path) -> None:
    cache(data, hf_folder)
    expected = contents(data)
    folder = data / "slimpajama" / "train" / "teacher"
    (folder / "shard_00001.bin").unlink()
    (folder / "shard_00002.json").unlink()
    (folder / ".shard_00002.bin.host.1.partial").write_bytes(b"half")
    kept = (folder / "shard_00000.bin").stat().st_mtime_ns
    cache(data, hf_folder)
    assert contents(data) == expected
    assert (folder / "shard_00000.bin").stat().st_mtime_ns == kept
    shutil.rmtree(folder)
    cache(data, hf_folder, workers=2)
    assert contents(data) == expected
    shutil.rmtree(folder)
    for rank in range(3):
        job = Teaching(hf_folder, data, "slimpajama", T, document_mask=False, teacher_top_k=K)
        teach(job, 1, (rank, 3))
    assert contents(data) == expected


def test_other_predictions_are_rejected_and_left_alone(data: Path, hf_folder: Path) -> None:
    cache(data, hf_folder)
    before = contents(data)
    with pytest.raises(ConfigError, match="has top_k 8, not 4; remove .*teacher to make it again"):
        cache(data, hf_folder, teacher_top_k=4)
    assert contents(data) == before
    with pytest.raises(ConfigError, match="have sequence_length 32; expected the recipe's 16"):
        TeacherCache(stream_of(data), 16, document_mask=False)
    with pytest.raises(ConfigError, match="have document_mask false; expected the recipe's true"):
        TeacherCache(stream_of(data), T, document_mask=True)


def test_incomplete_or_damaged_predictions_are_named(
    data: Path, hf_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="holds no predictions of a teacher, which the recipe's"):
        TeacherCache(stream_of(data), T, document_mask=False)
    cache(data, hf_folder)
    folder = data / "slimpajama" / "train" / "teacher"
    shard = folder / "shard_00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match=f"shard_00001.bin: expected a file of {len(content)} bytes"):
        TeacherCache(stream_of(data), T, document_mask=False)
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["audit", str(data), "--json"]) != 0
    assert "shard_00001.bin differs from the hash in its manifest" in capsys.readouterr().out
    (folder / "shard_00000.json").unlink()
    with pytest.raises(ConfigError, match=r"\d+ of \d+ shards are there; run prepare --teacher again"):
        TeacherCache(stream_of(data), T, document_mask=False)


def test_a_teacher_with_another_tokenizer_or_too_few_positions_is_rejected(
    data: Path, hf_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--sequence-length 100000: is beyond the"):
        cache(data, hf_folder, sequence_length=100_000)
    with pytest.raises(ConfigError, match="--teacher-top-k 513: expected 512 or less"):
        cache(data, hf_folder, teacher_top_k=513)
    other = shutil.copytree(hf_folder, tmp_path / "other")
    path = other / "tokenizer.model"
    path.write_bytes(path.read_bytes().replace(b"token", b"nekot"))
    with pytest.raises(ConfigError, match="expected a teacher with the same tokenizer"):
        cache(data, other)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "expected --input and --tokenizer, or --teacher"),
        (["--input", "x"], "expected --input and --tokenizer, or --teacher"),
        (["--teacher", "x"], "--teacher: expected --sequence-length as well"),
        (["--teacher", "x", "--sequence-length", "8", "--mpi"], "expected --share RANK/SIZE on every host"),
        (["--teacher", "x", "--sequence-length", "8", "--input", "x"], "--input and --tokenizer go together"),
        (["--input", "x", "--tokenizer", "x", "--document-mask"], "expected --teacher as well"),
        (["--input", "x", "--tokenizer", "x", "--packing", "best_fit"], "expected --teacher as well"),
        (["--teacher", "x", "--sequence-length", "8", "--packing", "best_fit"], "expected --document-mask as well"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "--source", "s", "--output", str(tmp_path), *options]) == EXIT_CONFIG
    assert sentence in capsys.readouterr().err


def test_prepare_makes_tokens_and_predictions_at_once(
    hf_folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text("\n".join(json.dumps({"text": "a small llama " * 40}) for _ in range(9)))
    where = ["--source", "s", "--input", str(tmp_path / "raw"), "--tokenizer", str(tokenizer.path)]
    by = ["--teacher", str(hf_folder), "--sequence-length", "64", "--teacher-top-k", "4", "--workers", "1"]
    assert main(["prepare", *where, "--output", str(tmp_path / "data"), *by, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["teacher"]["tokens"] == (result["train"]["tokens"] - 1) // 64 * 64
    assert result["teacher"]["bytes_per_token"] == 18
    assert "18 bytes per token for the 4 most probable tokens of hf, 0.000 GiB for" in captured.err
