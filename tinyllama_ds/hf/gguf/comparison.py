"""A GGUF file against the model that it was made of: weights, logits, and the perplexity of a text."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path

import torch
from torch import Tensor

from tinyllama_ds.bars import progress
from tinyllama_ds.data.loader import open_streams
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.gguf.tensors import read_parameters
from tinyllama_ds.inputs import read_text
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import LlamaForCausalLM, assign_weights

WINDOW = 512  # tokens; llama.cpp's own measure has windows of as many
MAX_TOKENS = 4096
# The largest possible error of a tensor's values, as a share of its norm: half a step of the scale in each weight of a
# block of 32 with one large one. F16 has 11 bits; fp32 is exact.
_LARGEST_ERROR = {"F32": 0.0, "F16": 1e-3, "Q8_0": 0.025, "Q4_0": 0.4}


@dataclass(frozen=True)
class SampleText:
    """Token ids in windows of (T + 1,), and what they are, for a message."""

    name: str
    windows: list[Tensor]

    @property
    def targets(self) -> int:
        return sum(len(window) - 1 for window in self.windows)


@dataclass(frozen=True)
class Comparison:
    """A model in fp32 and its file, dequantised, on the same text."""

    text: str
    tokens: int
    loss: float  # mean per token, of the model
    gguf_loss: float
    loss_error: float  # standard error of the difference of the two
    same_top_token: float  # share of the positions with the same most likely token
    largest_logit_difference: float  # relative to the largest logit, in the first window

    @property
    def perplexity_change(self) -> float:
        """Relative to the model's perplexity."""
        return exp(self.gguf_loss - self.loss) - 1


def sample_text(source: Path | None, tokenizer: Tokenizer, config: LlamaConfig) -> SampleText:
    """Up to `MAX_TOKENS` of a text file, of the validation splits of a data directory, or of Python's own reference.

    Raises `ConfigError` for a file that is not text, or a directory without a validation split of this tokenizer.
    """
    length = min(WINDOW, config.max_position_embeddings)
    if source is not None and source.is_dir():
        return _validation_text(source, tokenizer, config, length)
    if source is not None:
        name, text = str(source), read_text(source, "the text for --text")
    else:
        from pydoc_data.topics import topics

        name, text = "Python's language reference", "\n\n".join(topics[topic] for topic in sorted(topics))
    ids = torch.tensor(tokenizer.encode(text[: 16 * MAX_TOKENS])[: MAX_TOKENS + 1])
    if len(ids) < 2:
        raise ConfigError(f"{name}: has less than two tokens; expected a text to measure the perplexity on")
    starts = range(0, len(ids) - 1, length)
    return SampleText(name, [ids[start : start + length + 1] for start in starts])


def _validation_text(data: Path, tokenizer: Tokenizer, config: LlamaConfig, length: int) -> SampleText:
    """Windows spread evenly over each source."""
    sources = sorted(path.parent.name for path in data.glob("*/validation") if path.is_dir())
    if not sources:
        raise ConfigError(f"{data}: has no validation split; expected a data directory made by prepare, or a text file")
    streams = open_streams(data, sources, "validation", config.vocab_size)
    if any(shard.manifest.tokenizer_sha256 != tokenizer.sha256 for shard in next(iter(streams.values())).shards):
        raise ConfigError(f"{data}: its tokens were made with a tokenizer other than the model's")
    windows = []
    for stream in streams.values():
        available = stream.num_samples(length)
        count = min(available, max(1, MAX_TOKENS // length // len(streams)))
        samples = (stream.sample(number * available // count, length) for number in range(count))
        windows += [torch.from_numpy(sample.astype("int64")) for sample in samples]
    return SampleText(f"validation text of {', '.join(sources)}", windows)


def compare(path: Path, weights: Mapping[str, Tensor], config: LlamaConfig, text: SampleText) -> Comparison:
    """Read a file back and compare it; one of the two models is in memory in fp32 at a time.

    Raises `ConfigError` unless every tensor of the file is the model's to the precision of its type.
    """
    losses, top, logits = _score(lambda: {name: tensor.float() for name, tensor in weights.items()}, config, text)
    gguf_losses, gguf_top, gguf_logits = _score(lambda: _verified_parameters(path, weights, config), config, text)
    differences = gguf_losses - losses
    return Comparison(
        text.name,
        len(losses),
        losses.mean().item(),
        gguf_losses.mean().item(),
        (differences.std(correction=0) / sqrt(len(losses))).item(),
        (top == gguf_top).double().mean().item(),
        ((gguf_logits - logits).abs().max() / logits.abs().max()).item(),
    )


def _verified_parameters(path: Path, weights: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    from gguf import GGUFReader

    found = {}
    for name, tensor, kind in read_parameters(GGUFReader(path), config):
        expected = weights[name].float()
        error, norm = (tensor - expected).norm().item(), expected.norm().item()
        if not error <= _LARGEST_ERROR[kind] * norm:
            raise ConfigError(
                f"export: {name} differs from the model's by {error / max(norm, 1e-30):.1e} of its norm when read back,"
                f" more than {kind} explains"
            )
        found[name] = tensor
    return found


@torch.no_grad()
def _score(
    parameters: Callable[[], Mapping[str, Tensor]], config: LlamaConfig, text: SampleText
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and the most likely token of every position (targets,), and the logits of the first window."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assign_weights(model, parameters())
    losses, tops, first = [], [], torch.empty(0)
    windows: Iterable[Tensor] = progress(text.windows, desc="perplexity", unit="window", leave=False)
    for number, window in enumerate(windows):
        logits = model(window[None, :-1])[0]  # (T, V)
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").double())
        tops.append(logits.argmax(dim=-1))
        first = logits if number == 0 else first
    return torch.cat(losses), torch.cat(tops), first
