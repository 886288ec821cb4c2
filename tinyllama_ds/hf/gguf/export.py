"""Our weights to a GGUF file, verified before it appears."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tinyllama_ds.bars import progress
from tinyllama_ds.data.chat import chat_template
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.gguf.comparison import Comparison, SampleText, compare
from tinyllama_ds.hf.gguf.tensors import BLOCK, gguf_names, gguf_types, stored_bytes, to_gguf
from tinyllama_ds.hf.gguf.vocabulary import gguf_vocabulary
from tinyllama_ds.hf.weights import parameter_shapes
from tinyllama_ds.model.config import Llama3Scaling, LlamaConfig, YarnScaling
from tinyllama_ds.model.rope import rope_frequencies
from tinyllama_ds.outputs import new_file

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ROPE_FACTORS = "rope_freqs.weight"
_TRAINED_BETAS = (32.0, 1.0)  # of YaRN: llama.cpp's for this architecture, whatever the file has


@dataclass(frozen=True)
class GgufModel:
    """What a file is made of."""

    name: str
    config: LlamaConfig
    weights: Mapping[str, Tensor]
    tokenizer: Tokenizer
    is_chat_model: bool = False


@dataclass(frozen=True)
class GgufResult:
    """The result of an export."""

    size: int  # of the file in bytes
    kept: int  # tensors in f16 because their rows are not a multiple of `BLOCK`
    comparison: Comparison


def require_gguf() -> None:
    """Raises `ConfigError` where the package is missing."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--gguf needs the gguf package ({error}); pip install 'tinyllama_ds[gguf]'") from error


def export_gguf(model: GgufModel, quantization: str, output: Path, text: SampleText) -> GgufResult:
    """Write a GGUF file of one of `QUANTIZATIONS`, tensor by tensor, and compare it with the model on a text.

    Raises `ConfigError`, leaving nothing behind, for a tokenizer or a rotation that llama.cpp does not have, and unless
    every tensor that is read back from the file is the model's to the precision of its type.
    """
    require_gguf()
    _reject_unknown_rotation(model.config)
    model.tokenizer.reject_inconvertible()
    with new_file(output) as partial:
        kept = _write(model, quantization, partial)
        comparison = compare(partial, model.weights, model.config, text)
        size = partial.stat().st_size
    return GgufResult(size, kept, comparison)


def _write(model: GgufModel, quantization: str, path: Path) -> int:
    """Write the file; returns the number of tensors that are not quantised although they would be."""
    from gguf import GGMLQuantizationType, GGUFWriter

    config, shapes = model.config, parameter_shapes(model.config)
    names, types = gguf_names(shapes, config), gguf_types(shapes, quantization, config)
    writer = GGUFWriter(path, "llama")
    try:
        _add_description(writer, model, quantization)
        _add_vocabulary(writer, model)
        factors = _rope_factors(config)
        if factors is not None:
            writer.add_tensor_info(_ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for name, shape in shapes.items():
            size = stored_bytes(shape, types[name])
            writer.add_tensor_info(names[name], shape, np.dtype(np.float32), size, types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for name in progress(shapes, desc=f"writing {quantization}", unit="tensor", leave=False):
            writer.write_tensor_data(to_gguf(name, model.weights[name], types[name], config))
    finally:
        writer.close()
    is_odd = [shape[-1] % BLOCK > 0 and types[name] is GGMLQuantizationType.F16 for name, shape in shapes.items()]
    return 0 if quantization == "f16" else sum(is_odd)


def _add_description(writer: "GGUFWriter", model: GgufModel, quantization: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType, size_label

    config = model.config
    writer.add_type("model")
    writer.add_name(model.name)
    writer.add_size_label(size_label(config.num_parameters, config.num_parameters, 0, 0))
    writer.add_file_type(LlamaFileType[f"MOSTLY_{quantization.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rotation(writer, config)


def _add_rotation(writer: "GGUFWriter", config: LlamaConfig) -> None:
    from gguf import RopeScalingType

    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling_factor > 1:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling_factor)
    if isinstance(scaling := config.rope_scaling, YarnScaling):
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        _, attention_factor = rope_frequencies(config, torch.device("cpu"))
        # llama.cpp multiplies by YaRN's own factor in any case, and by this one.
        writer.add_rope_scaling_attn_factors(attention_factor / (1 + 0.1 * log(scaling.factor)))


def _rope_factors(config: LlamaConfig) -> np.ndarray | None:
    """What Llama 3's scaling divides the frequency of each pair of dimensions by (E/2,): a tensor of the file."""
    if not isinstance(config.rope_scaling, Llama3Scaling):
        return None
    scaled, _ = rope_frequencies(config, torch.device("cpu"))
    plain, _ = rope_frequencies(replace(config, rope_scaling=None), torch.device("cpu"))
    return (plain / scaled).numpy()


def _reject_unknown_rotation(config: LlamaConfig) -> None:
    scaling = config.rope_scaling
    if isinstance(scaling, YarnScaling) and (
        (scaling.beta_fast, scaling.beta_slow) != _TRAINED_BETAS or not scaling.truncate
    ):
        raise ConfigError(
            "rope_scaling: llama.cpp has YaRN for this architecture with beta_fast 32, beta_slow 1 and truncate true"
            f" only; the model has {scaling.beta_fast:g}, {scaling.beta_slow:g} and {str(scaling.truncate).lower()},"
            " so export a Hugging Face folder"
        )


def _add_vocabulary(writer: "GGUFWriter", model: GgufModel) -> None:
    tokenizer = model.tokenizer
    vocabulary = gguf_vocabulary(tokenizer, model.config.vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(True)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for number, add in (
        (tokenizer.bos_id, writer.add_bos_token_id),
        (tokenizer.eos_id, writer.add_eos_token_id),
        (tokenizer.unk_id, writer.add_unk_token_id),
        (tokenizer.pad_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(False)  # as in training
    writer.add_add_eos_token(False)
    if model.is_chat_model:
        writer.add_chat_template(_plain_template(tokenizer))


def _plain_template(tokenizer: Tokenizer) -> str:
    """The chat template without transformers' own tags, which select the loss mask."""
    template = chat_template(tokenizer)
    for tag in ("generation", "endgeneration"):
        template = template.replace(f"{{% {tag} %}}", "")
    return template
