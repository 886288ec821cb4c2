"""Tokens made elsewhere: written here by the documented layouts, imported, and read back."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tinyllama_ds.cli import main
from tinyllama_ds.data.audit.audit import audit_data
from tinyllama_ds.data.prepare.imports import Import, import_litpkds, import_megatron, read_litpkds
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.train_tokenizer import BOS_ID, EOS_ID
from tinyllama_ds.errors import ConfigError


def documents(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(3, 512, int(rng.integers(1, 40))).tolist(), EOS_ID] for _ in range(count)]


def write_megatron(prefix: Path, texts: list[list[int]], code: int, kind: str, sentences: int = 1) -> Path:
    """By Megatron-LM's indexed_dataset.py, each document in several sequences as its sentence splitting makes them."""
    sequences, borders = [], [0]
    for text in texts:
        pieces = [piece.tolist() for piece in np.array_split(np.array(text), sentences)]
        sequences += pieces
        borders.append(len(sequences))
    size = struct.calcsize(kind)
    lengths = [len(sequence) for sequence in sequences]
    pointers = [size * sum(lengths[:number]) for number in range(len(lengths))]
    prefix.with_suffix(".idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, len(sequences), len(borders))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(borders)}q", *borders)
    )
    flat = sum(sequences, [])
    prefix.with_suffix(".bin").write_bytes(struct.pack(f"<{len(flat)}{kind}", *flat))
    return prefix.with_suffix(".idx")


def write_chunk(path: Path, ids: list[int], code: int = 8, kind: str = "H") -> Path:
    """By lit_gpt/packed_dataset.py: 24 bytes of header, then the tokens."""
    path.write_bytes(b"LITPKDS" + struct.pack("<QBQ", 1, code, len(ids)) + struct.pack(f"<{len(ids)}{kind}", *ids))
    return path


def job(tmp_path: Path, tokenizer: Tokenizer) -> Import:
    return Import("foreign", "train", tokenizer.path, tmp_path / "data")


# --- Megatron ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "kind"), [(8, "H"), (4, "i"), (5, "q")])
@pytest.mark.parametrize("sentences", [1, 3])
def test_megatron_shards_are_trained_on_as_they_are(
    tmp_path: Path, tokenizer: Tokenizer, code: int, kind: str, sentences: int
):
    parts = [documents(20, 1), documents(7, 2)]
    inputs = [
        write_megatron(tmp_path / f"part{number}", part, code, kind, sentences) for number, part in enumerate(parts)
    ]
    import_megatron(job(tmp_path, tokenizer), inputs)
    stream = TokenStream(tmp_path / "data" / "foreign" / "train")
    assert stream.read(0, stream.tokens).tolist() == sum(parts[0] + parts[1], [])
    starts = np.cumsum([0] + [len(text) for text in parts[1]])
    assert stream.shards[1].document_starts.tolist() == starts.tolist()
    assert stream.shards[1].manifest.dtype == np.dtype(f"<{kind}").name
    assert audit_data(tmp_path / "data", {}, samples=0, workers=1).problems == []


def test_megatron_ids_beyond_the_tokenizer_are_rejected(tmp_path: Path, tokenizer: Tokenizer):
    for ids in ([5, 512, 2], [-1, 5, 2]):
        index = write_megatron(tmp_path / "part", [ids], 4, "i")
        with pytest.raises(ConfigError, match="do not fit the 512 of the tokenizer"):
            import_megatron(job(tmp_path, tokenizer), [index])
    assert not list((tmp_path / "data").rglob("*.json"))


def test_a_megatron_shard_without_its_tokens_is_rejected(tmp_path: Path, tokenizer: Tokenizer):
    index = write_megatron(tmp_path / "part", documents(3), 8, "H")
    whole = index.with_suffix(".bin").read_bytes()
    index.with_suffix(".bin").write_bytes(whole[:-2])
    with pytest.raises(ConfigError, match="does not hold the"):
        import_megatron(job(tmp_path, tokenizer), [index])


# --- LITPKDS ----------------------------------------------------------------------------------------------------------


def test_chunks_of_tinyllama_come_back_as_documents(tmp_path: Path, tokenizer: Tokenizer):
    """Two processes; documents run on from chunk to chunk; each process's last chunk is filled up with BOS."""
    expected, chunks, paddings = [], [], 0
    for process in range(2):
        texts = documents(60, process)
        expected += texts
        flat = sum(texts, [])
        pieces = [flat[start : start + 200] for start in range(0, len(flat), 200)]
        padding = 200 - len(pieces[-1])
        paddings += padding
        pieces[-1] += [BOS_ID] * padding
        chunks += [
            write_chunk(tmp_path / f"train_slim_{process}_{number:010d}.bin", piece)
            for number, piece in enumerate(pieces)
        ]
    manifests = import_litpkds(job(tmp_path, tokenizer), chunks, shard_bytes=1500)
    stream = TokenStream(tmp_path / "data" / "foreign" / "train")
    assert len(stream.shards) > 2
    assert stream.read(0, stream.tokens).tolist() == sum(expected, [])
    lengths = np.concatenate([np.diff(shard.document_starts) for shard in stream.shards])
    assert lengths.tolist() == [len(text) for text in expected]
    assert sum(manifest.source_format["filler_tokens_left_out"] for manifest in manifests) == paddings
    assert audit_data(tmp_path / "data", {}, samples=0, workers=1).problems == []


def test_chunks_with_bos_only_are_cut_before_it(tmp_path: Path, tokenizer: Tokenizer):
    texts = [[BOS_ID, *text[:-1]] for text in documents(10)]
    chunk = write_chunk(tmp_path / "train_star_0_0000000000.bin", sum(texts, []), 4, "i")
    import_litpkds(job(tmp_path, tokenizer), [chunk])
    stream = TokenStream(tmp_path / "data" / "foreign" / "train")
    assert np.diff(stream.shards[0].document_starts).tolist() == [len(text) for text in texts]


def test_a_damaged_chunk_is_rejected(tmp_path: Path, tokenizer: Tokenizer):
    whole = write_chunk(tmp_path / "whole.bin", [5, 6, 2]).read_bytes()
    path = tmp_path / "train_slim_0_0000000000.bin"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="train_slim_0"):
            read_litpkds(path)
    for change in (b"X" + whole[1:], whole[:7] + b"\x02" + whole[8:], whole[:15] + b"\x06" + whole[16:]):
        path.write_bytes(change)
        with pytest.raises(ConfigError, match="not a LITPKDS chunk|expected version 1"):
            read_litpkds(path)
    path.write_bytes(whole[:16] + struct.pack("<Q", 2**63) + whole[24:])
    with pytest.raises(ConfigError, match="do not hold 9223372036854775808 tokens"):
        read_litpkds(path)
    write_chunk(path, [5, 600, 2])
    with pytest.raises(ConfigError, match="train_slim_0.*do not fit a vocabulary of 512"):
        import_litpkds(job(tmp_path, tokenizer), [path])


def test_the_commands_say_what_they_imported(tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture):
    chunk = write_chunk(tmp_path / "train_slim_0_0000000000.bin", [5, 6, 2, 1, 1, 1])
    shared = ["--source", "mine", "--tokenizer", str(tokenizer.path), "--output", str(tmp_path / "data")]
    assert main(["import-litpkds", str(chunk), *shared]) == 0
    assert capsys.readouterr().out == "mine/train: 1 shards, 1 documents, 3 tokens, 3 filler tokens\n"
    index = write_megatron(tmp_path / "part", documents(3), 8, "H")
    assert main(["import-megatron", str(index), *shared, "--split", "validation"]) == 0
    assert capsys.readouterr().out.startswith("mine/validation: 1 shards, 3 documents")


@pytest.mark.parametrize("run", [import_megatron, import_litpkds])
def test_an_input_that_is_missing_leaves_nothing(run: Callable, tokenizer: Tokenizer, tmp_path: Path):
    with pytest.raises(ConfigError, match="absent.bin: the (shard's index|chunk) is missing"):
        run(Import("mine", "train", tokenizer.path, tmp_path / "data"), [tmp_path / "absent.bin"])
    assert not list(tmp_path.iterdir())
