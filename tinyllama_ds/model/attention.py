"""Causal attention: one signature, several backends chosen by name.

Shapes: B batch, T tokens, H query heads, K key/value heads, E head size.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyllama_ds.errors import Refusal
from tinyllama_ds.model.blocked_attention import BlockedAttention

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference: scores and softmax written out, in fp32.

    q is (B, T, H, E); k and v are (B, T, K, E); the result is (B, T, H, E) in the dtype of q.
    """
    _, T, H, E = q.shape
    groups = H // k.shape[2]
    queries = q.transpose(1, 2).float()  # (B, H, T, E)
    keys = k.repeat_interleave(groups, dim=2).transpose(1, 2).float()  # (B, H, T, E)
    values = v.repeat_interleave(groups, dim=2).transpose(1, 2).float()  # (B, H, T, E)
    scores = queries @ keys.transpose(-2, -1) * E**-0.5  # (B, H, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
    return (weights @ values).transpose(1, 2).to(q.dtype)  # (B, T, H, E)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own kernels (flash where it has one for the device). Shapes as in `eager_attention`."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out.transpose(1, 2)  # (B, T, H, E)


def _flash_attn_function() -> AttentionFunction:
    if find_spec("flash_attn") is None:
        raise Refusal(
            "attention backend 'flash_attention_2' needs the flash-attn package, which is not installed;"
            " install tinyllama_ds[flash] or choose 'sdpa'"
        )
    from flash_attn import flash_attn_func

    return partial(flash_attn_func, causal=True)


ATTENTION_BACKENDS: dict[str, Callable[[], AttentionFunction]] = {
    "flash_attention_2": _flash_attn_function,
    "sdpa": lambda: sdpa_attention,
    "blocked": lambda: BlockedAttention.apply,
    "eager": lambda: eager_attention,
}


def resolve_attention_backend(name: str, device_type: str) -> str:
    """Turn 'auto' into the fastest backend: blocked on a CPU; on a GPU flash-attn if installed, else PyTorch's."""
    if name == "auto":
        if device_type == "cpu":
            return "blocked"
        return "flash_attention_2" if find_spec("flash_attn") else "sdpa"
    if name not in ATTENTION_BACKENDS:
        raise Refusal(f"attention backend {name!r} is unknown; choose auto, {', '.join(ATTENTION_BACKENDS)}")
    return name


def attention_function(name: str) -> AttentionFunction:
    """The backend behind a name; raises `Refusal` where its package is absent, and never falls back in silence."""
    return ATTENTION_BACKENDS[name]()
