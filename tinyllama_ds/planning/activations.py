"""Memory of activations by row: what a micro-batch of our model keeps and makes. Formulas: docs/planning.md."""

from dataclasses import dataclass
from math import ceil, lcm

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hardware.gpus import GIB
from tinyllama_ds.model.config import MAX_CHUNK_LOGITS, MLP_CHUNK_TOKENS, LlamaConfig
from tinyllama_ds.planning.layout import Layout

BACKENDS = (
    *("auto", "flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen"),
    *("sdpa", "sdpa_flash", "sdpa_cudnn", "blocked", "eager"),
)
HOST = "host"  # the phase of what is in the memory of the host
_QUERY_BLOCK = 64  # tokens, of the backend `blocked`
_FP32_COPIES = 5  # of their input, in the backward pass of a norm or a rotation that is not compiled


@dataclass(frozen=True)
class Work:
    """The computation of one GPU in one micro-batch."""

    micro_batch: int
    sequence_length: int
    attention: str = "flash"  # kind of its saved tensors, from `attention_memory`
    recompute_every: int = 0
    is_compiled: bool = False
    chunk_logits: int = MAX_CHUNK_LOGITS["cuda"]  # fp32 logits alive at once
    sequence_parallel: int = 1  # GPUs that share each sequence
    offloads_activations: bool = False  # the inputs of recomputed blocks
    document_mask: bool = False

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence_length // self.sequence_parallel

    @property
    def mlp_chunk(self) -> int:
        """Tokens of a recomputed block whose MLP is computed at once; 0: all of them, or no block is recomputed."""
        if not self.recompute_every or self.sequence_length // self.sequence_parallel <= 2 * MLP_CHUNK_TOKENS:
            return 0
        return ceil(self.tokens / ceil(self.tokens / MLP_CHUNK_TOKENS))

    def recomputed_blocks(self, model: LlamaConfig) -> int:
        """Every k-th block, from the first on."""
        return ceil(model.num_hidden_layers / self.recompute_every) if self.recompute_every else 0

    def key_heads(self, model: LlamaConfig) -> int:
        """Those of all GPUs that share a sequence: as often as makes them divide."""
        return lcm(model.num_key_value_heads, self.sequence_parallel)


@dataclass(frozen=True)
class MemoryRow:
    """One use of memory, held in a `phase`: always; in the micro-batches, or there in the loss or in the backward pass
    of a block only; in the optimizer step; or in the memory of the host.
    """

    name: str
    bytes: int
    phase: str
    how: str


def attention_memory(backend: str, document_mask: bool, weight_bytes: int) -> str:
    """Kind of the tensors that a backend saves, on a GPU since Ampere: flash, repeated, masked, blocked or eager.

    Raises `ConfigError` for a backend that is unknown.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"--attention {backend!r} is unknown; expected {', '.join(BACKENDS)}")
    if backend in ("blocked", "eager"):
        return backend
    if document_mask and (backend in ("sdpa", "sdpa_cudnn") or weight_bytes == 4):
        return "masked"
    return "flash" if weight_bytes == 2 else "repeated"


def block_bytes_per_token(model: LlamaConfig, layout: Layout, work: Work) -> int:
    """Bytes of the tensors that autograd saves in one decoder block, per token."""
    return sum(_kept_per_token(model, layout, work))


def _kept_per_token(model: LlamaConfig, layout: Layout, work: Work) -> tuple[int, int, int]:
    """The same of its norms, its attention, and its MLP beyond the normed input, which is the norm's."""
    w, D, F = layout.weight_bytes, model.hidden_size, model.intermediate_size
    if work.is_compiled:  # inputs of the matrix products; the rest is recomputed
        norms, mlp = w * 4 * D + 8, w * 3 * F
    else:  # fp32 input, normed, times weight
        norms, mlp = 2 * ((4 + w + (w if w == 2 else 0)) * D + 4), w * 4 * F
    return norms, _attention_per_token(model, layout, work), 0 if work.mlp_chunk else mlp


def _attention_per_token(model: LlamaConfig, layout: Layout, work: Work) -> int:
    w, query, key = layout.weight_bytes, _query_width(model), _key_width(model, work)
    H, T = model.num_attention_heads, work.sequence_length
    kept = w * (2 * query + 2 * key) + 4 * H  # q, k, v, output, fp32 log-sum-exp
    if work.attention == "blocked":
        kept += w * query - 4 * H + w * H * (T + _QUERY_BLOCK) // 2  # the probabilities of visible blocks
    elif work.attention == "eager":
        kept = w * query + 12 * query + 4 * H * T  # fp32 q, k, v and scores
    elif work.attention in ("repeated", "masked"):
        kept += w * 2 * (query - key)  # keys and values of every query head
        kept += w * T * work.sequence_parallel if work.attention == "masked" else 0  # a whole mask on each GPU
    if work.sequence_parallel > 1:
        kept += w * query  # the output before it is exchanged, and after
    return kept


def _query_width(model: LlamaConfig) -> int:
    return model.head_dim * model.num_attention_heads


def _key_width(model: LlamaConfig, work: Work) -> int:
    return model.head_dim * work.key_heads(model)


def activation_rows(model: LlamaConfig, layout: Layout, work: Work) -> list[MemoryRow]:
    """Every row of the activations of one rank."""
    block, L, tokens = block_bytes_per_token(model, layout, work), model.num_hidden_layers, work.tokens
    recomputed = work.recomputed_blocks(model)
    kept, final = (L - recomputed) * block, (4 + 3 * layout.weight_bytes) * model.hidden_size
    how = f"{block:,} B x {L - recomputed} blocks x {tokens:,} tokens"
    rows = [
        *_block_inputs(model, layout, work, recomputed),
        MemoryRow("activations", tokens * kept, "micro-batch", how),
        _rope_tables(model, work),
        MemoryRow("final norm", tokens * final, "loss", "its input in fp32, normed, times weight, and the stream"),
        _loss(model, layout, work),
    ]
    if recomputed:
        how = f"{block:,} B x {tokens:,} tokens"
        rows.append(MemoryRow("recomputed block", tokens * block, "backward", how))
    return [*rows, _gradients_in_block(model, layout, work)]


def _block_inputs(model: LlamaConfig, layout: Layout, work: Work, recomputed: int) -> list[MemoryRow]:
    one = layout.weight_bytes * model.hidden_size * work.tokens
    if not work.offloads_activations:
        how = f"inputs of {recomputed} blocks that are recomputed"
        return [MemoryRow("block inputs", one * recomputed, "micro-batch", how)]
    pinned = recomputed * (1 << (one - 1).bit_length())
    return [
        MemoryRow("block inputs", one * min(2, recomputed), "micro-batch", "two at a time, the others are offloaded"),
        MemoryRow("block inputs, offloaded", pinned, HOST, f"{recomputed} buffers, each a power of two (pinned)"),
    ]


def _rope_tables(model: LlamaConfig, work: Work) -> MemoryRow:
    """Once for all blocks: of the positions of this rank, or with documents of each of its tokens."""
    positions = work.tokens if work.document_mask else work.sequence_length // work.sequence_parallel
    return MemoryRow(
        "RoPE tables", 8 * model.head_dim * positions, "micro-batch", f"fp32 cosine and sine, {positions:,} positions"
    )


def _loss(model: LlamaConfig, layout: Layout, work: Work) -> MemoryRow:
    w, table = layout.weight_bytes, model.vocab_size * model.hidden_size
    chunk = min(work.chunk_logits, work.tokens * model.vocab_size)
    size = chunk * (4 + 2 * w) + table * (4 + w) + w * work.tokens * model.hidden_size
    return MemoryRow("logits and loss", size, "loss", f"{chunk:,} logits at once, and the head's gradient")


def _gradients_in_block(model: LlamaConfig, layout: Layout, work: Work) -> MemoryRow:
    """What the backward pass of a block takes at its peak, beyond all that the block has kept."""
    w, D, tokens = layout.weight_bytes, model.hidden_size, work.tokens
    norms, attention, mlp = _kept_per_token(model, layout, work)
    exchange = w * (_query_width(model) + 2 * _key_width(model, work)) if work.sequence_parallel > 1 else 0
    peaks = {"MLP": tokens * (norms + attention + mlp + w * D) + _mlp_gradients(model, layout, work)}
    of_attention = norms // 2 + attention + w * D + 2 * exchange + _attention_gradients(model, layout, work)
    peaks["attention"] = tokens * of_attention
    if not work.is_compiled:
        freed = 2 * w * D if w == 2 else w * D  # the norm's outputs
        peaks["norm"] = tokens * (norms - freed + attention + w * D + _FP32_COPIES * 4 * D)
    size = max(peaks.values()) - tokens * (norms + attention + mlp)
    chunk = f" in chunks of {work.mlp_chunk:,} tokens" if work.mlp_chunk else ""
    of_each = ", ".join(f"{name}{chunk if name == 'MLP' else ''} {peak / GIB:.2f}" for name, peak in peaks.items())
    return MemoryRow("gradients in a block", size, "backward", f"GiB with what a block keeps: {of_each}")


def _mlp_gradients(model: LlamaConfig, layout: Layout, work: Work) -> int:
    w, D, F, C = layout.weight_bytes, model.hidden_size, model.intermediate_size, work.mlp_chunk
    if not C:
        return work.tokens * w * F * (1 if work.is_compiled else 2)
    of_rows = C * w * ((6 if work.is_compiled else 7) * F + 2 * D)
    return work.tokens * w * D + of_rows + D * F * (3 * 4 + 6 * w)  # by x, and by the weights in fp32 and of two chunks


def _attention_gradients(model: LlamaConfig, layout: Layout, work: Work) -> int:
    """Per token. Flash kernels sum gradients of queries in fp32, and have those of keys once for each query head."""
    w, query, key = layout.weight_bytes, _query_width(model), _key_width(model, work)
    size = w * (2 * query + 2 * key)  # by the output, queries, keys and values
    if work.attention == "blocked":
        return (
            size + w * key * work.sequence_length // _QUERY_BLOCK
        )  # of each block of queries by the keys that it sees
    if work.attention == "eager":
        return size + 8 * model.num_attention_heads * work.sequence_length
    return size + 4 * query + 2 * w * query
