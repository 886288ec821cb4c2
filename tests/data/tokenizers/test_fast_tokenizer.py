"""`tokenizer.json` against the tokenizers library and transformers, from encoding to the audit of what was prepared."""

import json
import os
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import fast_folders
import numpy as np
import pytest
import tokenizers
import transformers
from corpora import AWKWARD_TEXTS, made_up_text, write_jsonl

from tinyllama_ds.cli import main
from tinyllama_ds.data.audit.audit import audit_data
from tinyllama_ds.data.chat import ANSWER_HEADER, Message, chat_template, conversation_ids, prompt_ids
from tinyllama_ds.data.loader import open_streams
from tinyllama_ds.data.packing import open_stream
from tinyllama_ds.data.prepare.conversations import ChatFormat
from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.prepare.sources import source_format
from tinyllama_ds.data.shards import ShardReader
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.encoding import load_gigatoken
from tinyllama_ds.data.tokenizers.storage import load_tokenizer, store_tokenizer
from tinyllama_ds.errors import ConfigError

needs_gigatoken = pytest.mark.skipif(
    not (find_spec("gigatoken") and find_spec("awkward")), reason="gigatoken, or what it needs, is not installed"
)
SPECIAL = "<|endoftext|><|im_end|> <|begin_of_text|>x<|eot_id|><|reserved_special_token_3|>"
TEXTS = [*AWKWARD_TEXTS, *(made_up_text(seed, 50) for seed in range(20)), SPECIAL, "a\x04b (\x06) \U00080000", ""]


@pytest.fixture(scope="module", params=["smollm2", "llama_3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return getattr(fast_folders, request.param)(tmp_path_factory.mktemp(request.param))


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def by_library(folder: Path) -> tokenizers.Tokenizer:
    """The library's own tokenizer, to which special tokens in a text are text."""
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.encode_special_tokens = True
    fast.no_truncation()
    fast.no_padding()
    return fast


def test_ids_and_texts_are_those_of_tokenizers_and_transformers(folder: Path, tokenizer: Tokenizer) -> None:
    reference = by_library(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids, lengths = tokenizer.encode_batch(TEXTS)
    for text, found in zip(TEXTS, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        expected = reference.encode(text, add_special_tokens=False).ids
        assert found.tolist() == tokenizer.encode(text) == expected, text
        assert theirs.encode(text, add_special_tokens=False, split_special_tokens=True) == expected, text
        assert tokenizer.decode(expected) == reference.decode(expected) == tokenizer.readable(text)
        assert not set(expected) & set(tokenizer.special_ids)
    assert tokenizer.decode([*expected, tokenizer.eos_id, tokenizer.vocab_size, 10**6]) == "", "they have no text"
    assert tokenizer.vocab_size == reference.get_vocab_size()
    tokenizer.reject_inconvertible()


def test_special_ids_have_the_roles_that_the_folder_gives_them(folder: Path, tokenizer: Tokenizer) -> None:
    name = by_library(folder).id_to_token
    found = [number if number is None else name(number) for number in
             (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id)]  # fmt: skip
    if (folder / "tokenizer_config.json").is_file():
        assert found == ["<|endoftext|>"] * 3 + [None]
    else:
        assert found == ["<|begin_of_text|>", "<|end_of_text|>", None, None]


def test_what_is_stored_is_the_same_tokenizer(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    store_tokenizer(tokenizer, tmp_path / "data")
    stored = load_tokenizer(tmp_path / "data")
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["special_tokens_map.json", "tokenizer.json"]
    assert (stored.sha256, stored.files, stored.special_ids) == (
        tokenizer.sha256, tokenizer.files, tokenizer.special_ids,
    )  # fmt: skip
    content = json.loads((folder / "tokenizer.json").read_text())
    without = {"truncation": None, "padding": None, "post_processor": None}
    assert json.loads(stored.files["tokenizer.json"]) == content | without
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "data")
    assert theirs.eos_token_id == tokenizer.eos_id


def test_another_role_is_another_tokenizer(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same pieces, but documents end with a different token."""
    store_tokenizer(tokenizer, tmp_path)
    roles = json.loads((tmp_path / "special_tokens_map.json").read_text())
    other = by_library(folder).id_to_token(tokenizer.eos_id + 1)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles | {"eos_token": other}))
    changed = load_tokenizer(tmp_path)
    assert changed.sha256 != tokenizer.sha256
    assert changed.eos_id == tokenizer.eos_id + 1
    with pytest.raises(ConfigError, match="differs from .*; one data directory holds tokens of one tokenizer"):
        store_tokenizer(tokenizer, tmp_path)


# --- gigatoken --------------------------------------------------------------------------------------------------------


@needs_gigatoken
def test_gigatoken_is_verified_and_equal(tokenizer: Tokenizer) -> None:
    """On source code, and on mixtures of what encoders tend to get wrong."""
    fast, rng = load_gigatoken(tokenizer, "gigatoken"), random.Random(0)
    assert fast is not None
    parts = ["  ", "   ", "\n", "\n\n", "\t", "7", "12", "½", "①", "²", "Ⅳ", "٣", "中", "a", "the ", "é", "'s", "(",
             "\x04", "\x1c", "\u3000", "\u200b", "<|endoftext|>", "🙂", "\U00080000", " model", "."]  # fmt: skip
    mixed = ["".join(rng.choices(parts, k=rng.randint(0, 12))) for _ in range(4000)]
    code = [path.read_text(errors="replace") for path in sorted(Path(os.__file__).parent.glob("*.py"))[:15]]
    for texts in (mixed, [*TEXTS, *code], ["", "", ""], [""], []):
        (ids, lengths), (expected, counts) = fast(texts), tokenizer.encode_batch(texts)
        assert np.array_equal(lengths, counts)
        assert np.array_equal(ids, expected)


@needs_gigatoken
def test_gigatoken_is_not_used_for_words_that_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fast_folders.llama_3(tmp_path)
    fast_folders.change(
        folder,
        lambda content: content["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\w+|\W"}),
    )
    tokenizer = load_tokenizer(folder)
    assert load_gigatoken(tokenizer, "auto") is None
    assert "gigatoken cannot load it (Unknown pre_tokenizer" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="cannot load it .*; expected --encoder auto or tokenizers"):
        load_gigatoken(tokenizer, "gigatoken")


@needs_gigatoken
def test_gigatoken_is_not_used_where_pieces_join_digits_that_are_split(tmp_path: Path) -> None:
    folder = fast_folders.smollm2(tmp_path)
    fast_folders.change(folder, lambda content: content["model"]["vocab"].update({"12": 600}))
    with pytest.raises(ConfigError, match="it has pieces with several digits, but its pre-tokenizer splits them"):
        load_gigatoken(load_tokenizer(folder), "gigatoken")


def test_an_encoder_that_does_not_read_the_file_is_rejected(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        ConfigError, match="the encoder sentencepiece does not read this file; expected --encoder auto or tokenizers"
    ):
        load_gigatoken(tokenizer, "sentencepiece")
    assert load_gigatoken(tokenizer, "tokenizers") is None


# --- prepared data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["tokenizers", pytest.param("gigatoken", marks=needs_gigatoken)])
def test_documents_are_prepared_and_the_audit_agrees(
    encoder: str, folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    documents = [text for text in TEXTS if text]
    raw = write_jsonl(tmp_path / "raw.jsonl", documents)
    (manifest,) = prepare(Preparation("mine", raw, source_format("mine"), folder, tmp_path / "data", encoder))
    assert manifest.end_of_document == f"one EOS (id {tokenizer.eos_id}) after each document, no BOS"
    assert (manifest.inputs[0].encoder, manifest.dtype) == (encoder, "uint16")
    reference = by_library(folder)
    expected = [[*reference.encode(text, add_special_tokens=False).ids, tokenizer.eos_id] for text in documents]
    tokens = np.fromfile(tmp_path / "data/mine/train/shard_00000.bin", manifest.dtype)
    assert tokens.tolist() == sum(expected, [])
    audit = audit_data(tmp_path / "data", {"mine": raw}, samples=50, workers=1)
    assert (audit.problems, audit.compared_with_raw) == ([], len(documents))


def test_ids_beyond_16_bits_are_stored_in_32(tmp_path: Path) -> None:
    """65,536 ids fit uint16; one more does not."""
    for vocab_size, dtype in ((65_536, "uint16"), (65_537, "int32")):
        folder = tmp_path / str(vocab_size)
        path = fast_folders.with_many_ids(folder, vocab_size)
        raw = write_jsonl(tmp_path / "raw.jsonl", ["ab ab", "b"])
        (manifest,) = prepare(Preparation("mine", raw, source_format("mine"), path, folder / "data"))
        assert (manifest.dtype, manifest.largest_id, manifest.vocab_size) == (dtype, vocab_size - 1, vocab_size)
        shard = folder / "data/mine/train/shard_00000"
        tokens = np.fromfile(shard.with_suffix(".bin"), dtype)
        assert tokens.tolist() == ShardReader(shard).read(0, manifest.tokens).tolist()
        assert tokens.tolist().count(vocab_size - 1) == 2
        assert audit_data(folder / "data", {"mine": raw}, samples=2, workers=1).problems == []
        index = shard.with_suffix(".idx")
        shared = ["--tokenizer", str(path), "--output", str(folder / "imported"), "--source", "mine"]
        assert main(["import-megatron", str(index), *shared]) == 0
        assert ShardReader(folder / "imported/mine/train/shard_00000").manifest.dtype == dtype


def test_a_vocabulary_may_be_smaller_than_the_embedding_by_padding_alone(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", ["ab"] * 10)
    prepare(Preparation("mine", raw, source_format("mine"), fast_folders.smollm2(tmp_path / "f"), tmp_path / "data"))
    for rows in (600, 640, 1624):
        assert open_streams(tmp_path / "data", ["mine"], "train", rows)
    for rows in (599, 1625, 49_152):
        with pytest.raises(
            ConfigError,
            match=f"tokenizer.json: has 600 pieces, but the model's vocabulary is {rows}; expected 600, or up to 1024",
        ):
            open_streams(tmp_path / "data", ["mine"], "train", rows)


def test_shards_of_two_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    raw = write_jsonl(tmp_path / "raw.jsonl", ["ab"] * 10)
    for name in ("smollm2", "llama_3"):
        folder = getattr(fast_folders, name)(tmp_path / name)
        prepare(Preparation(name, raw, source_format("mine"), folder, tmp_path / f"data {name}"))
    (tmp_path / "data llama_3" / "llama_3").rename(tmp_path / "data smollm2" / "llama_3")
    with pytest.raises(
        ConfigError, match=r"shard_00000.bin: was made with a different tokenizer than .*tokenizer.json"
    ):
        open_streams(tmp_path / "data smollm2", ["smollm2", "llama_3"], "train", 711)
    with pytest.raises(ConfigError, match="tokenizer.json: differs from .*; one data directory holds tokens of one"):
        prepare(Preparation("mine", raw, source_format("mine"), tmp_path / "llama_3", tmp_path / "data smollm2"))


# --- conversations ----------------------------------------------------------------------------------------------------

ANSWERS = ["Hello", " Hello", "\n\nHello", "", "42", "\n", "    x = 1\n"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_prompt_is_the_beginning_of_its_conversation(tokenizer: Tokenizer, answer: str) -> None:
    question = [Message("system", "Be brief.\n"), Message("user", "Two and two?\n\n")]
    ids, mask = conversation_ids(tokenizer, [*question, Message("assistant", answer)])
    prompt = prompt_ids(tokenizer, question)
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    assert ids[len(prompt) :] == [*tokenizer.encode(answer), tokenizer.eos_id]
    assert ids.count(tokenizer.eos_id) == 3


def test_transformers_renders_the_same_conversations(folder: Path, tokenizer: Tokenizer) -> None:
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.to_fast(),
        eos_token=by_library(folder).id_to_token(tokenizer.eos_id),
        chat_template=chat_template(tokenizer),
    )
    for content in ("Hello", "two lines\nof\n\n text \n", "2024 (½)", SPECIAL):
        messages = [Message(role, content) for role in ("system", "user", "assistant", "user", "assistant")]
        turns = [{"role": message.role, "content": message.content} for message in messages]
        rendered = theirs.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        if content == SPECIAL:
            assert rendered["input_ids"].count(tokenizer.eos_id) == 5
            special = {theirs.convert_tokens_to_ids(token) for token in tokenizer.control_tokens()}
            assert special & set(rendered["input_ids"]) == {tokenizer.eos_id}
        else:
            assert (rendered["input_ids"], rendered["assistant_masks"]) == conversation_ids(tokenizer, messages)


def test_conversations_are_prepared_padded_and_audited(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    chats = [f"### Human: question {number}### Assistant: {made_up_text(number, 12)}" for number in range(30)]
    raw = write_jsonl(tmp_path / "raw.jsonl", chats)
    (manifest,) = prepare(Preparation("mine", raw, ChatFormat(max_tokens=128), folder, tmp_path / "data"))
    assert manifest.end_of_document == f"one EOS (id {tokenizer.eos_id}) after each turn, no BOS"
    assert audit_data(tmp_path / "data", {"mine": raw}, samples=30, workers=1).problems == []
    stream = open_stream(tmp_path / "data/mine/train")
    samples = np.stack([stream.sample(index, 128) for index in range(stream.num_samples(128))])
    assert (samples[:, -1] == tokenizer.eos_id).all()
    header = tokenizer.encode(ANSWER_HEADER)
    assert str(header)[1:-1] in str(samples[0].tolist())


# --- files that are not right -----------------------------------------------------------------------------------------


def add(*texts: str, special: bool = True) -> Callable[[dict], object]:
    """Further added tokens, with ids of their own."""

    def edit(content: dict) -> None:
        for number, text in enumerate(texts):
            content["added_tokens"].append(content["added_tokens"][0] | {
                "id": 600 + number, "content": text, "special": special,
            })  # fmt: skip

    return edit


BAD_FILES: dict[str, tuple[Callable[[dict], object], str]] = {
    "type": (
        lambda content: content["model"].update(type="Unigrim"),
        "has a model of the type 'Unigrim'; expected BPE",
    ),
    "word pieces": (lambda content: content["model"].update(type="WordPiece"), "of the type 'WordPiece'; expected BPE"),
    "no model": (lambda content: content.pop("model"), "not a tokenizer.json, it is damaged or has no model"),
    "merges": (lambda content: content["model"].update(merges=[["zz", "yy"]]), "the tokenizers library cannot read it"),
    "overlap": (add("<one>two", "two<three>"), "its added tokens '<one>two' and 'two<three>' overlap, so that"),
    "contained": (add("<word>", "a <word> b"), "its added tokens '<word>' and 'a <word> b' overlap, so that"),
    "one id": (
        lambda content: content["added_tokens"].append(content["added_tokens"][1] | {"content": "<other>"}),
        "its added token '<other>' overlaps with a different token of the same id or text; expected one id for each",
    ),
    "one text": (
        lambda content: content["added_tokens"].append(content["added_tokens"][1]),
        "its added token '<|im_start|>' overlaps with a different token of the same id or text",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_rejected_in_one_sentence(tmp_path: Path, case: str) -> None:
    edit, sentence = BAD_FILES[case]
    path = fast_folders.change(fast_folders.smollm2(tmp_path), edit)
    with pytest.raises(ConfigError) as raised:
        load_tokenizer(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert sentence in str(raised.value)


def test_runs_of_spaces_may_contain_each_other(tmp_path: Path) -> None:
    """As GPT-NeoX has them; the library matches the longest."""
    path = fast_folders.change(fast_folders.smollm2(tmp_path), add("  ", "    ", special=False))
    assert load_tokenizer(path).encode("a     b") == by_library(tmp_path).encode("a     b").ids


BAD_ROLES = {
    "unknown": ({}, "tokenizer.json: its eos_token, which separates documents, is unknown; expected it in one of"),
    "not a token": ({"eos_token": "<nothing>"}, "tokenizer_config.json: its eos_token '<nothing>' is not a token of"),
    "not an id": ({"eos_token_id": 600}, "tokenizer_config.json: its eos_token_id 600 is not the id of a token"),
    "not a number": ({"eos_token_id": "two"}, "its eos_token_id 'two' is not the id of a token"),
}


@pytest.mark.parametrize("case", BAD_ROLES)
def test_roles_that_name_no_token_are_rejected(tmp_path: Path, case: str) -> None:
    roles, sentence = BAD_ROLES[case]
    folder = fast_folders.smollm2(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    with pytest.raises(ConfigError) as raised:
        load_tokenizer(folder)
    assert sentence in str(raised.value)


def test_a_damaged_file_of_roles_is_rejected(tmp_path: Path) -> None:
    folder = fast_folders.smollm2(tmp_path)
    (folder / "special_tokens_map.json").write_text('{"eos_')
    with pytest.raises(ConfigError, match="special_tokens_map.json: is damaged; expected a JSON object"):
        load_tokenizer(folder)


def test_a_tokenizer_that_loses_text_is_rejected(tmp_path: Path) -> None:
    """Its normalizer may change a text, but what it encodes comes back."""
    path = fast_folders.change(fast_folders.smollm2(tmp_path), lambda content: content.update(decoder={"type": "Fuse"}))
    with pytest.raises(ConfigError, match="decoding the ids of .* does not give the text; expected byte-level BPE"):
        load_tokenizer(path).reject_inconvertible()


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_trained_tokenizer_encodes_every_text_and_splits_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = write_jsonl(tmp_path / "raw" / "a.jsonl", fast_folders.TEXT)
    output = tmp_path / "tokenizer.json"
    arguments = ["train-tokenizer", "--type", "bpe", "--input", str(raw.parent), "--vocab-size", "500"]
    assert main([*arguments, "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: 500 pieces\n"
    tokenizer = load_tokenizer(output)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, None)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    assert len(tokenizer.encode("2024")) == 4
    assert main([*arguments, "--output", str(output)]) == 78
    assert "already exists; expected a new file" in capsys.readouterr().err


def test_too_little_text_for_so_many_pieces_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_jsonl(tmp_path / "raw" / "a.jsonl", ["a few words"])
    arguments = ["train-tokenizer", "--type", "bpe", "--input", str(raw.parent), "--vocab-size", "5000"]
    assert main([*arguments, "--output", str(tmp_path / "tokenizer.json")]) == 78
    assert "training a tokenizer with 5000 pieces failed: the text gives" in capsys.readouterr().err
    assert not (tmp_path / "tokenizer.json").exists()
