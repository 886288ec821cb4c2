"""Causal attention: one signature, several backends chosen by name.

Shapes: B batch, T tokens, H query heads, K key/value heads, E head size.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyllama_ds.errors import Refusal
from tinyllama_ds.model.blocked_attention import blocked_attention

# q (B, T, H, E), k and v (B, T, K, E), and where attention stays inside documents, what `documents_for` tells of them
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def eager_attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None = None) -> Tensor:
    """The reference: scores and softmax written out, in fp32.

    q is (B, T, H, E); k and v are (B, T, K, E); the result is (B, T, H, E) in the dtype of q. With `segments` (B, T),
    the number of the document that each token belongs to, a token sees its own document only.
    """
    _, T, H, E = q.shape
    groups = H // k.shape[2]
    queries = q.transpose(1, 2).float()  # (B, H, T, E)
    keys = k.repeat_interleave(groups, dim=2).transpose(1, 2).float()  # (B, H, T, E)
    values = v.repeat_interleave(groups, dim=2).transpose(1, 2).float()  # (B, H, T, E)
    scores = queries @ keys.transpose(-2, -1) * E**-0.5  # (B, H, T, T)
    weights = scores.masked_fill(~_visible(T, segments, q.device), float("-inf")).softmax(dim=-1)
    return (weights @ values).transpose(1, 2).to(q.dtype)  # (B, T, H, E)


def _visible(length: int, segments: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees: (T, T), or (B, 1, T, T) with segments."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return causal if segments is None else causal & (segments[:, None, :, None] == segments[:, None, None, :])


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None = None) -> Tensor:
    """PyTorch's own kernels (flash where it has one for the device and no segments). As `eager_attention`."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if segments is None else _visible(q.shape[1], segments, q.device),
        is_causal=segments is None,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)  # (B, T, H, E)


def _sdpa_with(kernel: SDPBackend) -> AttentionFunction:
    """PyTorch's attention held to one of its kernels; an input that the kernel cannot take is an error."""

    def attend(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None = None) -> Tensor:
        with sdpa_kernel(kernel):
            return sdpa_attention(q, k, v, segments)

    return attend


def _flash_attention(version: int, module: str, remedy: str) -> AttentionFunction:
    """A release of FlashAttention; raises `Refusal` where its module is absent."""
    if find_spec(module) is None:
        raise Refusal(
            f"attention backend 'flash_attention_{version}' needs the module {module}, which is not installed; {remedy}"
        )
    kernels = import_module(module)

    def attend(q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None = None) -> Tensor:
        if borders is None:
            return _output(kernels.flash_attn_func(q, k, v, causal=True))
        B, T = q.shape[:2]
        rows = (tensor.flatten(0, 1) for tensor in (q, k, v))  # (B * T, heads, E)
        lengths = {"cu_seqlens_q": borders, "cu_seqlens_k": borders, "max_seqlen_q": T, "max_seqlen_k": T}
        out = _output(kernels.flash_attn_varlen_func(*rows, **lengths, causal=True))  # (B * T, H, E)
        return out.view(B, T, *q.shape[2:])

    return attend


def _output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The early releases of FlashAttention 3 return the softmax's logarithmic sums too (Dao-AILab's pull 1851)."""
    return result[0] if isinstance(result, tuple) else result


def document_starts(segments: Tensor) -> Tensor:
    """Which tokens begin a document (B, T), given the documents' numbers (B, T); the first of a row always does."""
    is_start = torch.ones_like(segments, dtype=torch.bool)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return is_start


def documents_for(backend: str, segments: Tensor) -> Tensor:
    """What a backend wants to know of the documents whose numbers are `segments` (B, T), the same for all blocks.

    For FlashAttention the borders, (documents + 1,); for the others the numbers themselves. How many borders there are
    depends on the data: on a GPU this waits for it, in host memory for nothing.
    """
    return _document_borders(segments) if backend in VARIABLE_LENGTH else segments


def _document_borders(segments: Tensor) -> Tensor:
    """Where documents start in the rows laid end to end, and the end of the last: int32, as flash-attn wants them."""
    first = document_starts(segments).flatten().nonzero().flatten()
    return torch.cat((first, first.new_tensor([segments.numel()]))).int()


ATTENTION_BACKENDS: dict[str, Callable[[], AttentionFunction]] = {
    "flash_attention_3": lambda: _flash_attention(
        3, "flash_attn_interface", "install FlashAttention 3, or choose 'flash_attention_2' or 'sdpa'"
    ),
    "flash_attention_2": lambda: _flash_attention(2, "flash_attn", "install tinyllama_ds[flash] or choose 'sdpa'"),
    "sdpa": lambda: sdpa_attention,
    "sdpa_flash": lambda: _sdpa_with(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": lambda: _sdpa_with(SDPBackend.CUDNN_ATTENTION),
    "blocked": lambda: blocked_attention,
    "eager": lambda: eager_attention,
}
VARIABLE_LENGTH = frozenset({"flash_attention_3", "flash_attention_2"})  # take documents by their borders
GPU_ONLY = frozenset({"flash_attention_3", "flash_attention_2", "sdpa_cudnn"})
SIXTEEN_BIT = GPU_ONLY | {"sdpa_flash"}  # kernels that a GPU has for bf16 and fp16 alone


def resolve_attention_backend(
    name: str, device_type: str, sixteen_bit: bool, capability: tuple[int, int] | None = None
) -> str:
    """Turn 'auto' into the fastest backend that is present, for training in bf16 or fp16, or in fp32.

    On a CPU that is `blocked`. On a GPU it is FlashAttention 3 on a Hopper chip where the package is installed, then
    FlashAttention 2, then PyTorch's own choice; in fp32 only the last. `capability` is the GPU's where it is in another
    machine; this machine's is asked otherwise. Raises `Refusal` for a name that is unknown, a
    package that is absent, and a kernel that the device does not have for the precision.
    """
    if name == "auto":
        return "blocked" if device_type == "cpu" else _fastest_on_gpu(sixteen_bit, capability)
    if name not in ATTENTION_BACKENDS:
        raise Refusal(f"attention backend {name!r} is unknown; choose auto, {', '.join(ATTENTION_BACKENDS)}")
    attention_function(name)  # an absent package is refused now
    if name in GPU_ONLY and device_type == "cpu":
        raise Refusal(f"attention backend {name!r} needs a GPU; choose auto, blocked or sdpa")
    if name in SIXTEEN_BIT and device_type == "cuda" and not sixteen_bit:
        raise Refusal(f"attention backend {name!r} computes in bf16 or fp16, and the training is in fp32; choose sdpa")
    return name


def _fastest_on_gpu(sixteen_bit: bool, capability: tuple[int, int] | None) -> str:
    chip = capability or torch.cuda.get_device_capability()
    if sixteen_bit and chip == (9, 0) and find_spec("flash_attn_interface"):
        return "flash_attention_3"
    return "flash_attention_2" if sixteen_bit and chip >= (8, 0) and find_spec("flash_attn") else "sdpa"


def attention_function(name: str) -> AttentionFunction:
    """The backend behind a name; raises `Refusal` where its package is absent, and never falls back in silence."""
    return ATTENTION_BACKENDS[name]()
