"""A real vocabulary of 32,000 pieces with Llama 2's settings (`--real`): ids, encoders, shards and export."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers
from corpora import AWKWARD_TEXTS, write_jsonl

from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.prepare.sources import SourceFormat
from tinyllama_ds.data.shards import ShardReader
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.encoding import load_gigatoken
from tinyllama_ds.hf.convert import PROBE_TEXTS, export
from tinyllama_ds.hf.import_model import import_hf_folder
from tinyllama_ds.hf.model_folder import open_model_folder
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import build_model

pytestmark = pytest.mark.real
SOURCES = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
TEXTS = [*AWKWARD_TEXTS, *PROBE_TEXTS, *SOURCES[:60]]


def test_it_has_llama_2s_settings(wide_tokenizer: Tokenizer) -> None:
    assert wide_tokenizer.vocab_size == 32_000
    assert (wide_tokenizer.unk_id, wide_tokenizer.bos_id, wide_tokenizer.eos_id) == (0, 1, 2)
    wide_tokenizer.reject_inconvertible()


def test_a_text_comes_back(wide_tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        assert wide_tokenizer.decode(wide_tokenizer.encode(text)) == wide_tokenizer.readable(text), text[:80]
    for text in SOURCES[:60]:
        assert wide_tokenizer.readable(text) == text


def test_gigatoken_gives_the_same_ids(wide_tokenizer: Tokenizer) -> None:
    pytest.importorskip("gigatoken", reason="gigatoken is not installed")
    fast = load_gigatoken(wide_tokenizer, "gigatoken")
    assert fast is not None
    for found, expected in zip(fast(TEXTS), wide_tokenizer.encode_batch(TEXTS), strict=True):
        assert np.array_equal(found, expected)


def test_its_shards_are_uint16(wide_tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "raw" / "a.jsonl", TEXTS)
    job = Preparation("mine", tmp_path / "raw", SourceFormat("text"), wide_tokenizer.path, tmp_path / "data")
    (manifest,) = prepare(job)
    assert manifest.dtype == "uint16"
    (path,) = (tmp_path / "data" / "mine" / "train").glob("*.bin")
    expected = [token for text in TEXTS for token in [*wide_tokenizer.encode(text), wide_tokenizer.eos_id]]
    assert path.stat().st_size == 2 * len(expected)
    assert max(expected) > 31_000
    assert ShardReader(path.with_suffix("")).read(0, len(expected)).tolist() == expected


def test_an_exported_model_has_its_ids_in_transformers(wide_tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = replace(MODEL_SIZES["test"], vocab_size=32_000)
    weights = build_model(config, "eager", seed=1).state_dict()
    export(weights.items(), config, wide_tokenizer, tmp_path / "hf")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        assert loaded.encode(text, split_special_tokens=True) == wide_tokenizer.encode(text), text[:80]
    import_hf_folder(tmp_path / "hf", tmp_path / "ours")
    assert open_model_folder(tmp_path / "ours").tokenizer.sha256 == wide_tokenizer.sha256
