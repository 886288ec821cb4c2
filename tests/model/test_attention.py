"""Every backend against the one that is written out."""

import inspect
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.overrides import TorchFunctionMode

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.attention import (
    ATTENTION_BACKENDS,
    Demands,
    Device,
    attention_function,
    attention_metadata,
    capability_of,
    eager_attention,
    resolve_attention_backend,
)
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import build_model

ON_CPU = [name for name, backend in ATTENTION_BACKENDS.items() if backend.on_cpu]
SEGMENTS = torch.tensor([[0] * 7 + [1] + [2] * 12, [0] * 20])  # two rows of 20 tokens


def random_tensors(*shapes: tuple[int, ...], seed: int = 1, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def gradients(attend: Callable, inputs: list[Tensor], upstream: Tensor, *documents: Tensor) -> list[Tensor]:
    """Output and gradients."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = attend(*leaves, *documents)
    out.backward(upstream)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("length", [1, 5, 64, 150])
@pytest.mark.parametrize("name", ON_CPU)
def test_outputs_and_gradients_equal_eager(name: str, length: int, heads: tuple[int, int]) -> None:
    q, k, v, upstream = random_tensors(*((2, length, count, 16) for count in (heads[0], heads[1], heads[1], heads[0])))
    found = gradients(attention_function(name), [q, k, v], upstream)
    torch.testing.assert_close(found, gradients(eager_attention, [q, k, v], upstream), rtol=1e-5, atol=1e-5)


class OnAGpu(TorchFunctionMode):
    """Tensors say that they are on a GPU; `heads` gets those of queries and keys at PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[tuple[int, int, bool]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.heads.append((args[0].shape[1], args[1].shape[1], kwargs["enable_gqa"]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "masked", "heads"),
    [
        (torch.bfloat16, False, (6, 2, True)),  # PyTorch's flash kernel shares heads
        (torch.bfloat16, True, (6, 6, False)),
        (torch.float32, False, (6, 6, False)),
        (torch.float32, True, (6, 6, False)),
    ],
)
def test_sdpa_repeats_heads_where_scores_would_be_written_out(
    dtype: torch.dtype, masked: bool, heads: tuple[int, int, bool]
) -> None:
    q, k, v, upstream = random_tensors(*((2, 20, n, 16) for n in (6, 2, 2, 6)), dtype=dtype)
    documents = [SEGMENTS] if masked else []
    with OnAGpu() as gpu:
        found = gradients(attention_function("sdpa"), [q, k, v], upstream, *documents)
    assert gpu.heads == [heads]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, gradients(eager_attention, [q, k, v], upstream, *documents), **tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("masked", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=str)
@pytest.mark.parametrize("name", ATTENTION_BACKENDS)
def test_every_backend_equals_eager_on_a_gpu(name: str, heads: tuple[int, int], masked: bool, compiled: bool) -> None:
    """Forward and backward in bf16, in one graph where it is compiled, beside fp32 written out."""
    try:
        resolve_attention_backend(name, this_gpu(), Demands(sixteen_bit=True, document_mask=masked))
    except ConfigError as error:
        pytest.skip(str(error))
    shapes = [(2, 130, count, 64) for count in (heads[0], heads[1], heads[1], heads[0])]
    q, k, v, upstream = (tensor.cuda() for tensor in random_tensors(*shapes, dtype=torch.bfloat16))
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in ([70, 1, 59], [5, 125])]
    document_ids = torch.stack(numbers)
    documents = [attention_metadata(name, document_ids).cuda()] if masked else []
    attend = attention_function(name)
    if compiled:
        torch._dynamo.reset()
        attend = torch.compile(attend, fullgraph=True)
    found = gradients(attend, [q, k, v], upstream, *documents)
    exact = [tensor.float() for tensor in (q, k, v)]
    expected = gradients(eager_attention, exact, upstream.float(), *([document_ids.cuda()] if masked else []))
    for mine, reference in zip(found, expected, strict=True):
        assert (mine.float() - reference).norm() / reference.norm() < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("name", ATTENTION_BACKENDS)
def test_deterministic_gradients_are_the_same_every_time_on_a_gpu(name: str, masked: bool) -> None:
    demands = Demands(sixteen_bit=True, document_mask=masked, deterministic=True)
    try:
        resolve_attention_backend(name, this_gpu(), demands)
    except ConfigError as error:
        pytest.skip(str(error))
    q, k, v, upstream = (
        tensor.cuda() for tensor in random_tensors(*((4, 2048, n, 64) for n in (16, 4, 4, 16)), dtype=torch.bfloat16)
    )
    document_ids = torch.arange(2048).div(300, rounding_mode="floor").expand(4, -1)
    documents = [attention_metadata(name, document_ids).cuda()] if masked else []
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (gradients(attention_function(name), [q, k, v], upstream, *documents) for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.fixture(autouse=True)
def pytorchs_own_flash_attention() -> Iterator[None]:
    """A later one that a test has activated ends with it."""
    yield
    if torch_attention.current_flash_attention_impl() is not None:
        torch_attention.restore_flash_attention_impl()


def this_gpu() -> Device:
    return Device("cuda", capability_of(torch.device("cuda", 0)))


@pytest.mark.parametrize("name", ["sdpa", "blocked", "eager"])
def test_the_future_is_invisible(name: str) -> None:
    q, k, v = (torch.randn(1, 10, heads, 8) for heads in (4, 2, 2))
    before = attention_function(name)(q, k, v)
    k[:, 6:], v[:, 6:] = 100.0, -100.0
    after = attention_function(name)(q, k, v)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


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


# The published interface of FlashAttention 2 in PyTorch, for machines without its kernels.
INTERFACE = """
import torch
from tinyllama_ds.model.attention import eager_attention

deterministic_calls = []

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False):
    assert causal
    deterministic_calls.append(deterministic)
    return eager_attention(q, k, v)

def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, causal=False, deterministic=False
):
    assert causal and cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.diff().max() <= max_seqlen_q == max_seqlen_k
    deterministic_calls.append(deterministic)
    sizes = cu_seqlens_q.diff().tolist()
    parts = zip(*(tensor.split(sizes) for tensor in (q, k, v)))
    return torch.cat([eager_attention(*(part[None] for part in document))[0] for document in parts])
"""


@pytest.fixture
def flash_attn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """The module `flash_attn`, as its interface is published."""
    if find_spec("flash_attn"):
        pytest.skip("flash_attn is installed here, and tested itself")
    source = tmp_path / "flash_attn.py"
    source.write_text(INTERFACE)
    spec = spec_from_file_location(source.stem, source)
    monkeypatch.setitem(sys.modules, source.stem, module_from_spec(spec))
    spec.loader.exec_module(sys.modules[source.stem])
    return sys.modules[source.stem]


# The operators under PyTorch's varlen_attn, which have no kernel for CPUs: those of FlashAttention 2, written out.
def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, keys: Tensor, longest_q: int, longest_k: int,
    dropout: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, **unused: object,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert cu_seqlens.dtype == torch.int32
    assert torch.equal(cu_seqlens, keys)
    assert cu_seqlens.diff().max() <= longest_q == longest_k
    assert (is_causal, dropout, scale, window_size_left in (None, -1)) == (True, 0.0, None, True)
    weights, sums = _weights(q, k, cu_seqlens)
    out = torch.einsum("hqk,khe->qhe", weights, _wide(v, q)).to(q.dtype)
    state = torch.zeros(2, dtype=torch.uint64)
    return out, sums, state, state, torch.empty(0)


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, cu_seqlens: Tensor, *others: object,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights, expected_sums = _weights(q, k, cu_seqlens)
    torch.testing.assert_close(sums, expected_sums)
    torch.testing.assert_close(out, torch.einsum("hqk,khe->qhe", weights, _wide(v, q)).to(q.dtype))
    wide_grad, wide_out = grad.float(), out.float()
    grad_weights = torch.einsum("qhe,khe->hqk", wide_grad, _wide(v, q)) - (wide_grad * wide_out).sum(-1).t()[..., None]
    grad_scores = weights * grad_weights * q.shape[-1] ** -0.5
    grad_q = torch.einsum("hqk,khe->qhe", grad_scores, _wide(k, q))
    grad_k = torch.einsum("hqk,qhe->khe", grad_scores, q.float())
    grad_v = torch.einsum("hqk,qhe->khe", weights, wide_grad)
    shared = (grad_k.shape[0], k.shape[1], -1, grad_k.shape[2])  # summed over the query heads that share a key head
    return grad_q.to(q.dtype), grad_k.view(shared).sum(2).to(k.dtype), grad_v.view(shared).sum(2).to(v.dtype)


def _wide(keys: Tensor, q: Tensor) -> Tensor:
    return keys.float().repeat_interleave(q.shape[1] // keys.shape[1], dim=1)


def _weights(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax (H, tokens, tokens) inside documents, and the logarithms of its sums (H, tokens)."""
    numbers = torch.bucketize(torch.arange(len(q)), cu_seqlens.long(), right=True)
    visible = (numbers[:, None] == numbers[None, :]).tril()
    scores = torch.einsum("qhe,khe->hqk", q.float(), _wide(k, q)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1), scores.logsumexp(-1)


@pytest.fixture
def flash_operators() -> Iterator[None]:
    """PyTorch's varlen_attn on this CPU: its own Python and autograd formula, over operators that are written out."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", flash_forward, "CPU")
        library.impl("_flash_attention_backward", flash_backward, "CPU")
        yield


@pytest.mark.usefixtures("flash_operators", "flash_attn")
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
@pytest.mark.parametrize("name", ["varlen", "flash_attention_2"])
def test_documents_by_their_borders_are_attended_alone(name: str, heads: tuple[int, int]) -> None:
    q, k, v, upstream = random_tensors(*((2, 20, n, 16) for n in (heads[0], heads[1], heads[1], heads[0])))
    cu_seqlens = attention_metadata(name, SEGMENTS)
    assert cu_seqlens.tolist() == [0, 7, 8, 20, 40]
    attend = attention_function(name)
    found = gradients(attend, [q, k, v], upstream, cu_seqlens)
    torch.testing.assert_close(found, gradients(eager_attention, [q, k, v], upstream, SEGMENTS))
    found = gradients(attend, [q, k, v], upstream)
    torch.testing.assert_close(found, gradients(eager_attention, [q, k, v], upstream))


@pytest.mark.usefixtures("flash_operators")
def test_varlen_compiles_to_one_graph_for_any_number_of_documents() -> None:
    q, k, v, upstream = random_tensors(*((2, 20, n, 16) for n in (6, 2, 2, 6)))
    attend = torch.compile(attention_function("varlen"), fullgraph=True, backend="aot_eager")
    for document_ids in (SEGMENTS, torch.zeros_like(SEGMENTS), torch.arange(20).expand(2, -1)):
        found = gradients(attend, [q, k, v], upstream, attention_metadata("varlen", document_ids))
        torch.testing.assert_close(found, gradients(eager_attention, [q, k, v], upstream, document_ids))


@pytest.mark.usefixtures("flash_operators")
@pytest.mark.parametrize("name", ["sdpa", "sdpa_flash", "varlen"])
def test_all_blocks_share_one_graph(name: str) -> None:
    """Each has its own closure; beyond a few graphs of one function PyTorch would compile no more."""
    graphs = 0

    def count(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        nonlocal graphs
        graphs += 1
        return module.forward

    model = build_model(LlamaConfig(97, 32, 48, 12, 4, 2, 64), name, seed=1)
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(backend=count)
    tokens = torch.randint(97, (2, 20))
    documents = {"document_ids": SEGMENTS} if ATTENTION_BACKENDS[name].documents else {}
    model(tokens, tokens, **documents).backward()
    assert graphs == 1


@pytest.mark.usefixtures("flash_operators")
@pytest.mark.parametrize("parameters", ["is_causal", "window_size"])
def test_varlen_of_earlier_torch_is_called_as_it_was_published(
    parameters: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.10 and 2.11 have other parameters, and share heads without being told."""
    from torch.nn.attention import varlen

    now = varlen.varlen_attn
    if "enable_gqa" not in inspect.signature(now).parameters:
        pytest.skip("this is an earlier torch, and tested itself")

    def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
        window = (-1, 0) if is_causal else (-1, -1)
        return now(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window, enable_gqa=True)

    def of_2_11(  # type: ignore[no-untyped-def]
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        return now(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size, enable_gqa=True)

    monkeypatch.setattr(varlen, "varlen_attn", {"is_causal": of_2_10, "window_size": of_2_11}[parameters])
    q, k, v = random_tensors(*((2, 20, n, 16) for n in (6, 2, 2)))
    found = attention_function("varlen")(q, k, v, attention_metadata("varlen", SEGMENTS))
    torch.testing.assert_close(found, eager_attention(q, k, v, SEGMENTS))


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attention_2_is_told_to_be_deterministic(deterministic: bool, flash_attn: object) -> None:
    attend = attention_function("flash_attention_2")  # before the switch
    q, k, v = random_tensors(*((2, 20, n, 16) for n in (6, 2, 2)))
    torch.use_deterministic_algorithms(deterministic)
    try:
        attend(q, k, v)
        attend(q, k, v, attention_metadata("flash_attention_2", SEGMENTS))
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash_attn.deterministic_calls == [deterministic] * 2


@pytest.mark.usefixtures("flash_operators")
def test_borders_are_found_once_for_all_blocks() -> None:
    """Each time would make the host wait for a GPU, and break the graph of a compiled block."""
    found = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal found
            found += func is torch.ops.aten.nonzero.default
            return func(*args, **(kwargs or {}))

    config = LlamaConfig(97, 64, 176, 3, 8, 2, 64)
    model, reference = (build_model(config, name, seed=1) for name in ("varlen", "eager"))
    tokens = torch.randint(config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(3))
    with Watch():
        logits = model(tokens, document_ids=SEGMENTS)
    assert found == 1
    torch.testing.assert_close(logits, reference(tokens, document_ids=SEGMENTS))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("name", [name for name in ON_CPU if ATTENTION_BACKENDS[name].documents])
def test_with_segments_a_document_is_attended_alone(name: str, heads: tuple[int, int]) -> None:
    """Outputs and gradients of a packed row are those of its documents one by one."""
    tolerance = 1e-5
    lengths = [[70, 1, 59], [5, 125]]  # two rows of 130 tokens
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    document_ids = torch.stack(numbers)
    *packed, upstream = random_tensors(*((2, 130, n, 16) for n in (heads[0], heads[1], heads[1], heads[0])))
    packed = [tensor.requires_grad_() for tensor in packed]
    alone = [tensor.detach().clone().requires_grad_() for tensor in packed]
    attention_function(name)(*packed, attention_metadata(name, document_ids)).backward(upstream)
    out = attention_function(name)(*packed, attention_metadata(name, document_ids))
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
