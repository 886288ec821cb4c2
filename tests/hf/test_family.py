"""The published Llamas, by their own `config.json`: their size, their logits, and out and in again."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fast_folders
import pytest
import torch
import transformers
from llama_family import FAMILY

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer, write_tokenizer
from tinyllama_ds.hf.convert import export
from tinyllama_ds.hf.import_model import import_hf_folder, read_config
from tinyllama_ds.hf.model_folder import open_model_folder
from tinyllama_ds.model.config import Llama3Scaling
from tinyllama_ds.model.llama import assign_weights, empty_model

LAYERS = 2
POSITIONS = 512  # enough for the stretched waves of llama3 to differ from the others by more than rounding
ALWAYS = {  # what transformers 5 writes for a Llama, whether or not the original had it
    *("attention_bias", "head_dim", "mlp_bias", "num_key_value_heads", "pretraining_tp", "rope_parameters"),
    *("rms_norm_eps", "tie_word_embeddings", "use_cache"),
}
NOT_KEPT = {  # of training, of the tokenizer and of transformers 4; rope_parameters has the rope
    *("_name_or_path", "initializer_range", "is_llama_config", "pad_token_id", "rope_interleaved", "rope_scaling"),
    *("rope_theta", "torch_dtype", "transformers_version"),
}


def reduced(raw: dict, tokenizer: Tokenizer) -> dict:
    """Two layers of two key heads with the original's head size and queries per key, and a small vocabulary."""
    heads = raw["num_attention_heads"]
    queries_per_key = heads // raw.get("num_key_value_heads", heads)
    sizes = {"num_attention_heads": 2 * queries_per_key, "num_key_value_heads": 2, "intermediate_size": 160}
    sizes["hidden_size"] = 2 * queries_per_key * raw["hidden_size"] // heads
    return with_few_layers(raw, tokenizer) | {key: value for key, value in sizes.items() if key in raw}


def with_few_layers(raw: dict, tokenizer: Tokenizer) -> dict:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return raw | ids | {"num_hidden_layers": LAYERS, "vocab_size": tokenizer.vocab_size}


def write_original(folder: Path, raw: dict, tokenizer: Tokenizer) -> None:
    """Random weights, with the description as it was published."""
    transformers.set_seed(1)
    dtype = getattr(torch, raw["torch_dtype"])
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(raw)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))
    write_tokenizer(tokenizer, folder)


@pytest.fixture
def tokenizer_of(tokenizer: Tokenizer, tmp_path: Path) -> dict[str, Tokenizer]:
    """By the first word of a model's name."""
    fast = {"SmolLM2": fast_folders.smollm2, "Llama": fast_folders.llama_3}
    made = {name: load_tokenizer(write(tmp_path / "tokenizers" / name)) for name, write in fast.items()}
    return made | {"TinyLlama": tokenizer, "OpenLLaMA": tokenizer}


@pytest.mark.parametrize("name", FAMILY)
def test_the_published_description_has_the_published_size(name: str, tmp_path: Path) -> None:
    raw, parameters = FAMILY[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_config(tmp_path / "config.json")
    assert config.num_parameters == parameters
    assert config.tie_word_embeddings == raw["tie_word_embeddings"]
    assert isinstance(config.rope_scaling, Llama3Scaling) == name.startswith("Llama-3.2")


@pytest.mark.parametrize(
    ("name", "reduce"),
    [
        *(pytest.param(name, reduced, id=name) for name in ("SmolLM2-1.7B", "Llama-3.2-3B", "OpenLLaMA-3B")),
        *(pytest.param(name, with_few_layers, marks=pytest.mark.real, id=f"{name}, wide") for name in FAMILY),
    ],
)
def test_in_and_out_and_in_again(
    name: str, reduce: Callable[[dict, Tokenizer], dict], tokenizer_of: dict[str, Tokenizer], tmp_path: Path
) -> None:
    """The logits are transformers', the bits stay the same, and the description is the original's."""
    tokenizer = tokenizer_of[name.split("-")[0]]
    raw = reduce(FAMILY[name][0], tokenizer)
    write_original(tmp_path / "original", raw, tokenizer)
    import_hf_folder(tmp_path / "original", tmp_path / "ours")
    ours = open_model_folder(tmp_path / "ours")
    export(ours.tensors(), ours.model, ours.tokenizer, tmp_path / "exported")
    import_hf_folder(tmp_path / "exported", tmp_path / "again")
    assert open_model_folder(tmp_path / "again").files == ours.files
    assert_same_description(raw, json.loads((tmp_path / "exported" / "config.json").read_text()))

    model = empty_model(ours.model, "sdpa")
    assign_weights(model, {parameter: tensor.float() for parameter, tensor in ours.tensors()})
    ids = torch.randint(tokenizer.vocab_size, (1, POSITIONS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = model(ids)
        for folder in ("original", "exported"):
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
            torch.testing.assert_close(found, theirs(ids).logits, rtol=1e-5, atol=1e-5)
        if ours.model.rope_scaling is not None:
            other = empty_model(replace(ours.model, rope_scaling=None), "sdpa")
            assign_weights(other, dict(model.named_parameters()))
            assert not torch.allclose(other(ids), found, rtol=1e-3, atol=1e-3)


def assert_same_description(original: dict, exported: dict) -> None:
    assert exported.keys() >= ALWAYS
    kept = {key: value for key, value in original.items() if key not in NOT_KEPT}
    assert {key: exported[key] for key in kept} == kept
    rope = {"rope_type": "default", "rope_theta": original.get("rope_theta", 10_000.0)}
    assert exported["rope_parameters"] == rope | (original.get("rope_scaling") or {})
    assert exported["dtype"] == original["torch_dtype"]
