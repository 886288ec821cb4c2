"""Exported folders in the programs of others: litgpt, whose code TinyLlama was trained with, and llama.cpp."""

from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from llama_cpp_converter import convert, unpack_converter
from llama_server import Ask, llama_cpp, serving

from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.hf.convert import PROBE_TEXTS, ExportOptions, export
from tinyllama_ds.model.config import MODEL_SIZES, LlamaConfig
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model

CONFIG = MODEL_SIZES["test"]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_converter(tmp_path_factory.mktemp("converter"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return llama_cpp(tmp_path_factory.mktemp("llama_cpp"))


def exported(config: LlamaConfig, tokenizer: Tokenizer, folder: Path, size: str) -> LlamaForCausalLM:
    """A model with weights large enough that differences show, and its Hugging Face folder."""
    model = build_model(config, "eager", seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    export(model.state_dict().items(), config, tokenizer, folder, ExportOptions(max_shard_size=size))
    return model


@pytest.mark.parametrize("size", ["5GB", "100KB"])
def test_litgpt_converts_and_gives_our_logits_and_ids(
    size: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own script, told the shapes as its table of models tells TinyLlama's."""
    pytest.importorskip("litgpt", reason="litgpt is not installed")
    from litgpt import GPT, Config
    from litgpt import Tokenizer as LitTokenizer
    from litgpt.config import name_to_config
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    ours = exported(CONFIG, tokenizer, tmp_path / "hf", size)
    shapes = {
        "name": "tiny-llama-test",
        "block_size": CONFIG.max_position_embeddings,
        "vocab_size": CONFIG.vocab_size,
        "padded_vocab_size": CONFIG.vocab_size,
        "n_layer": CONFIG.num_hidden_layers,
        "n_head": CONFIG.num_attention_heads,
        "n_query_groups": CONFIG.num_key_value_heads,
        "n_embd": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
    }
    monkeypatch.setitem(name_to_config, "tiny-llama-test", name_to_config["tiny-llama-1.1b"] | shapes)
    convert_hf_checkpoint(tmp_path / "hf", model_name="tiny-llama-test")
    theirs = GPT(Config.from_file(tmp_path / "hf" / "model_config.yaml"))
    theirs.load_state_dict(torch.load(tmp_path / "hf" / "lit_model.pth", weights_only=True), strict=True)
    ids = torch.randint(CONFIG.vocab_size, (2, 50), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids), ours(ids), rtol=1e-4, atol=1e-4)
    lit_tokenizer = LitTokenizer(tmp_path / "hf")
    assert (lit_tokenizer.bos_id, lit_tokenizer.eos_id) == (1, 2)
    for text in PROBE_TEXTS[:6]:  # it parses control tokens in texts
        assert lit_tokenizer.encode(text, bos=False).tolist() == tokenizer.encode(text), text


@pytest.mark.real
def test_llama_cpp_converts_to_gguf(
    converter: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own script, then its own reader: the same numbers, pieces, ids and interpolation."""
    config = replace(CONFIG, rope_scaling_factor=4.0)
    ours = exported(config, tokenizer, tmp_path / "hf", "5GB")
    convert(converter, tmp_path / "hf", tmp_path / "model.gguf")
    monkeypatch.syspath_prepend(converter / "gguf-py")
    from gguf import GGUFReader

    reader = GGUFReader(tmp_path / "model.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "llama"
    assert said["llama.attention.head_count_kv"] == config.num_key_value_heads
    assert (said["llama.rope.scaling.type"], said["llama.rope.scaling.factor"]) == ("linear", 4.0)
    assert said["tokenizer.ggml.tokens"] == tokenizer.pieces
    special = ("unknown_token_id", "bos_token_id", "eos_token_id", "add_bos_token", "add_eos_token")
    assert [said[f"tokenizer.ggml.{name}"] for name in special] == [0, 1, 2, False, False]
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    expected = ours.state_dict()
    assert len(found) == len(expected)
    assert torch.equal(found["output.weight"], expected["lm_head.weight"])
    for theirs, name, heads in (
        ("attn_q", "self_attn.q_proj", config.num_attention_heads),
        ("attn_k", "self_attn.k_proj", config.num_key_value_heads),
        ("attn_v", "self_attn.v_proj", 0),
        ("ffn_gate", "mlp.gate_proj", 0),
    ):
        weight = expected[f"model.layers.1.{name}.weight"]
        if heads:  # llama.cpp rotates neighbours, Hugging Face halves
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(found[f"blk.1.{theirs}.weight"], weight), theirs


@pytest.mark.real
def test_llama_cpp_has_the_ids_and_text_of_a_sentencepiece_model(
    converter: Path, server: list[str], wide_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """A vocabulary of 32,000 pieces."""
    exported(replace(CONFIG, vocab_size=32_000), wide_tokenizer, tmp_path / "hf", "5GB")
    with serving(server, convert(converter, tmp_path / "hf", tmp_path / "model.gguf"), 128) as ask:
        for text in [PROMPT, "  two  spaces\tand a tab", "小羊驼 1,234 é 👍🏽"]:
            ids = ids_of(ask, text)
            assert ids == wide_tokenizer.encode(text)
            assert continued(ask, text, 24) == greedy(tmp_path / "hf", ids, 24)


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_llama_cpp_has_the_ids_and_text_of_smollm2(
    dtype: str, converter: Path, server: list[str], smollm2: Path, tmp_path: Path
) -> None:
    """64 tokens of a trained model, exported from what was imported."""
    assert main(["import", str(smollm2), str(tmp_path / "ours")]) == 0
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "hf")]) == 0
    with serving(server, convert(converter, tmp_path / "hf", tmp_path / "model.gguf", dtype)) as ask:
        ids, found = ids_of(ask, PROMPT), continued(ask, PROMPT, 64)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert ids == tokenizer.encode(PROMPT).ids
    assert tokenizer.decode(found).startswith(" Paris")
    assert found == greedy(tmp_path / "hf", ids, 64)


def ids_of(ask: Ask, text: str) -> list[int]:
    """With what llama.cpp adds to a prompt by the settings of the file, which is nothing."""
    return ask("/tokenize", {"content": text, "add_special": True})["tokens"]


def continued(ask: Ask, prompt: str, tokens: int) -> list[int]:
    """The greedy ids after a prompt, up to and with an EOS."""
    question = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "top_k": 1, "cache_prompt": False}
    return ask("/completion", question | {"return_tokens": True})["tokens"]


def greedy(folder: Path, ids: list[int], tokens: int) -> list[int]:
    """The same by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, len(ids) :].tolist()
