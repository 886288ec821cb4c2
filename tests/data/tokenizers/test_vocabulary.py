"""Vocabularies that other encoders cannot follow: proven on every piece, and refused before anything is trained."""

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import vocabularies
from corpora import AWKWARD_TEXTS, write_jsonl

from tinyllama_ds.cli import main
from tinyllama_ds.data.prepare.conversations import ChatFormat
from tinyllama_ds.data.prepare.imports import Import, import_litpkds, import_megatron
from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.prepare.sources import source_format
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.encoding import load_gigatoken
from tinyllama_ds.data.tokenizers.sentencepiece_tokenizer import fast_tokenizer, reject_inconvertible
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.data.tokenizers.vocabulary import difference_of, probe_texts
from tinyllama_ds.errors import ConfigError

SYMBOLS = ["<sep>", "<se", "[INST]", "\n\n", "▁▁▁", "the", "a b", "(?x", "é"]
UNLIKE_LLAMAS = {
    "unigram": ({"model_type": "unigram", "vocab_size": 300}, "is a unigram model"),
    "char": ({"model_type": "char"}, "is a char model"),
    "word": ({"model_type": "word", "vocab_size": 300}, "is a word model"),
    "nmt_nfkc": ({"normalization_rule_name": "nmt_nfkc"}, r"normalises its text \(nmt_nfkc\)"),
    "no dummy prefix": ({"add_dummy_prefix": False}, r"puts no space before a text \(add_dummy_prefix is off\)"),
    "suffix": ({"treat_whitespace_as_suffix": True}, r"\(treat_whitespace_as_suffix\)"),
    "extra spaces": ({"remove_extra_whitespaces": True}, r"removes spaces \(remove_extra_whitespaces\)"),
}


@pytest.fixture(scope="module")
def with_symbols(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("symbols") / "tokenizer.model"
    return load_tokenizer(vocabularies.train(path, user_defined_symbols=SYMBOLS, control_symbols=["<pad>", "<|user|>"]))


@pytest.mark.parametrize("case", UNLIKE_LLAMAS)
def test_what_export_cannot_convert_is_rejected_before_anything_is_made(tmp_path: Path, case: str):
    settings, what = UNLIKE_LLAMAS[case]
    path = vocabularies.train(tmp_path / "tokenizer.model", **settings)
    sentence = f"tokenizer.model: .*{what}.*, which export cannot convert; expected Llama's settings"
    raw = write_jsonl(tmp_path / "raw.jsonl", ["a text"])
    with pytest.raises(ConfigError, match=sentence):
        prepare(Preparation("mine", raw, source_format("mine"), path, tmp_path / "data"))
    for run in (import_megatron, import_litpkds):
        with pytest.raises(ConfigError, match=sentence):
            run(Import("mine", "train", path, tmp_path / "data"), [tmp_path / "absent"])
    assert not (tmp_path / "data").exists()


def test_all_that_is_unlike_is_said_at_once(tmp_path: Path):
    path = vocabularies.train(
        tmp_path / "t.model", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True, add_dummy_prefix=False
    )
    with pytest.raises(
        ConfigError, match="normalises its text .* and removes spaces .* and puts no space before a text"
    ):
        reject_inconvertible(load_tokenizer(path))


def test_a_vocabulary_without_bytes_can_be_converted(tmp_path: Path):
    reject_inconvertible(load_tokenizer(vocabularies.train(tmp_path / "t.model", byte_fallback=False, vocab_size=300)))


def test_chats_need_a_token_for_each_line_break(tmp_path: Path):
    path = vocabularies.train(tmp_path / "t.model", byte_fallback=False, vocab_size=300)
    raw = write_jsonl(tmp_path / "raw.jsonl", ["### Human: hello### Assistant: hello to you"])
    with pytest.raises(
        ConfigError, match=r"t.model: has no tokens for '\\n<\|assistant\|>\\n', which begins an answer"
    ):
        prepare(Preparation("mine", raw, ChatFormat(), path, tmp_path / "data"))


def test_the_probes_hold_every_piece(with_symbols: Tokenizer):
    texts = probe_texts(with_symbols)
    pieces = [piece.replace("▁", " ") for piece in with_symbols.pieces]
    assert not set(pieces) - set(texts)
    for unusual in (*with_symbols.user_defined, "<unk>", "<s>", "</s>", "<0x0A>", "<0xFF>", "<pad>", "<|user|>"):
        assert f"a{unusual.replace('▁', ' ')}b" in texts


def test_user_defined_symbols_are_converted(with_symbols: Tokenizer, texts: list[str]):
    assert with_symbols.user_defined == SYMBOLS
    reject_inconvertible(with_symbols)
    fast, rng = fast_tokenizer(with_symbols), random.Random(0)
    parts = [*SYMBOLS, " ", "  ", "a", "b", "\n", "x <", "ü", "<pad>", "</s>", "model"]
    mixed = ["".join(rng.choices(parts, k=rng.randint(2, 9))) for _ in range(3000)]
    for text in [*texts, *AWKWARD_TEXTS, *(text for text in mixed if text.replace(" ", "▁") not in SYMBOLS)]:
        ids = with_symbols.encode(text)
        assert fast.encode(text, add_special_tokens=False).ids == ids, text
        assert fast.decode(ids) == with_symbols.decode(ids)


def test_a_conversion_that_differs_in_one_symbol_is_found(tmp_path: Path):
    """The symbol as a piece that is merged, as plain ones are."""
    one_symbol = load_tokenizer(vocabularies.train(tmp_path / "t.model", user_defined_symbols=["<sep>"]))
    right = fast_tokenizer(one_symbol)
    without_symbols = type(right)(right.model)
    without_symbols.normalizer, without_symbols.decoder = right.normalizer, right.decoder
    assert difference_of(right, one_symbol) is None
    assert difference_of(without_symbols, one_symbol) == "a<sep>b"


@pytest.mark.skipif(not find_spec("gigatoken"), reason="gigatoken, or what it needs, is not installed")
def test_gigatoken_is_not_used_with_symbols_that_it_spells_out(
    with_symbols: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    texts = [f"{number} plain" if number % 64 == 0 else f"question {number}<sep>answer<sep>" for number in range(200)]
    raw = write_jsonl(tmp_path / "raw.jsonl", texts)
    arguments = ["prepare", "--source", "mine", "--input", str(raw), "--tokenizer", str(with_symbols.path), "--workers"]
    for encoder in ("auto", "sentencepiece"):
        assert main([*arguments, "1", "--encoder", encoder, "--output", str(tmp_path / encoder)]) == 0
    said = capsys.readouterr()
    assert (
        said.err.count("gigatoken cannot load it (it encodes user-defined symbols as text); sentencepiece encodes") == 1
    )
    assert said.out.count("(1 by sentencepiece)") == 2
    contents = [(tmp_path / name / "mine/train/shard_00000.bin").read_bytes() for name in ("auto", "sentencepiece")]
    assert contents[0] == contents[1]
    assert main([*arguments, "1", "--encoder", "gigatoken", "--output", str(tmp_path / "named")]) == 78
    assert (
        "the encoder gigatoken cannot load it (it encodes user-defined symbols as text); expected"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "named").exists()


@pytest.mark.skipif(not find_spec("gigatoken"), reason="gigatoken, or what it needs, is not installed")
def test_gigatoken_is_not_used_with_a_vocabulary_that_it_cannot_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = load_tokenizer(vocabularies.train(tmp_path / "t.model", byte_fallback=False, vocab_size=300))
    assert load_gigatoken(tokenizer, "auto") is None
    assert "t.model: gigatoken cannot load it (byte_fallback is set but" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="the encoder gigatoken cannot load it"):
        load_gigatoken(tokenizer, "gigatoken")


@pytest.mark.parametrize("name", ["gigatoken", "tokenizers"])
def test_llama_2s_vocabulary_passes(llama2_tokenizer: Tokenizer, name: str):
    if name == "tokenizers":
        reject_inconvertible(llama2_tokenizer)
    else:
        assert load_gigatoken(llama2_tokenizer, "gigatoken") is not None
