"""RoPE: the angles by which queries and keys are rotated, as Hugging Face's Llama has them.

Shapes: B batch, T tokens, E head size.
"""

import math

import torch
from torch import Tensor

from tinyllama_ds.model.attention import document_starts
from tinyllama_ds.model.config import Llama3Scaling, LlamaConfig, YarnScaling


def rope_tables(config: LlamaConfig, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotation angles, each (T, E) in fp32 (Su et al. 2021).

    Dimension i of the first half is paired with dimension i of the second half: Hugging Face's half-rotation. muP's
    multiplier of attention logits is in both, a root for queries and one for keys, so that no kernel has to know it.
    """
    frequencies, scale = rope_frequencies(config, device)
    scale *= math.sqrt(config.attention_multiplier)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32, device=device), frequencies)  # (T, E/2)
    angles = torch.cat((angles, angles), dim=-1)  # (T, E)
    return angles.cos() * scale, angles.sin() * scale


def rope_frequencies(config: LlamaConfig, device: torch.device) -> tuple[Tensor, float]:
    """Radians per position of each pair of dimensions (E/2,), and what cosine and sine are multiplied by.

    In the operations of transformers' modeling_rope_utils.py, as an angle is a frequency times thousands of positions.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    wavelengths = config.rope_theta**exponents  # over 2 pi
    match config.rope_scaling:
        case Llama3Scaling() as scaling:
            return _llama3(1.0 / wavelengths, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(wavelengths, config, scaling), _yarn_attention_factor(scaling)
    return 1.0 / wavelengths / config.rope_scaling_factor, 1.0


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    rotations = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    blend = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(wavelengths: Tensor, config: LlamaConfig, scaling: YarnScaling) -> Tensor:
    def dimension(rotations: float) -> float:
        """Which pair of dimensions rotates that often over the original positions."""
        positions = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return config.head_dim * math.log(positions) / (2 * math.log(config.rope_theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.head_dim - 1)
    number = torch.arange(len(wavelengths), dtype=torch.float32, device=wavelengths.device)
    stretched = ((number - first) / (last - first or 0.001)).clamp(0, 1)
    stays = 1 - stretched
    return 1.0 / (scaling.factor * wavelengths) * (1 - stays) + 1.0 / wavelengths * stays


def _yarn_attention_factor(scaling: YarnScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """How far each token is from the start of its document (B, T), given the documents' numbers (B, T)."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return index - index.where(document_starts(document_ids), 0).cummax(dim=1).values


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of x (B, T, H, E) by its position's angle, in fp32; tables are (T, E) or (B, T, E)."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (wide * cos[..., None, :] + rotated * sin[..., None, :]).to(x.dtype)
