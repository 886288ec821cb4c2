"""What the planning room copies from rooms that it may not import is the same there."""

from pathlib import Path

import pytest

from tinyllama_ds.deepspeed_config import load_deepspeed_config
from tinyllama_ds.model.config import MODEL_SIZES, LlamaConfig
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.model.loss import MAX_CHUNK_LOGITS
from tinyllama_ds.planning.communication import Collective
from tinyllama_ds.planning.layout import gathers_of, modules_of, read_layout
from tinyllama_ds.planning.memory import CHUNK_LOGITS, Work, block_bytes_per_token

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


def test_the_chunk_of_the_loss_is_the_models() -> None:
    assert MAX_CHUNK_LOGITS["cuda"] == CHUNK_LOGITS


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_units_hold_all_parameters(name: str) -> None:
    model = MODEL_SIZES[name]
    assert sum(map(sum, modules_of(model))) == model.num_parameters


@pytest.mark.parametrize("attention", ["sdpa", "blocked", "eager"])
def test_a_block_keeps_what_the_formula_says(attention: str) -> None:
    """Bytes of the tensors that autograd saves for one block, weights and RoPE's shared tables left out."""
    import torch

    from tinyllama_ds.model.llama import rope_tables

    model = LlamaConfig(64, 256, 704, 1, 4, 2, 512)
    B, T = 2, 256
    decoder = build_model(model, attention, 1).bfloat16()
    cos, sin = rope_tables(model, T, torch.device("cpu"))
    outside = {tensor.untyped_storage().data_ptr() for tensor in (*decoder.parameters(), cos, sin)}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside and tensor.dtype != torch.bool:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(B, T, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = decoder.model.layers[0](x, cos, sin, None)
    layout = read_layout(load_deepspeed_config(CONFIGS[0]) | {"bf16": {"enabled": True}}, "any", 1)
    work = Work(B, T, "flash" if attention == "sdpa" else attention)
    found = sum(saved.values()) / (B * T)
    assert found == pytest.approx(block_bytes_per_token(model, layout, work), rel=0.03), y.shape


def test_rings() -> None:
    """Each of n ranks sends (n - 1) / n of the tensor for a gather or a reduce-scatter, an all-reduce is both."""
    kinds = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}
    for kind, passes in kinds.items():
        assert Collective("x", kind, 1000, 1).sent_per_rank(4) == passes * 750
    assert Collective("x", "reduce-scatter", 1000, 1).sent_per_rank(4, "gloo") == 1500


def test_weights_that_may_stay_are_gathered_once() -> None:
    model = MODEL_SIZES["tinyllama-1.1b"]
    layouts = {path.stem: read_layout(load_deepspeed_config(path), path.stem, 16) for path in CONFIGS}
    keep, hpz, lean = (gathers_of(model, layouts[name]) for name in ("zero3_keep", "zero3_hpz", "zero3"))
    assert (keep.forward, keep.backward) == (0, 0)  # persistent: gathered once per step
    assert hpz.backward == 0
    assert hpz.peak_live == pytest.approx(model.num_parameters, rel=1e-3)
    assert lean.backward > 0.7 * model.num_parameters
    assert lean.peak_live < 250_000_000
