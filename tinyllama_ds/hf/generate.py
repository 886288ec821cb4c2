"""Text generation from a checkpoint or a Hugging Face folder by transformers, with its key/value cache."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinyllama_ds.data.chat import Message, prompt_ids
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.convert import hf_model, hf_tokenizer, load_hf_folder
from tinyllama_ds.model.config import LlamaConfig

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class LoadedModel:
    """A model for generation with its tokenizer."""

    model: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    eos_id: int  # ends a document, and a turn
    hf_tokenizer: Callable[[], Any]  # the tokenizer as transformers has it
    encode_chat: Callable[[Sequence[Message]], list[int]] | None = None  # prompt of an answer; chat models only

    @property
    def positions(self) -> int:
        return self.model.config.max_position_embeddings


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float  # 0 is greedy
    top_p: float
    seed: int


def load_from_hf_folder(folder: Path) -> LoadedModel:
    """The model of a Hugging Face folder, loaded by transformers."""
    model, tokenizer = load_hf_folder(folder)

    def encode_chat(messages: Sequence[Message]) -> list[int]:
        turns = [{"role": message.role, "content": message.content} for message in messages]
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)

    return LoadedModel(
        model,
        lambda text: tokenizer.encode(text, split_special_tokens=True),
        lambda ids: tokenizer.decode(ids),
        tokenizer.eos_token_id,
        lambda: tokenizer,
        encode_chat if tokenizer.chat_template else None,
    )


def load_from_weights(
    weights: dict[str, Tensor], config: LlamaConfig, tokenizer: Tokenizer, is_chat_model: bool = False
) -> LoadedModel:
    """The model of a checkpoint; `is_chat_model`: it was trained on conversations."""
    encode_chat = partial(prompt_ids, tokenizer) if is_chat_model else None
    model = hf_model(weights, config, tokenizer)
    converted = partial(hf_tokenizer, tokenizer, config.max_position_embeddings)
    return LoadedModel(model, tokenizer.encode, tokenizer.decode, tokenizer.eos_id, converted, encode_chat)


def generate(loaded: LoadedModel, prompt: str, sampling: Sampling) -> str:
    """The prompt and its continuation, up to the end of the document or `max_new_tokens`."""
    ids = prompt_tokens(loaded, prompt)
    torch.manual_seed(sampling.seed)
    return text_of(loaded, [*ids, *continue_ids(loaded, ids, sampling)])


def prompt_tokens(loaded: LoadedModel, prompt: str) -> list[int]:
    """The ids of a text to continue; without a text, the EOS that comes before a document."""
    return loaded.encode(prompt) or [loaded.eos_id]


def text_of(loaded: LoadedModel, ids: Sequence[int]) -> str:
    """The text of some ids without EOS."""
    return loaded.decode([token for token in ids if token != loaded.eos_id])


def generation_device() -> str:
    """Where models generate: the GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def continue_ids(
    loaded: LoadedModel,
    ids: list[int],
    sampling: Sampling,
    streamer: "BaseStreamer | None" = None,
    assistance: Mapping[str, Any] = MappingProxyType({}),
) -> list[int]:
    """The ids that the model generates after some others, its EOS included.

    `assistance`: more options of transformers' `generate`, such as the draft model of speculative decoding.
    Raises `ConfigError` where the prompt leaves no position free.
    """
    free = loaded.positions - len(ids)
    if free < 1:
        raise ConfigError(f"the prompt's {len(ids)} tokens fill the model's {loaded.positions} positions")
    options: dict[str, Any] = {"do_sample": sampling.temperature > 0, **assistance}
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    device = generation_device()
    model = loaded.model.to(device)
    inputs = torch.tensor([ids], device=device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=min(sampling.max_new_tokens, free),
        pad_token_id=loaded.eos_id,
        streamer=streamer,
        **options,
    )
    return output[0, len(ids) :].tolist()
