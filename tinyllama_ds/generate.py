"""Text from a checkpoint or a Hugging Face folder, through transformers' generation with its key/value cache."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama_ds.convert import hf_model
from tinyllama_ds.data.tokenizer import EOS_ID, Tokenizer
from tinyllama_ds.errors import Refusal
from tinyllama_ds.model.config import LlamaConfig


@dataclass(frozen=True)
class Served:
    """A model that can generate, and how its text becomes ids and back."""

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float  # 0 is greedy
    top_p: float
    seed: int


def load_hf_folder(folder: Path) -> Served:
    """A Hugging Face folder, as any user of transformers loads it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return Served(
        model, lambda text: tokenizer.encode(text, split_special_tokens=True), lambda ids: tokenizer.decode(ids)
    )


def serve_weights(weights: dict[str, Tensor], config: LlamaConfig, tokenizer: Tokenizer) -> Served:
    """The weights of a checkpoint."""
    return Served(hf_model(weights, config), tokenizer.encode, tokenizer.decode)


def generate(served: Served, prompt: str, sampling: Sampling) -> str:
    """The prompt and its continuation, up to the end of the document or `max_new_tokens`."""
    ids = served.encode(prompt) or [EOS_ID]
    room = served.model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise Refusal(f"the prompt's {len(ids)} tokens fill the model's {len(ids) + room} positions")
    torch.manual_seed(sampling.seed)
    options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = served.model.to(device)
    inputs = torch.tensor([ids], device=device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=min(sampling.max_new_tokens, room),
        pad_token_id=EOS_ID,
        **options,
    )
    return served.decode([token for token in output[0].tolist() if token != EOS_ID])
