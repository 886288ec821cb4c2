"""Damaged descriptions of models: read, or refused in one sentence, whatever is in them."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from mutating import mutations, returns_or_refuses

from tinyllama_ds.hf.convert import hf_config
from tinyllama_ds.hf.import_model import find_tensors, read_config
from tinyllama_ds.hf.model_folder import open_model_folder
from tinyllama_ds.hf.weights import parameter_shapes
from tinyllama_ds.model.config import MODEL_SIZES

SHAPES = replace(MODEL_SIZES["test"], rope_scaling_factor=4.0)
TRANSFORMERS_4 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": None,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"type": "linear", "factor": 4.0},
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": [2],
}
MODEL_JSON = {
    "format": 1,
    "model": SHAPES.to_dict(),
    "dtype": "bfloat16",
    "files": {name: {"size": 7, "sha256": "0" * 64} for name in ("model.safetensors", "tokenizer.model")},
}
INDEX = {
    "metadata": {"total_size": 8},
    "weight_map": dict.fromkeys(parameter_shapes(MODEL_SIZES["test"]), "model-00001-of-00001.safetensors"),
}


@cache
def transformers_5() -> bytes:
    return json.dumps(hf_config(SHAPES, torch.bfloat16).to_dict(), default=str).encode()


@given(
    content=st.one_of(mutations(json.dumps(TRANSFORMERS_4).encode()), st.deferred(lambda: mutations(transformers_5())))
)
def test_a_damaged_config_json(content: bytes) -> None:
    returns_or_refuses(read_config, content, "config.json")


@given(content=mutations(json.dumps(MODEL_JSON).encode()))
def test_a_damaged_model_json(content: bytes) -> None:
    returns_or_refuses(lambda path: open_model_folder(path.parent), content, "model.json")


@given(content=mutations(json.dumps(INDEX).encode()))
def test_a_damaged_index_of_weights(content: bytes) -> None:
    def find(path: Path) -> object:
        return find_tensors(path.parent, MODEL_SIZES["test"])

    returns_or_refuses(find, content, "model.safetensors.index.json")
