"""The decoder, read top to bottom: RMSNorm, grouped-query attention, SwiGLU, block, model.

Shapes: B batch, T tokens, D hidden size, H query heads, K key/value heads, E head size, V vocabulary.
Parameters carry the names of Hugging Face's LlamaForCausalLM, so that exporting is a copy.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from tinyllama_ds.model.attention import attention_function, attention_metadata
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.loss import LMHeadLoss
from tinyllama_ds.model.mlp import SwiGLU
from tinyllama_ds.model.offloading import ActivationOffloading
from tinyllama_ds.model.param_groups import is_hidden_matrix
from tinyllama_ds.model.rope import apply_rope, positions_in_documents, rope_tables
from tinyllama_ds.model.sequence_parallel import SequenceParallel


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the rms and the division in fp32 (Zhang and Sennrich 2019, rounded as Llama does)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention whose H query heads share K key/value heads."""

    def __init__(self, config: LlamaConfig, backend: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=False)
        self.attend = attention_function(backend)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None) -> Tensor:  # (B, T, D) -> same
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, E)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, E)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, E)
        out = self.attend(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, documents)  # (B, T, H, E)
        return self.o_proj(out.reshape(B, T, -1))


class Block(nn.Module):
    """One pre-norm decoder layer. Also the unit that ZeRO-3 gathers, that is compiled, and that may be recomputed."""

    def __init__(self, config: LlamaConfig, backend: str, is_recomputed: bool) -> None:
        super().__init__()
        self.is_recomputed = is_recomputed
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, backend)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config, is_chunked=is_recomputed)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None) -> Tensor:  # (B, T, D) -> same
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, documents)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    """Embedding, blocks and the final norm: token ids to hidden states."""

    def __init__(self, config: LlamaConfig, backend: str, recompute_every: int) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.sequence_parallel = SequenceParallel()  # until sequences are split
        self.offloading: ActivationOffloading | None = None  # of the inputs of recomputed blocks
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, backend, is_recomputed=recompute_every > 0 and number % recompute_every == 0)
            for number in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:  # (B, T) -> (B, T, D)
        device, documents = input_ids.device, None
        length, own = self.sequence_parallel.place_of(input_ids.shape[1])
        cos, sin = rope_tables(self.config, length, device)
        if document_ids is None:
            cos, sin = cos[own].clone(), sin[own].clone()  # (T, E), and not of the whole sequence
        else:
            positions = positions_in_documents(document_ids.to(device, non_blocking=True))[:, own]
            cos, sin = cos[positions], sin[positions]  # (B, T, E)
            documents = attention_metadata(self.backend, document_ids).to(device, non_blocking=True)
        x = self.embed_tokens(input_ids)
        if self.offloading is not None:
            self.offloading.begin(device)
        for layer in self.layers:
            if layer.is_recomputed and torch.is_grad_enabled():
                with self.offloading.of(x) if self.offloading is not None else nullcontext():
                    x = checkpoint(layer, x, cos, sin, documents, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, documents)
        x = self.norm(x)
        return x if self.config.mup is None else x / self.config.width_multiplier  # of the logits


class LlamaForCausalLM(nn.Module):
    """The whole decoder: token ids (B, T) to logits (B, T, V), or with labels (B, T) to their mean loss in fp32; with
    the reduction "none" to the loss of each label, without a gradient.

    With `document_ids` (B, T), the number of the document that each token of a row belongs to, attention stays inside
    documents and positions start again with each; without, documents packed into a row see those before them, as in
    TinyLlama. They are best kept in host memory: cu_seqlens are computed there without a synchronization with the GPU.

    With the ids and log-probabilities of a `teacher`, the loss is that of its student (`loss.py`).

    After `split_sequences` the T tokens are this rank's part of longer sequences, and `document_ids` those of the whole
    sequences.

    With `recompute_every` k, every k-th block keeps only its input and is computed again in the backward pass
    (activation checkpointing; 0 is none, 1 is all). After `offload_activations` these inputs are in host memory.
    """

    def __init__(self, config: LlamaConfig, attention: str = "sdpa", recompute_every: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaModel(config, attention, recompute_every)
        self.lm_head = LMHeadLoss(config.hidden_size, config.vocab_size)
        self.is_compiled = False  # set by the code that compiles its blocks
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the embedding table the LM head's parameter where the config ties them; after either was replaced.

        Both modules own the one parameter, so that ZeRO-3 gathers it for each of them.
        """
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight  # type: ignore[assignment]  # torch says Tensor

    def split_sequences(self, group: ProcessGroup) -> None:
        """From now on the ranks of a group share every sequence (`sequence_parallel.py`)."""
        self.model.sequence_parallel = SequenceParallel(group)
        for module in self.modules():
            if isinstance(module, Attention):
                module.attend = self.model.sequence_parallel.around(module.attend)

    def offload_activations(self) -> None:
        """From now on the inputs of recomputed blocks wait in host memory for the backward pass (`offloading.py`)."""
        self.model.offloading = ActivationOffloading()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        teacher: tuple[Tensor, Tensor] | None = None,
        reduction: str = "mean",
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self.lm_head(self.model(input_ids, document_ids), labels, teacher, reduction)


def initialize_weights(model: LlamaForCausalLM, seed: int) -> None:
    """Fill every parameter as TinyLlama does (lit_gpt/model.py of its repository), the same for every world size.

    | parameter                  | distribution                                        |
    | norms                      | 1                                                   |
    | attention output, MLP down | normal, std 1 / (sqrt(D) * layers)                  |
    | every other hidden matrix  | normal, std sqrt(2 / 5 / D)                         |
    | embeddings, LM head        | normal, std sqrt(2 / 5 / D), of muP with its base D |
    """
    D, layers = model.config.hidden_size, model.config.num_hidden_layers
    base = D / model.config.width_multiplier
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
            width = D if is_hidden_matrix(name, parameter) else base
            std = 1 / math.sqrt(D) / layers if is_output else math.sqrt(2 / 5 / width)
            # Drawn in fp32 in host memory, one at a time: the same bits on every device, rounded once to the dtype.
            parameter.copy_(torch.empty(parameter.shape, device="cpu").normal_(std=std, generator=generator))


def fold_multipliers(
    config: LlamaConfig, tensors: Iterable[tuple[str, Tensor]]
) -> tuple[LlamaConfig, Iterator[tuple[str, Tensor]]]:
    """A muP model as the Llama that computes the same: its multipliers are in the final norm and the queries' weights.

    Every weight is rounded once more, to its own dtype; powers of two need no rounding.
    """
    queries, logits = config.attention_multiplier, 1 / config.width_multiplier

    def folded() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            factor = queries if name.endswith("q_proj.weight") else logits if name == "model.norm.weight" else 1.0
            yield name, tensor if factor == 1 else (tensor.float() * factor).to(tensor.dtype)

    return replace(config, mup=None), folded()


def assign_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Let a decoder, ours or transformers', use these tensors as its parameters, without copies; a tied one comes once.

    Raises RuntimeError where names or shapes are not the model's.
    """
    if model.config.tie_word_embeddings:
        weights = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()


def empty_model(
    config: LlamaConfig,
    attention: str,
    recompute_every: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A decoder with uninitialized parameters; nothing else is allocated."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config, attention, recompute_every)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    return model


def build_model(
    config: LlamaConfig,
    attention: str,
    seed: int,
    recompute_every: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """An initialized decoder, filled in place: host memory holds one fp32 parameter of it at a time."""
    model = empty_model(config, attention, recompute_every, device, dtype)
    initialize_weights(model, seed)
    return model
