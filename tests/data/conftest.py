"""A small tokenizer and small corpora of made-up text, each made once per session."""

import pytest
from corpora import AWKWARD_TEXTS, made_up_text
from llama2 import LLAMA2

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.data.tokenizers.train_tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """512 pieces, byte fallback included."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer([made_up_text(seed, 1500) for seed in range(10)], 512, path)


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Forty documents, the awkward ones among them."""
    return [made_up_text(seed, 20 + 10 * seed) for seed in range(32)] + AWKWARD_TEXTS


@pytest.fixture(scope="session")
def llama2_tokenizer() -> Tokenizer:
    """Llama 2's own vocabulary, which is not ours to ship."""
    if not LLAMA2.is_file():
        pytest.skip("needs Llama 2's tokenizer.model, named by TINYLLAMA_DS_LLAMA2_TOKENIZER")
    return load_tokenizer(LLAMA2)
