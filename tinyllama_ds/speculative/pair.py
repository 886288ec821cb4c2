"""A target with its draft: ids that mean the same, and logits of the same width."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from tinyllama_ds.errors import ConfigError, log, shown
from tinyllama_ds.hf.generate import LoadedModel, generation_device
from tinyllama_ds.numbers import short_count


@dataclass(frozen=True)
class NamedModel:
    """A model under the name that the user gave."""

    name: str
    loaded: LoadedModel

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.loaded.model.parameters())


@dataclass(frozen=True)
class Pair:
    """A target and a draft for transformers' assisted generation; `options` are those of its `generate`."""

    target: NamedModel
    draft: NamedModel
    options: Mapping[str, Any]

    def assistance(self, draft_length: int) -> dict[str, Any]:
        """The options of `generate` for rounds of so many drafted tokens."""
        self.draft.loaded.model.generation_config.update(
            num_assistant_tokens=draft_length,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,  # else a round ends at the first token of which the draft is not sure
        )
        return dict(self.options)


def make_pair(target: NamedModel, draft: NamedModel, is_universal: bool = False) -> Pair:
    """A pair whose draft has its vocabulary padded or cut to the width of the target's.

    Where the tokenizers differ, raises `ConfigError`; with `is_universal` transformers' universal assisted decoding
    translates between them. A draft that can hardly help is reported on the console.
    """
    transformers.utils.logging.set_verbosity_error()  # it warns of the options that it passes to the draft itself
    tokenizers = target.loaded.hf_tokenizer(), draft.loaded.hf_tokenizer()
    difference = vocabulary_difference(*tokenizers)
    if difference and not is_universal:
        raise ConfigError(
            f"{draft.name}: {difference} of {target.name}; expected a draft with the target's tokenizer, or"
            " --universal-assisted-decoding"
        )
    _report_doubts(target, draft)
    width = target.loaded.model.config.vocab_size
    options: dict[str, Any] = {"assistant_model": draft.loaded.model}
    if difference:
        options |= {"tokenizer": tokenizers[0], "assistant_tokenizer": tokenizers[1]}
        if draft.loaded.model.config.vocab_size == width:  # by which transformers takes the tokenizers for equal
            _set_vocabulary_size(draft.loaded.model, width + 1)
    else:
        _set_vocabulary_size(draft.loaded.model, width)
    draft.loaded.model.to(generation_device())
    return Pair(target, draft, options)


def vocabulary_difference(target: Any, draft: Any) -> str | None:
    """The first id that transformers' two tokenizers have for different pieces, in words.

    A token that was added to one of them, and has an id beyond the vocabulary of the other, is not a difference.
    """
    theirs, ours = ({number: piece for piece, number in each.get_vocab().items()} for each in (target, draft))
    added = {*target.get_added_vocab().values(), *draft.get_added_vocab().values()}
    for number in sorted(theirs.keys() | ours.keys()):
        is_padding = number in added and (number not in theirs or number not in ours)
        if theirs.get(number) != ours.get(number) and not is_padding:
            pieces = (shown(each[number]) if number in each else "unused" for each in (ours, theirs))
            return "id {} is {} in its tokenizer and {} in that".format(number, *pieces)
    return None


def _set_vocabulary_size(model: Any, size: int) -> None:
    """Cut the rows of embeddings and LM head, or pad them by rows that are never generated."""
    own = model.config.vocab_size
    if size == own:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    if size > own:
        never = float("-inf")
        model.get_output_embeddings().register_forward_hook(
            lambda head, inputs, logits: torch.cat((logits[..., :own], torch.full_like(logits[..., own:], never)), -1)
        )


def _report_doubts(target: NamedModel, draft: NamedModel) -> None:
    if draft.parameters >= target.parameters:
        sizes = f"{short_count(draft.parameters)} parameters, {target.name} has {short_count(target.parameters)}"
        log(f"{draft.name}: the draft has {sizes}; expected a smaller one, as this cannot be faster")
    if draft.loaded.positions < target.loaded.positions:
        log(
            f"{draft.name}: the draft has {draft.loaded.positions} positions, {target.name} has"
            f" {target.loaded.positions}; beyond the draft's the target generates alone"
        )
