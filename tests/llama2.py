"""Llama 2's own vocabulary, for tests that need the real one; it is not ours to ship."""

import os
from pathlib import Path

import pytest

LLAMA2 = Path(
    os.environ.get("TINYLLAMA_DS_LLAMA2_TOKENIZER", "")
    or Path(__file__).parents[2] / "shared" / "data" / "llama2-tokenizer" / "tokenizer.model"
)
needs_llama2 = pytest.mark.skipif(
    not LLAMA2.is_file(), reason="Llama 2's tokenizer.model is not here (TINYLLAMA_DS_LLAMA2_TOKENIZER)"
)
