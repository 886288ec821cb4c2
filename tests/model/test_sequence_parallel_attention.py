"""Attention shared by ranks is that of one rank, with any number of heads; so are its gradients and what it keeps."""

import json

import pytest
import torch
import torch.distributed as dist
from forked import on_ranks

from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.model.attention import attention_function
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.model.sequence_parallel import SequenceParallel
from tinyllama_ds.planning.activations import Work, block_bytes_per_token
from tinyllama_ds.planning.layout import read_layout
from tinyllama_ds.train.engine import hard_exit, start_process_group

HEADS = [(4, 4), (4, 2), (4, 1), (12, 3), (12, 6)]  # query and key heads, for 2 and 4 ranks
B, T, E = 2, 16, 8


def compare_attention() -> None:
    """Rank 0 prints how far output and gradients are from those of whole sequences, by heads and backend."""
    world = read_world()
    start_process_group(world)
    shared = SequenceParallel(dist.group.WORLD)
    documents = torch.tensor([[0] * 5 + [1] * 11, [0] * 9 + [1] * 7])
    found = {}
    for number, (H, K) in enumerate(HEADS):
        for backend, ids in (("eager", None), ("eager", documents), ("blocked", documents), ("sdpa", documents)):
            for dtype in (torch.float32, torch.bfloat16):
                torch.manual_seed(number)
                whole = [torch.randn(B, T, heads, E, dtype=dtype, requires_grad=True) for heads in (H, K, K)]
                slope = torch.randn(B, T, H, E, dtype=dtype)
                attend = attention_function(backend)
                expected = attend(*whole, ids)
                gradients = torch.autograd.grad(expected, whole, slope)
                length, own = shared.place_of(T // world.size)
                assert length == T
                parts = [x.detach()[:, own].requires_grad_() for x in whole]
                out = shared.around(attend)(*parts, ids)
                own_gradients = torch.autograd.grad(out, parts, slope[:, own])
                pairs = [(out, expected[:, own]), *zip(own_gradients, (g[:, own] for g in gradients), strict=True)]
                worst = torch.stack([((a - b).abs().max() / b.abs().max()).float() for a, b in pairs]).max()
                dist.all_reduce(worst, dist.ReduceOp.MAX)
                name = f"{H} {K} {backend} {'documents' if ids is not None else 'rows'} {dtype}"
                found[name] = worst.item()
    if world.is_rank0:
        print(json.dumps(found))
    hard_exit(0)


@pytest.mark.parametrize("ranks", [2, 4])
def test_shared_attention_is_attention(ranks: int) -> None:
    finished = on_ranks(compare_attention, ranks=ranks)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    assert len(found) == len(HEADS) * 4 * 2
    for name, difference in found.items():
        assert difference < (1e-6 if "float32" in name else 2e-2), name


def print_bytes_kept() -> None:
    """Of a block's saved tensors, per token of a rank, and by the formula of `plan`, for two backends."""
    world = read_world()
    start_process_group(world)
    found = [bytes_kept(attention, world.size) for attention in ("sdpa", "eager")]
    if world.is_rank0:
        print(json.dumps(found))
    hard_exit(0)


def bytes_kept(attention: str, ranks: int) -> tuple[float, int]:
    config = LlamaConfig(64, 256, 704, 1, 4, 1, 512)
    model = build_model(config, attention, 1, dtype=torch.bfloat16)
    model.split_sequences(dist.group.WORLD)
    length = 256
    tokens = torch.randint(64, (2, length // ranks))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = model.model.embed_tokens(tokens)
    cos, sin = (torch.randn(tokens.shape[1], config.head_dim) for _ in range(2))
    outside = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), cos, sin)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model.model.layers[0](x, cos, sin, None)
    assert y.shape == x.shape
    layout = read_layout({"bf16": {"enabled": True}}, "any", ranks)
    work = Work(2, length, "flash" if attention == "sdpa" else attention, sequence_parallel=ranks)
    found = sum(size for place, size in kept.items() if place not in outside) / tokens.numel()
    return found, block_bytes_per_token(config, layout, work)


def test_a_shared_block_keeps_the_bytes_of_the_formula() -> None:
    finished = on_ranks(print_bytes_kept, ranks=2)
    assert finished.returncode == 0, finished.stderr
    for found, planned in json.loads(finished.stdout.splitlines()[-1]):
        assert found == pytest.approx(planned, rel=0.03)
