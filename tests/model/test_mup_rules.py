"""muP: its coordinate check, and its rules next to those of the package `mup`.

Tensor Programs V (Yang et al. 2022, arXiv 2203.03466), table 8 and appendix D.1.
"""

from dataclasses import replace
from math import log2, sqrt
from pathlib import Path

import pytest
import torch
from registry import unpacked

from tinyllama_ds.model.config import LlamaConfig, Mup
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model
from tinyllama_ds.model.param_groups import group_parameters

WIDTHS = (64, 128, 256, 512)
BASE, HEAD, LAYERS, VOCABULARY, LENGTH = 32, 16, 2, 64, 32
RATE, DECAY = 2e-3, 0.1
FLAT, GROWING = 0.15, 0.5  # slopes of the logarithm of a change over that of the width; 1 is in proportion


def shape(width: int, mup: Mup | None) -> LlamaConfig:
    heads = width // HEAD
    return LlamaConfig(VOCABULARY, width, 3 * width, LAYERS, heads, heads // 2, LENGTH, mup=mup)


def torch_groups(model: LlamaForCausalLM) -> list[dict]:
    """The groups of a run, as PyTorch takes them."""
    return [
        {
            "params": members,
            "lr": RATE * settings.lr_multiplier,
            "weight_decay": DECAY * settings.weight_decay_multiplier,
        }
        for settings, members in group_parameters(model.named_parameters(), model.config.width_multiplier).items()
    ]


def some_tokens(seed: int) -> torch.Tensor:
    """A batch in which few tokens are frequent and many are rare, as in texts: there is something to learn."""
    return (VOCABULARY * torch.rand((8, LENGTH + 1), generator=torch.Generator().manual_seed(seed)) ** 3).long()


def coordinates(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """What every part of the decoder puts out for one batch."""
    found: dict[str, torch.Tensor] = {}
    parts = {name: part for name, part in model.named_modules() if name.endswith(("self_attn", "mlp", "embed_tokens"))}
    hooks = [
        part.register_forward_hook(lambda _, inputs, output, name=name: found.update({name: output.detach()}))
        for name, part in (parts | {"model.norm": model.model.norm}).items()
    ]
    with torch.no_grad():
        found["logits"] = model(some_tokens(0)[:, :-1])
    for hook in hooks:
        hook.remove()
    return found


def changes_in_training(config: LlamaConfig, steps: int = 4) -> dict[str, float]:
    """How far some steps of AdamW move every output, as the mean of the absolute changes.

    The LM head begins at 0, as the package advises: else random logits, whose size falls with the width, are in them.
    """
    model = build_model(config, "sdpa", seed=1)
    torch.nn.init.zeros_(model.lm_head.weight)
    optimizer = torch.optim.AdamW(torch_groups(model), betas=(0.9, 0.95))
    before = coordinates(model)
    for step in range(steps):
        tokens = some_tokens(step % 2)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: (value - before[name]).abs().mean().item() for name, value in coordinates(model).items()}


def slopes(mup: Mup | None) -> dict[str, float]:
    """By part, the least-squares slope of log(change) over log(width)."""
    changes = [changes_in_training(shape(width, mup)) for width in WIDTHS]
    x = torch.tensor([log2(width) for width in WIDTHS])
    x -= x.mean()
    return {
        name: ((x * torch.tensor([log2(found[name]) for found in changes])).sum() / x.square().sum()).item()
        for name in changes[0]
    }


def test_coordinates_move_as_far_at_every_width() -> None:
    """Without muP those of the blocks and the logits move the farther the wider the model is."""
    with_mup, without = slopes(Mup(BASE)), slopes(None)
    assert {name: slope for name, slope in with_mup.items() if abs(slope) > FLAT} == {}
    beyond = {name for name, slope in without.items() if slope > GROWING}
    assert beyond == {name for name in with_mup if "layers" in name or name == "logits"}


def settings_by_name(model: LlamaForCausalLM, groups: list[dict]) -> dict[str, tuple[float, float]]:
    """Of every parameter, its learning rate and weight decay."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("is_tied", [False, True])
def test_rules_are_those_of_table_8(is_tied: bool) -> None:
    """What is wide on both sides learns 1 / m as fast, and decays as fast as before; all else is as at the base."""
    base, wide = (
        build_model(replace(shape(width, Mup(BASE)), tie_word_embeddings=is_tied), "sdpa", 1) for width in (BASE, 128)
    )
    m = 128 / BASE
    narrow = dict(base.named_parameters())
    found = settings_by_name(wide, torch_groups(wide))
    assert found.keys() == narrow.keys()
    for name, parameter in wide.named_parameters():
        grown = [there != here for there, here in zip(narrow[name].shape, parameter.shape, strict=True)]
        is_matrix = sum(grown) == 2
        assert found[name] == ((RATE / m, DECAY * m) if is_matrix else (RATE, DECAY)), name
        if parameter.dim() == 2:
            ratio = (parameter.std() / narrow[name].std()).item()
            assert ratio == pytest.approx(1 / sqrt(m) if is_matrix else 1.0, rel=0.1), name


@pytest.mark.real
def test_rules_are_those_of_the_package_mup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its MuAdamW, initialization and MuReadout over our decoder, whose infinite dimensions it finds by itself."""
    [package] = unpacked(tmp_path, "mup==1.0.0").glob("mup-*")
    monkeypatch.syspath_prepend(package)
    import mup

    ours, theirs, base, delta = (build_model(shape(w, Mup(BASE)), "sdpa", 1) for w in (128, 128, BASE, 2 * BASE))
    mup.set_base_shapes(theirs, base, delta=delta, rescale_params=False)
    groups = mup.MuAdamW(theirs.parameters(), lr=RATE, weight_decay=DECAY).param_groups
    assert settings_by_name(ours, torch_groups(ours)) == settings_by_name(theirs, groups)
    stds = {name: parameter.std().item() for name, parameter in base.named_parameters() if parameter.dim() == 2}
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if parameter.dim() == 2:
            mup.normal_(expected, std=stds[name])
            assert parameter.std().item() == pytest.approx(expected.std().item(), rel=0.1), name
    readout = mup.MuReadout(128, VOCABULARY, bias=False)
    readout.weight.infshape = theirs.lm_head.weight.infshape
    torch.testing.assert_close(readout(torch.ones(128)), readout.weight.sum(dim=1) / ours.config.width_multiplier)
