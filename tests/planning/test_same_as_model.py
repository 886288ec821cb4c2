"""What planning repeats of the model, because it imports no torch, is the same there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tinyllama_ds.config.deepspeed import load_deepspeed_config
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model import mlp
from tinyllama_ds.model.attention import (
    ATTENTION_BACKENDS,
    Demands,
    Device,
    attention_metadata,
    capability_of,
    resolve_attention_backend,
)
from tinyllama_ds.model.config import MODEL_SIZES, LlamaConfig
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.model.rope import rope_tables
from tinyllama_ds.planning import activations
from tinyllama_ds.planning.activations import (
    BACKENDS,
    Work,
    activation_rows,
    attention_memory,
    block_bytes_per_token,
)
from tinyllama_ds.planning.communication import Collective
from tinyllama_ds.planning.layout import gathers_of, modules_of, persistent_elements, read_layout

CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_units_hold_all_parameters(name: str) -> None:
    model = MODEL_SIZES[name]
    assert sum(map(sum, modules_of(model))) == model.num_parameters


def test_a_tied_table_is_kept_once_and_gathered_twice() -> None:
    """In the forward pass for the embedding and, once it is released, for the head."""
    untied = MODEL_SIZES["test"]
    tied, table = replace(untied, tie_word_embeddings=True), untied.vocab_size * untied.hidden_size
    assert tied.num_parameters == untied.num_parameters - table
    zero = {"stage": 3, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    keeps = read_layout({"zero_optimization": zero | {"stage3_param_persistence_threshold": 2**40}}, "keeps", 2)
    assert [persistent_elements(model, keeps) for model in (tied, untied)] == [
        tied.num_parameters,
        untied.num_parameters,
    ]
    gathers = read_layout({"zero_optimization": zero | {"stage3_param_persistence_threshold": 0}}, "gathers", 2)
    assert gathers_of(tied, gathers).forward == untied.num_parameters
    reuses = replace(gathers, max_reuse=2**40)
    assert gathers_of(tied, reuses).forward == tied.num_parameters


def test_the_backends_are_the_models() -> None:
    assert tuple(name for name in BACKENDS if name != "auto") == tuple(ATTENTION_BACKENDS)


@pytest.mark.parametrize("attention", ["sdpa", "blocked", "eager"])
def test_a_block_keeps_the_bytes_of_the_formula(attention: str) -> None:
    model = LlamaConfig(64, 256, 704, 1, 4, 2, 512)
    kept = "flash" if attention == "sdpa" else attention
    assert_a_block_keeps(model, attention, kept, torch.device("cpu"), torch.bfloat16, masked=False)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("attention", ATTENTION_BACKENDS)
def test_a_block_keeps_the_bytes_of_the_formula_on_a_gpu(attention: str, dtype: torch.dtype, masked: bool) -> None:
    device = torch.device("cuda", 0)
    demands = Demands(dtype == torch.bfloat16, document_mask=masked)
    try:
        resolve_attention_backend(attention, Device("cuda", capability_of(device)), demands)
    except ConfigError as error:
        pytest.skip(str(error))
    if attention == "blocked" and masked:
        pytest.skip("keeps a mask of each block of keys as well")
    kept = attention_memory(attention, masked, dtype.itemsize)
    assert_a_block_keeps(LlamaConfig(64, 512, 1408, 1, 8, 2, 1024), attention, kept, device, dtype, masked)


def assert_a_block_keeps(
    model: LlamaConfig, attention: str, kept: str, device: torch.device, dtype: torch.dtype, masked: bool
) -> None:
    """Bytes of the tensors that autograd saves for one block, weights, RoPE's tables and documents excluded."""
    B, T = 2, 256
    decoder = build_model(model, attention, 1).to(device, dtype)
    cos, sin = rope_tables(model, T, device)
    document_ids = torch.arange(T).div(100, rounding_mode="floor").expand(B, -1)
    documents = attention_metadata(attention, document_ids).to(device) if masked else None
    shared = (*decoder.parameters(), cos, sin, *([documents] if masked else []))
    outside = {tensor.untyped_storage().data_ptr() for tensor in shared}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside and tensor.dtype != torch.bool:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(B, T, model.hidden_size, dtype=dtype, device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = decoder.model.layers[0](x, cos, sin, documents)
    precision = {"bf16": {"enabled": dtype == torch.bfloat16}}
    layout = read_layout(load_deepspeed_config(CONFIGS[0]) | precision, "any", 1)
    found = sum(saved.values()) / (B * T)
    assert found == pytest.approx(block_bytes_per_token(model, layout, Work(B, T, kept)), rel=0.03), y.shape


@pytest.mark.parametrize(("dtype", "chunk"), [(torch.bfloat16, 512), (torch.float32, 4096)], ids=str)
def test_recomputed_blocks_take_the_bytes_of_the_rows(
    dtype: torch.dtype, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of a forward and a backward pass over what is there before, as PyTorch's allocator counts it."""
    for module in (mlp, activations):
        monkeypatch.setattr(module, "MLP_CHUNK_TOKENS", chunk)
    model, T = LlamaConfig(64, 256, 704, 3, 4, 2, 2048), 2048
    decoder, tokens = build_model(model, "sdpa", 1, recompute_every=1, dtype=dtype), torch.randint(64, (1, T + 1))
    for parameter in decoder.parameters():  # gradients of weights have rows of their own
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        decoder(tokens[:, :-1], tokens[:, 1:]).backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    peak = max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
    layout = read_layout(load_deepspeed_config(CONFIGS[0]) | {"bf16": {"enabled": dtype == torch.bfloat16}}, "any", 1)
    work = Work(1, T, "flash", recompute_every=1)
    rows = activation_rows(model, layout, work)
    planned = sum(row.bytes for row in rows if row.phase in ("micro-batch", "backward"))
    assert planned == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(
    ("backend", "document_mask", "weight_bytes", "kept"),
    [
        ("auto", False, 2, "flash"),
        ("auto", True, 2, "flash"),
        ("varlen", True, 2, "flash"),
        ("flash_attention_2", True, 2, "flash"),
        ("sdpa", False, 2, "flash"),
        ("sdpa", True, 2, "masked"),
        ("sdpa_cudnn", True, 2, "masked"),
        ("auto", False, 4, "repeated"),
        ("auto", True, 4, "masked"),
        ("sdpa", False, 4, "repeated"),
        ("blocked", True, 4, "blocked"),
        ("eager", True, 2, "eager"),
    ],
)
def test_what_a_backend_keeps(backend: str, document_mask: bool, weight_bytes: int, kept: str) -> None:
    assert attention_memory(backend, document_mask, weight_bytes) == kept


def test_a_mask_costs_what_it_holds() -> None:
    """Per token of TinyLlama in bf16: repeated keys and values, and a row of the mask."""
    model = MODEL_SIZES["tinyllama-1.1b"]
    layout = read_layout(load_deepspeed_config(CONFIGS[0]) | {"bf16": {"enabled": True}}, "any", 1)
    flash, masked = (block_bytes_per_token(model, layout, Work(8, 2048, kept)) for kept in ("flash", "masked"))
    assert masked - flash == 2 * 2 * (32 - 4) * 64 + 2 * 2048


def test_rings() -> None:
    """Each of n ranks sends (n - 1) / n of the tensor for a gather or a reduce-scatter, an all-reduce is both."""
    kinds = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}
    for kind, ring_passes in kinds.items():
        assert Collective("x", kind, 1000, 1).sent_per_rank(4) == ring_passes * 750
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
