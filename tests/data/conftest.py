"""A small tokenizer and small corpora of made-up text, each made once per session."""

import os
from pathlib import Path

import pytest
from corpora import AWKWARD_TEXTS, made_up_text

from tinyllama_ds.data.tokenizer import Tokenizer, train_tokenizer


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
    shared = Path(__file__).parents[3] / "shared" / "data" / "llama2-tokenizer" / "tokenizer.model"
    path = Path(os.environ.get("TINYLLAMA_DS_LLAMA2_TOKENIZER", shared))
    if not path.is_file():
        pytest.skip("needs Llama 2's tokenizer.model, named by TINYLLAMA_DS_LLAMA2_TOKENIZER")
    return Tokenizer(path)
