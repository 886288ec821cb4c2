"""The decoder with the weights of a Llama that others have trained (`--real`): SmolLM2-135M-Instruct."""

from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from smollm import CONFIG

from tinyllama_ds.model.llama import LlamaForCausalLM, build_model

pytestmark = pytest.mark.real
PROMPT = "The capital of France is"


def trained_model(folder: Path, attention: str) -> LlamaForCausalLM:
    state = load_file(folder / "model.safetensors")
    model = build_model(CONFIG, attention, seed=1)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # the embedding table
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
def test_it_knows_the_capital_of_france(attention: str, dtype: torch.dtype, smollm2: Path) -> None:
    """And its logits in fp32 are transformers', at activations that no random model has."""
    tokenizer = tokenizers.Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    with torch.no_grad():
        logits = trained_model(smollm2, attention).to(dtype)(ids)
        assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
        if dtype == torch.float32:
            theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2)
            torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-3)
