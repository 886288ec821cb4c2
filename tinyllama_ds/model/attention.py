"""Causal attention: one signature, several backends chosen by name.

Shapes: B batch, T tokens, H query heads, K key/value heads, E head size.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.blocked_attention import blocked_attention

# q (B, T, H, E), k and v (B, T, K, E), and for a document mask what `attention_metadata` returns
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def eager_attention(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """The reference: scores and softmax written out, in fp32.

    q is (B, T, H, E); k and v are (B, T, K, E); the result is (B, T, H, E) in the dtype of q. With `document_ids` (B,
    T), the number of the document that each token belongs to, a token sees its own document only.
    """
    _, T, H, E = q.shape
    groups = H // k.shape[2]
    queries = q.transpose(1, 2).float()  # (B, H, T, E)
    keys = k.repeat_interleave(groups, dim=2).transpose(1, 2).float()  # (B, H, T, E)
    values = v.repeat_interleave(groups, dim=2).transpose(1, 2).float()  # (B, H, T, E)
    scores = queries @ keys.transpose(-2, -1) * E**-0.5  # (B, H, T, T)
    weights = scores.masked_fill(~_visible(T, document_ids, q.device), float("-inf")).softmax(dim=-1)
    return (weights @ values).transpose(1, 2).to(q.dtype)  # (B, T, H, E)


def _visible(length: int, document_ids: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query attends to: (T, T), or (B, 1, T, T) with document ids."""
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return (
        causal if document_ids is None else causal & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    )


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """PyTorch's own choice of kernel. As `eager_attention`."""
    mask = None if document_ids is None else _visible(q.shape[1], document_ids, q.device)
    shares_heads = q.shape[2] != k.shape[2]
    if shares_heads and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # The flash kernel takes neither a mask nor fp32, and not every torch has another kernel for shared heads:
        # without copies PyTorch would write out the scores, (B, H, T, T).
        k, v = (tensor.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for tensor in (k, v))
        shares_heads = False
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=shares_heads,
    )
    return out.transpose(1, 2)  # (B, T, H, E)


def _sdpa_with(kernel: SDPBackend) -> AttentionFunction:
    """PyTorch's attention with one of its kernels; an input that the kernel does not support is an error."""

    def attend(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None = None) -> Tensor:
        with sdpa_kernel(kernel):
            return sdpa_attention(q, k, v, document_ids)

    return attend


def _varlen() -> AttentionFunction:
    """PyTorch's flash kernel, which takes documents as cu_seqlens."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.10 has `is_causal`, 2.11 a window in its place, later ones need a flag for shared heads.
    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if "enable_gqa" in parameters:
        options["enable_gqa"] = True
    attend_documents = cast(Callable[..., Tensor], varlen_attn)
    attend_rows = _sdpa_with(SDPBackend.FLASH_ATTENTION)

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        if cu_seqlens is None:
            return attend_rows(q, k, v, None)
        T, shape = q.shape[1], q.shape
        q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))  # (B * T, heads, E)
        return attend_documents(q, k, v, cu_seqlens, cu_seqlens, T, T, **options).view(shape)

    return attend


def _flash_attention_2() -> AttentionFunction:
    """The flash-attn package; raises `MissingKernel` where it cannot be used."""
    name, remedy = "flash_attention_2", "install tinyllama_ds[flash] for this torch, or choose auto"
    dense, varlen = _package(name, "flash_attn", ("flash_attn_func", "flash_attn_varlen_func"), remedy)

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        options = {"causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
        if cu_seqlens is None:
            return dense(q, k, v, **options)
        T = q.shape[1]
        rows = (tensor.flatten(0, 1) for tensor in (q, k, v))  # (B * T, heads, E)
        lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": T, "max_seqlen_k": T}
        return varlen(*rows, **lengths, **options).view(q.shape)  # from (B * T, H, E)

    return attend


def _flash_implementation(name: str, version: str, module: str) -> AttentionFunction:
    """A later FlashAttention, activated for this process in place of PyTorch's, under `varlen`.

    Raises `MissingKernel` where torch or the package does not have it.
    """
    remedy = f"install {module} for this torch, or choose auto"
    _package(name, module, (), remedy)
    if version not in torch_attention.list_flash_attention_impls():
        raise MissingKernel(name, f"torch {torch.__version__} cannot activate {version}", "install torch 2.11 or later")
    if torch_attention.current_flash_attention_impl() != version:
        try:
            torch_attention.activate_flash_attention_impl(version)
        except Exception as error:  # torch looks for the package's operators
            raise MissingKernel(name, f"{module} cannot be used ({_summarize_exception(error)})", remedy) from error
    return _varlen()


class MissingKernel(ConfigError):
    """A backend whose package or feature is absent here, or does not work; `what` is the reason alone."""

    def __init__(self, name: str, what: str, remedy: str) -> None:
        super().__init__(f"attention backend {name!r}: {what}; {remedy}")
        self.what = what


def _package(name: str, module: str, functions: tuple[str, ...], remedy: str) -> list[Callable]:
    """Functions of an optional package; raises `MissingKernel` where it is absent or does not import."""
    try:
        imported = import_module(module)
        return [getattr(imported, function) for function in functions]
    except Exception as error:
        # A package built for a different torch raises ImportError, OSError, AttributeError, RuntimeError ...
        is_absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        what = (
            f"{module} is not installed" if is_absent else f"{module} does not import ({_summarize_exception(error)})"
        )
        raise MissingKernel(name, what, remedy) from error


def _summarize_exception(error: Exception) -> str:
    """The error on one line of limited length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def document_starts(document_ids: Tensor) -> Tensor:
    """Which tokens begin a document (B, T), given the documents' numbers (B, T); the first of a row always does."""
    is_start = torch.ones_like(document_ids, dtype=torch.bool)
    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return is_start


def attention_metadata(backend: str, document_ids: Tensor) -> Tensor:
    """The documents of `document_ids` (B, T) in the form that a backend takes, the same for all blocks.

    For flash kernels cu_seqlens (documents + 1,), int32: where documents start in the rows laid end to end, and the end
    of the last; for the others the ids themselves. The length of cu_seqlens depends on the data: on a GPU this
    synchronizes with the host, in host memory it does not.
    """
    if ATTENTION_BACKENDS[backend].documents != CU_SEQLENS:
        return document_ids
    first = document_starts(document_ids).flatten().nonzero().flatten()
    return torch.cat((first, first.new_tensor([document_ids.numel()]))).int()


DOCUMENT_IDS, CU_SEQLENS = "document_ids", "cu_seqlens"  # the form in which a backend takes document boundaries


@dataclass(frozen=True)
class Backend:
    """How to make an attention function, and where it can be used."""

    make: Callable[[], AttentionFunction]  # raises `MissingKernel`
    generations: range = range(100)  # of GPUs that have the kernel, by their major compute capability
    on_cpu: bool = True
    is_16_bit: bool = False  # on GPUs for bf16 and fp16 alone
    documents: str | None = DOCUMENT_IDS  # None: attends to whole rows alone
    is_deterministic: bool = True  # gradients are, once torch.use_deterministic_algorithms is on


_flash = partial(Backend, generations=range(8, 100), on_cpu=False, is_16_bit=True, documents=CU_SEQLENS)
ATTENTION_BACKENDS: dict[str, Backend] = {
    "flash_attention_4": _flash(
        lambda: _flash_implementation("flash_attention_4", "FA4", "flash_attn.cute.interface"),
        generations=range(9, 11),
    ),
    "flash_attention_3": _flash(
        lambda: _flash_implementation("flash_attention_3", "FA3", "flash_attn_interface"), generations=range(9, 10)
    ),
    "flash_attention_2": _flash(_flash_attention_2),
    "varlen": _flash(_varlen),
    "sdpa": Backend(lambda: sdpa_attention),
    "sdpa_flash": _flash(lambda: _sdpa_with(SDPBackend.FLASH_ATTENTION), on_cpu=True, documents=None),
    "sdpa_cudnn": _flash(
        lambda: _sdpa_with(SDPBackend.CUDNN_ATTENTION), documents=DOCUMENT_IDS, is_deterministic=False
    ),
    "blocked": Backend(lambda: blocked_attention),
    "eager": Backend(lambda: eager_attention),
}


def attention_function(name: str) -> AttentionFunction:
    """The backend behind a name; raises `MissingKernel` where its package is absent, and never falls back."""
    return ATTENTION_BACKENDS[name].make()


@dataclass(frozen=True)
class Device:
    """Where attention will run. Of a GPU that only the ranks can see, the compute capability is unknown: None."""

    type: str
    capability: tuple[int, int] | None = None

    @property
    def is_known(self) -> bool:
        return self.type == "cpu" or self.capability is not None


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """A GPU's compute capability; None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@dataclass(frozen=True)
class AttentionChoice:
    """A backend, and why `auto` did not choose a faster one: empty where it did, or for a backend by name."""

    backend: str
    reason: str = ""


@dataclass(frozen=True)
class Demands:
    """What a run needs: bf16 or fp16, a document mask, deterministic gradients."""

    sixteen_bit: bool
    document_mask: bool = False
    deterministic: bool = False


def resolve_attention_backend(name: str, device: Device, demands: Demands) -> AttentionChoice:
    """Turn 'auto' into the fastest backend that is present and meets the demands.

    On a CPU that is `blocked`. On a GPU it is FlashAttention 3 on a Hopper chip where the package is installed, then
    FlashAttention 2, then PyTorch's flash kernel: `varlen` with a document mask, else inside `sdpa`, which has others
    for fp32 and old GPUs. Where the device is not known the name is kept, for the ranks to resolve.

    Raises `ConfigError` for a name that is unknown, a package that is absent or does not import, and a backend that
    cannot meet the demands on the device.
    """
    if name != "auto" and name not in ATTENTION_BACKENDS:
        raise ConfigError(f"attention backend {name!r} is unknown; choose auto, {', '.join(ATTENTION_BACKENDS)}")
    if not device.is_known:
        return AttentionChoice(name)
    if name == "auto":
        return AttentionChoice("blocked") if device.type == "cpu" else _fastest_on_gpu(device, demands)
    obstacle = _obstacle(name, device, demands)
    if obstacle:
        raise ConfigError(f"attention backend {name!r} {obstacle}; choose auto or sdpa")
    attention_function(name)  # raises for an absent package
    return AttentionChoice(name)


def _fastest_on_gpu(device: Device, demands: Demands) -> AttentionChoice:
    names = ["flash_attention_2", *(["varlen"] if demands.document_mask else []), "sdpa"]  # fastest first
    if device.capability is not None and device.capability[0] == 9 and find_spec("flash_attn_interface"):
        names.insert(0, "flash_attention_3")  # which is optional: its absence is not a reason to report
    skipped: dict[str, str] = {}  # by reason, the first backend with it
    for name in names:
        reason = _unavailable_reason(name, device, demands)
        if reason is None:
            break
        skipped.setdefault(reason, name)
    notes = [f"{other}: {reason}" for reason, other in skipped.items()]
    if name == "sdpa" and demands.document_mask:
        notes.append("every block keeps a mask of tokens x tokens")
    return AttentionChoice(name, "; ".join(notes))


def _obstacle(name: str, device: Device, demands: Demands) -> str | None:
    """Why a backend cannot be used for a run, whatever is installed."""
    backend = ATTENTION_BACKENDS[name]
    if device.capability is None and not backend.on_cpu:
        return "needs a GPU"
    if device.capability is not None and device.capability[0] not in backend.generations:
        return f"has no kernel for a GPU of compute capability {'.'.join(map(str, device.capability))}"
    if device.capability is not None and backend.is_16_bit and not demands.sixteen_bit:
        return "computes in bf16 or fp16, and the training is in fp32"
    if demands.document_mask and backend.documents is None:
        return "does not support a mask, and the recipe has document_mask = true"
    if demands.deterministic and not backend.is_deterministic:
        return "has no deterministic gradients, which --deterministic asks for"
    return None


def _unavailable_reason(name: str, device: Device, demands: Demands) -> str | None:
    """The same, including whether its package works here."""
    obstacle = _obstacle(name, device, demands)
    if obstacle is not None:
        return obstacle
    try:
        attention_function(name)
    except MissingKernel as missing:
        return missing.what
    return None
