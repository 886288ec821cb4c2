"""Exported folders in the programs of others: litgpt, whose code TinyLlama was trained with, and llama.cpp."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from launching import TIMEOUT

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.hf.convert import PROBE_TEXTS, ExportOptions, export
from tinyllama_ds.model.config import MODEL_SIZES, LlamaConfig
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model

CONFIG = MODEL_SIZES["test"]
LLAMA_CPP = Path(os.environ.get("LLAMA_CPP", "")) / "convert_hf_to_gguf.py"


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


@pytest.mark.skipif(not LLAMA_CPP.is_file(), reason="LLAMA_CPP names no checkout of llama.cpp")
def test_llama_cpp_converts_to_gguf(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own script, then its own reader: the same numbers, pieces, ids and interpolation."""
    config = replace(CONFIG, rope_scaling_factor=4.0)
    ours = exported(config, tokenizer, tmp_path / "hf", "5GB")
    command = [sys.executable, LLAMA_CPP, tmp_path / "hf", "--outfile", tmp_path / "model.gguf", "--outtype", "f32"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert finished.returncode == 0, finished.stderr
    monkeypatch.syspath_prepend(LLAMA_CPP.parent / "gguf-py")
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
