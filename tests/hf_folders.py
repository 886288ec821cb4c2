"""Hugging Face folders of small random models, as transformers itself writes them."""

import shutil
from pathlib import Path

import torch
import transformers

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.hf.convert import hf_config
from tinyllama_ds.model.config import LlamaConfig


def write_hf_folder(
    folder: Path,
    shape: LlamaConfig,
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """With weights larger than transformers' initialisation: its predictions differ from token to token."""
    transformers.set_seed(1)
    model = transformers.LlamaForCausalLM(hf_config(shape, dtype)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.lm_head.weight.mul_(4)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    return folder
