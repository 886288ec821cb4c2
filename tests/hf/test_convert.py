"""The Hugging Face folder: the tokenizer gives sentencepiece's ids, and a wrong folder is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from llama2 import LLAMA2, needs_llama2
from safetensors.torch import load_file, save_file

from tinyllama_ds.data.tokenizers import sentencepiece_tokenizer
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.sentencepiece_tokenizer import ranked_merges
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf import convert
from tinyllama_ds.hf.convert import PROBE_TEXTS, ExportOptions, export, hf_tokenizer
from tinyllama_ds.hf.weights import INDEX_FILE
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.model.probe import Probe, probe_loss

CONFIG = MODEL_SIZES["test"]
# Beyond the texts on which every export proves itself.
TEXTS = [
    *(width * " " + "x" for width in range(1, 40)),
    *(f"a{width * ' '}b" for width in (2, 3, 7, 8, 15, 16, 17, 31, 63, 300)),
    "\t\t x\n \n  \n\t \r\n\x0b\x0c\u00a0\u2003\u200b\ufeff",
    "#!/bin/sh\nif [ -z \"$1\" ]; then\n\techo 'no $@' >&2\nfi\n",
    "std::vector<std::pair<int, T*>> v{{1, &a}}; // -> [](auto&& x) noexcept { return x->y; }",
    "SELECT * FROM \"t\" WHERE a <> 'b' -- c\n",
    "小羊驼在山上。「你好，世界」\u3000全角空格；繁體字與简体字 𠮷野家 \u9fff",
    "日本語の文章、カタカナとひらがな。ｶﾀｶﾅ 한국어 문장 ไทย Tiếng Việt",
    "👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 🇨🇭 👍🏽 ☺\ufe0f e\u0301 é",
    "<s>[INST] <<SYS>>\n</s><unk><pad><|im_start|>user<|im_end|><0x0A><0xFF> [/INST]",
    "</s>", "<s>", "<unk>", "x</s>y", " <s> ", "▁▁ ▁x", "\x00\x01\x7f\x80\u202e\U0010ffff", "a" * 500, "=" * 300,
]  # fmt: skip


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16() for name, tensor in build_model(CONFIG, "eager", seed=1).state_dict().items()}


def python_sources() -> list[str]:
    return [path.read_text() for path in sorted(Path(convert.__file__).parent.rglob("*.py"))]


def test_token_ids_equal_sentencepiece(tokenizer: Tokenizer, tmp_path: Path) -> None:
    hf_tokenizer(tokenizer, 128).save_pretrained(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*PROBE_TEXTS, *TEXTS, *python_sources()]:
        assert fast.encode(text, split_special_tokens=True) == tokenizer.encode(text), text[:80]
        assert fast.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


@needs_llama2
def test_token_ids_equal_sentencepiece_with_llamas_own_vocabulary(tmp_path: Path) -> None:
    """Runs of spaces are where transformers' own conversion differs."""
    tokenizer = load_tokenizer(LLAMA2)
    hf_tokenizer(tokenizer, 2048).save_pretrained(tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*PROBE_TEXTS, *TEXTS, *python_sources()]:
        assert fast.encode(text, split_special_tokens=True) == tokenizer.encode(text), text[:80]
        assert fast.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_exported_weights_are_the_same_bits(tokenizer: Tokenizer, weights: dict, tmp_path: Path) -> None:
    """In whatever order they come: optimizers with groups do not keep the model's."""
    assert export(reversed(weights.items()), CONFIG, tokenizer, tmp_path / "hf") < convert.LOGIT_TOLERANCE
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "hf").iterdir())


def test_weights_that_differ_are_rejected_and_leave_nothing(
    tokenizer: Tokenizer, weights: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in the writing itself: two projections swapped in the file."""
    real = convert.write_weights

    def swapped(folder: Path, *arguments: object) -> object:
        written = real(folder, *arguments)
        stored = load_file(folder / "model.safetensors")
        layer = "model.layers.0.mlp"
        names = f"{layer}.gate_proj.weight", f"{layer}.up_proj.weight"
        stored[names[0]], stored[names[1]] = stored[names[1]], stored[names[0]]
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        return written

    monkeypatch.setattr(convert, "write_weights", swapped)
    with pytest.raises(ConfigError, match="transformers loads different bits of model.layers.0.mlp.gate_proj.weight"):
        export(weights.items(), CONFIG, tokenizer, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_logits_that_differ_are_rejected_and_leave_nothing(
    tokenizer: Tokenizer, weights: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in the description: another base of the rotation."""
    real = convert.hf_config
    monkeypatch.setattr(convert, "hf_config", lambda config, *more: real(replace(config, rope_theta=500.0), *more))
    with pytest.raises(ConfigError, match="logits differ from ours"):
        export(weights.items(), CONFIG, tokenizer, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_shards_are_within_their_size_and_load_in_transformers(
    tokenizer: Tokenizer, weights: dict, tmp_path: Path
) -> None:
    export(weights.items(), CONFIG, tokenizer, tmp_path / "ours", ExportOptions(max_shard_size="100KB"))
    convert.hf_model(weights, CONFIG).save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    shards = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(4)]
    assert all(sum(t.numel() * t.element_size() for t in load_file(shard).values()) <= 100_000 for shard in shards)
    ours, theirs = (json.loads((tmp_path / name / INDEX_FILE).read_text()) for name in ("ours", "theirs"))
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"] == {name: shard.name for shard in shards for name in load_file(shard)}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())
    with pytest.raises(ConfigError, match="--max-shard-size big: expected a size such as 5GB"):
        export(weights.items(), CONFIG, tokenizer, tmp_path / "hf", ExportOptions(max_shard_size="big"))


def test_the_description_is_what_transformers_writes(tokenizer: Tokenizer, weights: dict, tmp_path: Path) -> None:
    export(weights.items(), CONFIG, tokenizer, tmp_path / "ours")
    convert.hf_model(weights, CONFIG, tokenizer).save_pretrained(tmp_path / "theirs")
    for name in ("config.json", "generation_config.json"):
        ours, theirs = (json.loads((tmp_path / folder / name).read_text()) for folder in ("ours", "theirs"))
        assert ours == theirs


def test_token_ids_that_differ_are_rejected(
    tokenizer: Tokenizer, weights: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in the tokenizer's conversion: merges in the opposite order."""
    monkeypatch.setattr(sentencepiece_tokenizer, "ranked_merges", lambda tokenizer: ranked_merges(tokenizer)[::-1])
    with pytest.raises(ConfigError, match="gives different ids for .* than sentencepiece"):
        export(weights.items(), CONFIG, tokenizer, tmp_path / "hf")
    monkeypatch.setattr(type(tokenizer), "reject_inconvertible", lambda tokenizer: None)
    with pytest.raises(ConfigError, match="token ids of .* differ from sentencepiece's"):
        export(weights.items(), CONFIG, tokenizer, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_folder_must_give_the_loss_that_training_had(
    document_mask: bool, tokenizer: Tokenizer, weights: dict, tmp_path: Path
) -> None:
    """The probe of a checkpoint, computed in bf16 as training does; then one whose weights had another loss."""
    model = build_model(CONFIG, "sdpa", seed=1).bfloat16()
    model.load_state_dict(weights)
    tokens = tokenizer.encode(" ".join(PROBE_TEXTS))[:65]
    document_ids = [number // 20 for number in range(64)] if document_mask else None
    loss = probe_loss(model, tokens, document_ids, 2, torch.device("cpu"))
    probe = Probe(tokens, document_ids, loss, "bfloat16", {})
    export(weights.items(), CONFIG, tokenizer, tmp_path / "hf", ExportOptions(probe))
    with pytest.raises(ConfigError, match=r"the loss on the checkpoint's probe is \d\.\d+ and was .* in training"):
        export(weights.items(), CONFIG, tokenizer, tmp_path / "other", ExportOptions(replace(probe, loss=1.01 * loss)))
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
