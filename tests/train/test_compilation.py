"""Compiling where it works, falling back where it does not."""

import os
import subprocess
import sys
from types import SimpleNamespace

import torch

from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.health.probe import numerics_environment
from tinyllama_ds.health.stragglers import StragglerDetector
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.train.compile import compile_blocks, compile_unavailable_reason

_SIZE = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip


def test_the_compiled_decoder_has_the_loss_and_gradients_of_the_eager_one() -> None:
    tokens = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(1))
    results = []
    for compiled in (False, True):
        model = build_model(_SIZE, "blocked", seed=1)
        if compiled:
            compile_blocks(model)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        results.append([loss, *(parameter.grad for parameter in model.parameters())])
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-5, atol=1e-6)


def test_a_compiled_model_is_known_after_its_blocks_are_timed() -> None:
    """A save asks after `StragglerDetector` has wrapped the blocks, a load before: to both they are the same
    circumstances.
    """
    model, world = build_model(_SIZE, "blocked", seed=1), DistributedInfo(0, 0, 2, torch.device("cpu"))
    engine = SimpleNamespace(module=model)
    config = {"deepspeed_config": {"zero_optimization": {}}, "versions": {}, "deterministic": False}
    run = SimpleNamespace(description=config, micro_batch=2, attention=SimpleNamespace(backend="blocked"))
    assert not numerics_environment(engine, run, world)["compiled"]
    compile_blocks(model)
    at_load = numerics_environment(engine, run, world)
    StragglerDetector(model.model.layers, world)
    assert at_load["compiled"]
    assert numerics_environment(engine, run, world) == at_load


def test_this_machine_compiles() -> None:
    assert compile_unavailable_reason(torch.device("cpu")) is None


def test_a_machine_without_a_compiler_gives_the_reason(tmp_path: os.PathLike) -> None:
    program = (
        "import torch; from tinyllama_ds.train.compile import compile_unavailable_reason;"
        "print(compile_unavailable_reason(torch.device('cpu')))"
    )
    environment = os.environ | {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert finished.stdout.startswith("torch.compile does not work (")
    assert len(finished.stdout.splitlines()) == 1
