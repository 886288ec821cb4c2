"""Inputs of recomputed blocks in host memory: the same gradients, and what autograd keeps."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model

CONFIG = LlamaConfig(97, 64, 176, 5, 4, 2, 64)
T = 48


def gradients(model: LlamaForCausalLM, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_are_the_same_in_every_micro_batch(device: str, every: int) -> None:
    """Two of one shape, which share their buffers, and one of a different shape; on a GPU of copies that take time."""
    config, length = (CONFIG, T) if device == "cpu" else (replace(CONFIG, hidden_size=1024), 4096)
    plain, offloaded = (build_model(config, "sdpa", 1, recompute_every=every, device=device) for _ in range(2))
    offloaded.offload_activations()
    for rows, columns in ((2, length), (2, length), (3, length // 2)):
        tokens = torch.randint(97, (rows, columns + 1), device=device)
        for found, expected in zip(gradients(offloaded, tokens), gradients(plain, tokens), strict=True):
            torch.testing.assert_close(found, expected, rtol=0 if device == "cpu" else 1e-4, atol=1e-7)


def test_a_second_forward_pass_before_the_backward_pass_is_an_error() -> None:
    """Its inputs took the place of the first one's."""
    model = build_model(CONFIG, "sdpa", 1, recompute_every=1)
    model.offload_activations()
    tokens = torch.randint(97, (2, T + 1))
    losses = [model(tokens[:, :-1], tokens[:, 1:]) for _ in range(2)]
    losses[1].backward()
    with pytest.raises(RuntimeError, match="a backward pass after another forward pass"):
        losses[0].backward()


class Blocks:
    """The tensors that go into and out of each block, as long as they exist."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.inputs: list[weakref.ref] = []
        for layer in model.model.layers:
            layer.register_forward_pre_hook(self._note)

    def _note(self, _: torch.nn.Module, arguments: tuple) -> None:
        self.inputs.append(weakref.ref(arguments[0].untyped_storage()))

    def on_device(self) -> int:
        gc.collect()
        return sum(storage() is not None for storage in self.inputs)


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_two_inputs_at_most_are_on_the_device(is_offloaded: bool) -> None:
    model = build_model(CONFIG, "sdpa", 1, recompute_every=1)
    if is_offloaded:
        model.offload_activations()
    blocks = Blocks(model)
    tokens = torch.randint(97, (2, T + 1))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    assert blocks.on_device() == (1 if is_offloaded else CONFIG.num_hidden_layers)
    loss.backward()


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("with_documents", [False, True])
def test_ropes_tables_exist_once(with_documents: bool, every: int) -> None:
    """Of all that five blocks keep for the backward pass, recomputed or not; no other tensor has their size."""
    document_ids = torch.arange(T).div(20, rounding_mode="floor").expand(2, -1) if with_documents else None
    tokens, size = torch.randint(97, (2, T + 1)), T * CONFIG.head_dim * (2 if with_documents else 1)
    tables: list[torch.UntypedStorage] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() == size and tensor.shape[-1] == CONFIG.head_dim:
            tables.append(tensor.untyped_storage())
        return tensor

    model = build_model(CONFIG, "sdpa", 1, recompute_every=every)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens[:, :-1], tokens[:, 1:], document_ids)
    assert len(tables) >= 2 * CONFIG.num_hidden_layers
    by_place = {storage.data_ptr(): storage.nbytes() for storage in tables}
    assert sum(by_place.values()) == 2 * 4 * size
