"""muP in the decoder: nothing at its base width, multipliers beyond it, and the plain Llama that computes the same."""

from dataclasses import replace

import pytest
import torch

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.convert import hf_model
from tinyllama_ds.model.config import LlamaConfig, Mup
from tinyllama_ds.model.llama import LlamaForCausalLM, assign_weights, build_model, fold_multipliers

CONFIG = LlamaConfig(97, 64, 96, 2, 4, 2, 64)
TOKENS = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(1))


def loss_and_gradients(config: LlamaConfig) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model = build_model(config, "blocked", seed=1)
    loss = model(TOKENS[:, :-1], TOKENS[:, 1:])
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def test_at_its_base_width_it_is_the_standard_model_bit_for_bit() -> None:
    expected, found = (loss_and_gradients(replace(CONFIG, mup=mup)) for mup in (None, Mup(64, 16)))
    assert torch.equal(expected[0], found[0])
    assert all(map(torch.equal, expected[1], found[1]))


def test_multipliers_are_the_widths_and_the_head_sizes() -> None:
    model = replace(CONFIG, mup=Mup(16, 4))
    assert (model.width_multiplier, model.attention_multiplier) == (4.0, 0.5)
    assert replace(CONFIG, mup=Mup(16)).attention_multiplier == 1.0
    assert (CONFIG.width_multiplier, CONFIG.attention_multiplier) == (1.0, 1.0)
    with pytest.raises(ConfigError, match="base_hidden_size 0 is not above 0"):
        Mup(0)


@pytest.mark.parametrize("is_tied", [False, True])
def test_folded_weights_have_the_logits_in_transformers(is_tied: bool) -> None:
    """With a wider model and larger heads than the base's, neither by a power of two."""
    config = replace(CONFIG, tie_word_embeddings=is_tied, mup=Mup(20, 7))
    model = build_model(config, "blocked", seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        expected = model(TOKENS)
        plain, weights = fold_multipliers(config, model.named_parameters())
        folded = {name: tensor.detach() for name, tensor in weights}
        theirs = hf_model(folded, plain)(TOKENS).logits
        unfolded = LlamaForCausalLM(plain, "blocked")
        assign_weights(unfolded, dict(model.named_parameters()))
    assert plain == replace(config, mup=None)
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-5)
    assert (unfolded(TOKENS) - expected).abs().max() > 0.1 * expected.abs().max()


def test_a_model_without_mup_is_folded_as_it_is() -> None:
    model = build_model(CONFIG, "blocked", seed=1).bfloat16()
    plain, weights = fold_multipliers(CONFIG, model.named_parameters())
    assert plain == CONFIG
    assert all(tensor is dict(model.named_parameters())[name] for name, tensor in weights)


def test_only_a_model_with_mup_has_it_in_its_identity() -> None:
    assert "mup" not in CONFIG.to_dict()
    assert replace(CONFIG, mup=Mup(16)).to_dict()["mup"] == {"base_hidden_size": 16, "base_head_dim": None}
