"""Shapes that cannot be are refused in a sentence."""

import pytest

from tinyllama_ds.errors import Refusal
from tinyllama_ds.model.config import LlamaConfig, model_config


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((100, 65, 128, 2, 4, 2, 64), "hidden_size 65 must be a multiple of num_attention_heads 4"),
        ((100, 64, 128, 2, 4, 3, 64), "num_attention_heads 4 must be a multiple of num_key_value_heads 3"),
        ((100, 60, 128, 2, 4, 2, 64), "head size 15 must be even"),
    ],
)
def test_impossible_shapes_are_refused(shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence):
        LlamaConfig(*shape)


def test_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(Refusal, match="'tinyllama-7b' is unknown; the known sizes are tinyllama-1.1b, "):
        model_config("tinyllama-7b")
