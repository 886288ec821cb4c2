"""Validation loss: the same for every world size and batch, and every rank runs as many forward passes."""

import json
import math
from pathlib import Path

import pytest
import torch

from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.validation import (
    ValidationSet,
    mean_losses,
    perplexity,
    sample_losses,
    validation_metrics,
)
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.model.loss import IGNORE_INDEX

T = 32


@pytest.fixture
def sets(data_dir: Path) -> list[ValidationSet]:
    return [
        ValidationSet(name, TokenStream(data_dir / name / "validation"), T, samples)
        for name, samples in (("slimpajama", 7), ("starcoderdata", 10_000))
    ]


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_sample_counts_once_for_any_world(sets: list[ValidationSet], world_size: int, batch: int) -> None:
    for held_out in sets:
        ranks = [list(held_out.batches(rank, world_size, batch)) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1
        rows = [row for batches in ranks for batch_of_rank in batches for row in zip(*batch_of_rank, strict=True)]
        counted = {int(n): inputs.tolist() for n, inputs, labels in rows if (labels != IGNORE_INDEX).all()}
        padding = [labels for _, _, labels in rows if (labels == IGNORE_INDEX).all()]
        assert len(counted) + len(padding) == len(rows)
        available = held_out.stream.num_samples(T)
        total = min(held_out.samples, available)
        expected = [held_out.stream.sample(i * available // total, T)[:-1].tolist() for i in range(total)]
        assert [counted[number] for number in range(held_out.size)] == expected


def test_loss_equals_pytorchs_over_the_same_tokens(sets: list[ValidationSet]) -> None:
    model = build_model(MODEL_SIZES["test"], "eager", seed=1)
    samples = sample_losses(sets, model, lambda sums: sums, DistributedInfo(0, 0, 1, torch.device("cpu")), batch=3)
    found = mean_losses(samples)
    for held_out in sets:
        available = held_out.stream.num_samples(T)
        total = min(held_out.samples, available)
        tokens = torch.stack(
            [torch.from_numpy(held_out.stream.sample(i * available // total, T).astype("int64")) for i in range(total)]
        )
        with torch.no_grad():
            logits = model(tokens[:, :-1])
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        assert found[held_out.source] == pytest.approx(losses.mean().item(), rel=1e-6)
        torch.testing.assert_close(samples[held_out.source][:, 0].float(), losses.sum(1))
        assert samples[held_out.source][:, 1].tolist() == [T] * total


def test_less_than_a_sample_is_rejected(sets: list[ValidationSet]) -> None:
    with pytest.raises(ConfigError, match="are less than one sample"):
        ValidationSet("slimpajama", sets[0].stream, 10**6, 7)


def test_bits_per_byte_are_those_of_the_text(sets: list[ValidationSet], data_dir: Path) -> None:
    """What a model of uniform guesses pays for the whole split: log2(vocabulary) bits a token."""
    metrics = validation_metrics({"slimpajama": math.log(512)}, sets[:1])
    [record] = [json.loads(path.read_text()) for path in (data_dir / "slimpajama" / "validation").glob("*.json")]
    text_bytes = sum(file["text_bytes"] for file in record["inputs"])
    assert metrics["Validation/BitsPerByte/slimpajama"] == pytest.approx(9 * record["tokens"] / text_bytes)
    assert metrics["Validation/Perplexity/slimpajama"] == pytest.approx(512)


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == float("inf")
