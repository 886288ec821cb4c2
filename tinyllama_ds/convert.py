"""Our weights to a Hugging Face folder, proven equal before it appears."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama_ds.data.chat import CHAT_TEMPLATE, conversation_ids, prompt_ids
from tinyllama_ds.data.encoding import ranked_merges
from tinyllama_ds.data.sources import Message
from tinyllama_ds.data.tokenizer import BOS_ID, EOS_ID, UNK_ID, Tokenizer
from tinyllama_ds.errors import Refusal
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import LlamaForCausalLM
from tinyllama_ds.model.probe import TOLERANCE, Probe, loss_difference, probe_loss

LOGIT_TOLERANCE = 1e-4  # largest difference in fp32, relative to the largest logit

# Texts on which tokenizers tend to disagree: runs of spaces, tabs, line ends, digits, scripts, bytes, look-alikes of
# control tokens.
PROBE_TEXTS = [
    "Once upon a time there was a tiny llama.",
    "def f(x):\n    if x:\n        return  x + 1\n\treturn\t0\r\n",
    "  leading and   many      spaces, then trailing   ",
    "12345 3.14159 0xDEADBEEF 1,000,000",
    "naïve café, Ελληνικά, русский, 中文字符, 日本語, العربية, हिन्दी",
    "emoji \U0001f999\U0001f44d\U0001f3fd and a NUL \x00 and a ▁ underline",
    "</s> <s> <unk> are only text here",
    "\n\n\n", " ", "a",
]  # fmt: skip


def export(
    weights: dict[str, Tensor],
    config: LlamaConfig,
    tokenizer: Tokenizer,
    output: Path,
    probe: Probe | None = None,
    chats: bool = False,
) -> float:
    """Write config.json, safetensors and the tokenizer to a new folder; returns the largest relative logit difference.

    The tokenizer of a model that `chats` brings the chat template.

    Raises `Refusal`, leaving nothing behind, unless transformers loads the folder and gives the logits of our model,
    the token ids of sentencepiece, and on the checkpoint's probe the loss that training had on it.
    """
    if output.exists():
        raise Refusal(f"{output}: already exists; expected a new folder")
    from transformers.utils import logging

    logging.disable_progress_bar()
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        hf_model(weights, config).save_pretrained(partial)
        template = CHAT_TEMPLATE if chats else None
        hf_tokenizer(tokenizer, config.max_position_embeddings, template).save_pretrained(partial)
        shutil.copyfile(tokenizer.path, partial / "tokenizer.model")
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone
        difference = _prove_equal(partial, weights, config, tokenizer, probe)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return difference


def hf_model(weights: dict[str, Tensor], config: LlamaConfig) -> Any:
    """transformers' LlamaForCausalLM around the same tensors: the parameter names are the same, nothing is permuted."""
    import transformers

    dtype = next(iter(weights.values())).dtype
    hf_config = transformers.LlamaConfig(
        **config.to_dict() | {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}},
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(hf_config)
    model.load_state_dict(weights, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)  # its buffers are computed, not stored
    model.generation_config = transformers.GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, do_sample=False)
    return model.eval()


def hf_tokenizer(tokenizer: Tokenizer, max_length: int, chat_template: str | None = None) -> Any:
    """The sentencepiece model as a fast tokenizer with the same ids.

    transformers' own conversion orders merges by id and pre-splits words, which changes runs of spaces. Sentencepiece
    merges the pair whose result has the highest score, so merges are ranked by score here, and nothing is pre-split.
    """
    import tokenizers
    import transformers

    pieces = tokenizer.pieces
    model = tokenizers.models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=ranked_merges(tokenizer),
        unk_token=pieces[UNK_ID],
        fuse_unk=True,
        byte_fallback=True,
    )
    fast = tokenizers.Tokenizer(model)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token=pieces[UNK_ID],
        bos_token=pieces[BOS_ID],
        eos_token=pieces[EOS_ID],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def _prove_equal(
    folder: Path, weights: dict[str, Tensor], config: LlamaConfig, tokenizer: Tokenizer, probe: Probe | None
) -> float:
    import transformers

    loaded_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in PROBE_TEXTS:
        theirs = loaded_tokenizer.encode(text, split_special_tokens=True)
        if theirs != tokenizer.encode(text):
            raise Refusal(f"export: transformers' token ids of {text!r} differ from sentencepiece's")
    if loaded_tokenizer.chat_template is not None:
        _prove_chat(loaded_tokenizer, tokenizer)
    length = min(64, config.max_position_embeddings)
    ids = torch.tensor([(tokenizer.encode(" ".join(PROBE_TEXTS)) * length)[:length]])
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.device("meta"):
        ours = LlamaForCausalLM(config, "eager")
    ours.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True, assign=True)
    with torch.no_grad():
        expected, found = ours(ids), theirs(ids).logits
    difference = ((expected - found).abs().max() / expected.abs().max()).item()
    if not difference <= LOGIT_TOLERANCE:
        raise Refusal(f"export: transformers' logits differ from ours by {difference:.1e} of the largest logit")
    if probe is not None:
        # A mask within documents is no part of a Hugging Face folder; our model has it, and equal logits without one.
        _prove_loss(probe, ours if probe.segments else lambda ids, labels: _loss(theirs(ids).logits, labels))
    return difference


def _prove_chat(loaded: Any, tokenizer: Tokenizer) -> None:
    """transformers' ids of whole conversations and of prompts are ours, and so are their answers.

    Of control tokens in a text it makes other ids, but none of control tokens.
    """
    for text in PROBE_TEXTS:
        if not text.strip():
            continue
        roles = ("system", "user", "assistant", "user", "assistant")
        messages = [Message(role, text) for role in roles]
        turns = [{"role": message.role, "content": message.content} for message in messages]
        whole = loaded.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        theirs = whole["input_ids"], list(whole["assistant_masks"])
        prompt = loaded.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
        if any(control in text for control in tokenizer.pieces[: EOS_ID + 1]):
            is_proven = [theirs[0].count(control) for control in (UNK_ID, BOS_ID, EOS_ID)] == [0, 0, len(turns)]
        else:
            ours = conversation_ids(tokenizer, messages)
            is_proven = theirs == ours and prompt == prompt_ids(tokenizer, messages[:-1])
        if not is_proven:
            raise Refusal(f"export: transformers' chat template gives other ids than ours with {text!r}")


def _prove_loss(probe: Probe, score: Callable[..., Tensor]) -> None:
    loss = probe_loss(score, probe.tokens, probe.segments, 1, torch.device("cpu"))
    allowed = TOLERANCE[probe.dtype]
    if loss_difference(probe, loss) > allowed:
        raise Refusal(
            f"export: the loss on the checkpoint's probe is {loss:.6f} and was {probe.loss:.6f} in training, more than"
            f" {allowed:g} of it apart; the weights are not those that were saved"
        )


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
