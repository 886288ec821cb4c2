"""Every backend against the one that is written out."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from tinyllama_ds.errors import Refusal
from tinyllama_ds.model.attention import (
    ATTENTION_BACKENDS,
    GPU_ONLY,
    attention_function,
    documents_for,
    eager_attention,
    resolve_attention_backend,
)
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import build_model

# Kernels of GPUs are tested with --gpu, the others on the CPU.
BACKENDS = [pytest.param(name, marks=pytest.mark.gpu) if name in GPU_ONLY else name for name in ATTENTION_BACKENDS]


def skip_if_absent(name: str) -> None:
    if name in GPU_ONLY:
        try:
            resolve_attention_backend(name, "cuda", sixteen_bit=True)
        except Refusal as refusal:
            pytest.skip(str(refusal))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("length", [1, 5, 64, 150])
@pytest.mark.parametrize("name", BACKENDS)
def test_outputs_and_gradients_equal_eager(name: str, length: int, heads: tuple[int, int]) -> None:
    skip_if_absent(name)
    on_gpu = name in GPU_ONLY
    device, dtype, tolerance = ("cuda", torch.bfloat16, 2e-2) if on_gpu else ("cpu", torch.float32, 1e-5)
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, length, heads[0], 16), (2, length, heads[1], 16), (2, length, heads[1], 16)]
    mine = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    reference = [tensor.detach().clone().requires_grad_() for tensor in mine]
    upstream = torch.randn(shapes[0], generator=generator).to(device, dtype)
    out, expected = attention_function(name)(*mine), eager_attention(*reference)
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    out.backward(upstream)
    expected.backward(upstream)
    for tensor, twin in zip(mine, reference, strict=True):
        torch.testing.assert_close(tensor.grad, twin.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["sdpa", "blocked", "eager"])
def test_the_future_is_invisible(name: str) -> None:
    q, k, v = (torch.randn(1, 10, heads, 8) for heads in (4, 2, 2))
    before = attention_function(name)(q, k, v)
    k[:, 6:], v[:, 6:] = 100.0, -100.0
    after = attention_function(name)(q, k, v)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(Refusal, match="'flash' is unknown; choose auto"):
        resolve_attention_backend("flash", "cpu", sixteen_bit=True)


def test_auto_is_blocked_on_a_cpu() -> None:
    assert resolve_attention_backend("auto", "cpu", sixteen_bit=True) == "blocked"
    assert resolve_attention_backend("auto", "cpu", sixteen_bit=False) == "blocked"


@pytest.mark.gpu
def test_auto_is_the_fastest_that_the_gpu_has_for_the_precision() -> None:
    chosen = resolve_attention_backend("auto", "cuda", sixteen_bit=True)
    assert chosen == "sdpa" or find_spec({"2": "flash_attn", "3": "flash_attn_interface"}[chosen[-1]])
    assert resolve_attention_backend("auto", "cuda", sixteen_bit=False) == "sdpa"


@pytest.mark.parametrize("name", ["sdpa_flash", "sdpa_cudnn"])
def test_a_16_bit_kernel_is_refused_for_fp32_on_a_gpu(name: str) -> None:
    assert resolve_attention_backend(name, "cuda", sixteen_bit=True) == name
    with pytest.raises(Refusal, match="computes in bf16 or fp16, and the training is in fp32; choose sdpa"):
        resolve_attention_backend(name, "cuda", sixteen_bit=False)


@pytest.mark.parametrize("name", ["sdpa", "blocked"])
def test_bf16_stays_within_its_rounding(name: str) -> None:
    shapes = [(2, 200, heads, 32) for heads in (4, 2, 2)]
    exact = [
        torch.randn(s, generator=torch.Generator().manual_seed(n)).bfloat16().double() for n, s in enumerate(shapes)
    ]
    mine = [tensor.bfloat16().requires_grad_() for tensor in exact]
    twin = [tensor.requires_grad_() for tensor in exact]
    upstream = torch.randn(shapes[0], generator=torch.Generator().manual_seed(9)).bfloat16()
    out, expected = attention_function(name)(*mine), eager_attention(*twin)
    out.backward(upstream)
    expected.backward(upstream.double())
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(mine, twin, strict=True))]
    for found, reference in pairs:
        assert (found.double() - reference).norm() / reference.norm() < 1e-2


@pytest.mark.parametrize(
    ("name", "module"), [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")]
)
def test_absent_package_that_was_asked_for_is_an_error(name: str, module: str) -> None:
    if find_spec(module):
        pytest.skip(f"{module} is installed here")
    with pytest.raises(Refusal, match="which is not installed"):
        resolve_attention_backend(name, "cuda", sixteen_bit=True)


# FlashAttention's published interface in PyTorch, for machines without the kernels: early releases return a pair.
INTERFACE = """
import torch
from tinyllama_ds.model.attention import eager_attention

def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    assert causal
    out = eager_attention(q, k, v)
    return (out, None) if {returns_pair} else out

def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
    assert causal and cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.diff().max() <= max_seqlen_q == max_seqlen_k
    sizes = cu_seqlens_q.diff().tolist()
    parts = zip(*(tensor.split(sizes) for tensor in (q, k, v)))
    out = torch.cat([eager_attention(*(part[None] for part in document))[0] for document in parts])
    return (out, None) if {returns_pair} else out
"""


@pytest.fixture
def published(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module `flash_attn_interface`, as its interface is published."""
    if find_spec("flash_attn_interface"):
        pytest.skip("flash_attn_interface is installed here, and tested itself")
    source = tmp_path / "flash_attn_interface.py"
    source.write_text(INTERFACE.format(returns_pair=request.param))
    spec = spec_from_file_location(source.stem, source)
    monkeypatch.setitem(sys.modules, source.stem, module_from_spec(spec))
    spec.loader.exec_module(sys.modules[source.stem])


@pytest.mark.parametrize("published", [False, True], indirect=True, ids=["alone", "pair"])
def test_flash_attention_is_called_as_its_interface_is_published(published: None) -> None:
    attend = attention_function("flash_attention_3")
    q, k, v = (torch.randn(2, 20, heads, 16, generator=torch.Generator().manual_seed(heads)) for heads in (6, 2, 2))
    segments = torch.tensor([[0] * 7 + [1] + [2] * 12, [0] * 20])
    torch.testing.assert_close(attend(q, k, v), eager_attention(q, k, v))
    borders = documents_for("flash_attention_3", segments)
    assert borders.tolist() == [0, 7, 8, 20, 40]
    torch.testing.assert_close(attend(q, k, v, borders), eager_attention(q, k, v, segments))


@pytest.mark.parametrize("published", [False], indirect=True, ids=["alone"])
def test_borders_are_found_once_for_all_blocks(published: None) -> None:
    """Each time would make the host wait for a GPU, and break the graph of a compiled block."""
    found = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal found
            found += func is torch.ops.aten.nonzero.default
            return func(*args, **(kwargs or {}))

    config = LlamaConfig(97, 64, 176, 3, 8, 2, 64)
    model, reference = (build_model(config, name, seed=1) for name in ("flash_attention_3", "eager"))
    tokens = torch.randint(config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(3))
    segments = torch.tensor([[0] * 7 + [1] + [2] * 12, [0] * 20])
    with Watch():
        logits = model(tokens, segments=segments)
    assert found == 1
    torch.testing.assert_close(logits, reference(tokens, segments=segments))


def test_gpu_kernel_on_a_cpu_is_refused() -> None:
    with pytest.raises(Refusal, match="'sdpa_cudnn' needs a GPU"):
        resolve_attention_backend("sdpa_cudnn", "cpu", sixteen_bit=True)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_with_segments_a_document_is_attended_alone(name: str, heads: tuple[int, int]) -> None:
    """Outputs and gradients of a packed row are those of its documents one by one."""
    skip_if_absent(name)
    if name == "sdpa_flash":
        pytest.skip("takes no mask; a recipe that asks for one is refused")
    on_gpu = name in GPU_ONLY
    device, dtype, tolerance = ("cuda", torch.bfloat16, 2e-2) if on_gpu else ("cpu", torch.float32, 1e-5)
    lengths = [[70, 1, 59], [5, 125]]  # two rows of 130 tokens
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    segments = torch.stack(numbers).to(device)
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 130, count, 16) for count in (heads[0], heads[1], heads[1])]
    packed = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
    alone = [tensor.detach().clone().requires_grad_() for tensor in packed]
    upstream = torch.randn(shapes[0], generator=generator).to(device, dtype)
    attention_function(name)(*packed, documents_for(name, segments)).backward(upstream)
    out = attention_function(name)(*packed, documents_for(name, segments))
    for row, documents in enumerate(lengths):
        start = 0
        for length in documents:
            part = slice(start, start + length)
            expected = eager_attention(*(tensor[row : row + 1, part] for tensor in alone))
            torch.testing.assert_close(out[row : row + 1, part], expected, rtol=tolerance, atol=tolerance)
            expected.backward(upstream[row : row + 1, part])
            start += length
    for tensor, twin in zip(packed, alone, strict=True):
        torch.testing.assert_close(tensor.grad, twin.grad, rtol=tolerance, atol=tolerance)
