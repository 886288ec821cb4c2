"""The MLP of recomputed blocks, chunk by chunk, against transformers' on all rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from largest_tensor import LargestTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from tinyllama_ds.model import mlp
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import Block, build_model
from tinyllama_ds.model.mlp import SwiGLU
from tinyllama_ds.model.rope import rope_tables

CONFIG = LlamaConfig(32, 24, 80, 1, 2, 1, 64)
B, T = 2, 29


def outputs(module: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients by the input and the three weights."""
    x = x.detach().requires_grad_()
    out = module(x)
    weights = [getattr(module, f"{name}_proj").weight for name in ("gate", "up", "down")]
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, [x, *weights], upstream)]


def twin_of(module: SwiGLU, dtype: torch.dtype) -> LlamaMLP:
    """transformers' MLP with the same weights."""
    shape = {"hidden_size": CONFIG.hidden_size, "intermediate_size": CONFIG.intermediate_size}
    theirs = LlamaMLP(TheirConfig(**shape, num_attention_heads=CONFIG.num_attention_heads))
    theirs.load_state_dict(module.state_dict())
    return theirs.to(dtype)


@pytest.mark.parametrize("chunk", [1, 8, 14])
def test_chunks_are_transformers_mlp(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 58 rows: one by one, in eight chunks, in five; the last ones are shorter."""
    monkeypatch.setattr(mlp, "MLP_CHUNK_TOKENS", chunk)
    module, x = SwiGLU(CONFIG, is_chunked=True), torch.randn(B, T, CONFIG.hidden_size)
    for ours, theirs in zip(outputs(module, x), outputs(twin_of(module, torch.float32), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_in_bf16_chunks_are_as_exact_as_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against double precision: sums over sixteen chunks in bf16 would be several times as far off."""
    torch.manual_seed(1)
    module, x = SwiGLU(CONFIG, is_chunked=True).bfloat16(), torch.randn(1, 512, CONFIG.hidden_size).bfloat16()
    exact = outputs(twin_of(module, torch.float64), x.double())

    def errors() -> list[float]:
        pairs = zip(outputs(module, x), exact, strict=True)
        return [float((found.double() - true).norm() / true.norm()) for found, true in pairs]

    whole = errors()
    monkeypatch.setattr(mlp, "MLP_CHUNK_TOKENS", 32)
    for in_chunks, at_once in zip(errors(), whole, strict=True):
        assert in_chunks < 1.3 * at_once


def recomputed(rows: int) -> Callable[[], Any]:
    """Forward and backward of a checkpointed block on some rows."""
    block: Block = build_model(CONFIG, "sdpa", 1, recompute_every=1).model.layers[0]
    cos, sin = rope_tables(CONFIG, rows, torch.device("cpu"))
    x = torch.randn(1, rows, CONFIG.hidden_size, requires_grad=True)
    return lambda: checkpoint(block, x, cos, sin, None, use_reentrant=False).sum().backward()


def test_no_tensor_has_all_rows_and_the_intermediate_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the forward pass nor where it is made again, nor among the gradients; and no product is made twice
    more often than without chunks.
    """
    whole = T * CONFIG.intermediate_size
    counts = []
    for chunk in (T, 8):
        monkeypatch.setattr(mlp, "MLP_CHUNK_TOKENS", chunk)
        step = recomputed(T)
        with LargestTensor() as largest, FlopCounterMode(display=False) as flops:
            step()
        counts.append(flops.get_total_flops())
        assert (largest.elements < whole) == (chunk < T)
    assert counts[0] == counts[1]


def test_short_sequences_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many they are."""
    module = SwiGLU(CONFIG, is_chunked=True)
    monkeypatch.setattr(module, "of_chunk", None)
    monkeypatch.setattr(mlp, "MLP_CHUNK_TOKENS", 8)
    assert module(torch.randn(9, 16, CONFIG.hidden_size)).shape == (9, 16, CONFIG.hidden_size)
    with pytest.raises(TypeError):
        module(torch.randn(1, 17, CONFIG.hidden_size))
