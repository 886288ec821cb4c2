"""Shapes of the decoder, and the table of named sizes."""

from dataclasses import asdict, dataclass
from math import sqrt
from typing import Annotated, Literal

from pydantic import Field

from tinyllama_ds.errors import ConfigError, shown

_LARGEST = 2**31 - 1
_UNUSED = {"rope_scaling_factor": 1.0, "tie_word_embeddings": False, "rope_scaling": None, "mup": None}
_MOST_LAYERS = 1000  # building each takes time
# fp32 logits alive at once: 2,048 rows of Llama's vocabulary keep a GPU busy. On a CPU every chunk adds a gradient of
# the whole weight, which is slow for small chunks, and large ones do not fit the cache (docs/performance.md).
MAX_CHUNK_LOGITS = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}


_EXACT = {"extra": "forbid"}  # for pydantic, where a description of a model is read


def _reject_out_of_range(values: dict) -> None:
    numbers = {key: value for key, value in values.items() if type(value) in (int, float)}
    for key, value in numbers.items():
        most = _MOST_LAYERS if key == "num_hidden_layers" else _LARGEST
        if not 0 < value <= most:
            raise ConfigError(f"{key} {shown(value)} is not above 0 and up to {most:,}")
        if key in ("factor", "rope_scaling_factor") and value < 1:
            raise ConfigError(f"{key} {value:.12g} must be 1 or more")


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's rotation beyond the positions of pretraining: long waves are stretched, short ones are not."""

    __pydantic_config__ = _EXACT
    factor: float
    low_freq_factor: float  # waves longer than the original positions divided by it are stretched by `factor`
    high_freq_factor: float  # waves shorter than the original positions divided by it stay; between, a blend
    original_max_position_embeddings: int
    rope_type: Literal["llama3"] = "llama3"

    def __post_init__(self) -> None:
        _reject_out_of_range(vars(self))
        if self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError(
                f"low_freq_factor {self.low_freq_factor} must be below high_freq_factor {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): a blend of stretched and original waves by dimension, and sharper attention."""

    __pydantic_config__ = _EXACT
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None  # that queries and keys are multiplied by; None: from the factor
    beta_fast: float = 32.0  # rotations over the original positions above which a dimension stays
    beta_slow: float = 1.0  # and below which it is stretched by `factor`
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # the blend begins and ends at whole dimensions
    rope_type: Literal["yarn"] = "yarn"

    def __post_init__(self) -> None:
        _reject_out_of_range(vars(self))


RopeScaling = Llama3Scaling | YarnScaling


@dataclass(frozen=True)
class Mup:
    """The maximal update parametrization (muP): the width of the model whose learning rate, initialization and weight
    decay are to hold, in the same proportions and of any depth (Yang et al. 2022, arXiv 2203.03466).
    """

    __pydantic_config__ = _EXACT
    base_hidden_size: Annotated[int, Field(strict=True)]
    base_head_dim: Annotated[int, Field(strict=True)] | None = None  # None: the model's, as if width is heads

    def __post_init__(self) -> None:
        _reject_out_of_range(vars(self))


@dataclass(frozen=True)
class LlamaConfig:
    """A Llama decoder, under the names that Hugging Face's `config.json` uses."""

    __pydantic_config__ = _EXACT
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling_factor: float = 1.0  # position interpolation: positions are divided by it (Chen et al. 2023)
    head_dim: int = 0  # 0: hidden_size / num_attention_heads, which then is its value
    tie_word_embeddings: bool = False  # the LM head is the embedding table
    rope_scaling: Annotated[RopeScaling, Field(discriminator="rope_type")] | None = None  # other than interpolation
    mup: Mup | None = None

    def __post_init__(self) -> None:
        if self.head_dim == 0 and self.num_attention_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)  # although frozen
        _reject_out_of_range(vars(self))
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of"
                f" num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} must be even, because RoPE rotates pairs")
        if self.rope_scaling_factor > 1 and self.rope_scaling is not None:
            raise ConfigError("rope_scaling_factor and rope_scaling: both scale positions; expected one of them")

    @property
    def width_multiplier(self) -> float:
        """How much wider the model is than the base of muP; 1 without it."""
        return self.hidden_size / self.mup.base_hidden_size if self.mup else 1.0

    @property
    def attention_multiplier(self) -> float:
        """What muP multiplies attention logits by: 1 / head size in place of its root, equal at the base."""
        base = self.mup and self.mup.base_head_dim
        return sqrt(base / self.head_dim) if base else 1.0

    @property
    def num_matmul_parameters(self) -> int:
        """Parameters that take part in matrix products: all linear layers and the LM head, no embedding, no norms."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (attention + mlp) + self.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        """All parameters: the matrix products', the embedding table unless it is the LM head, and the norms."""
        norms = self.hidden_size * (2 * self.num_hidden_layers + 1)
        table = 0 if self.tie_word_embeddings else self.hidden_size * self.vocab_size
        return self.num_matmul_parameters + table + norms

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of one training token, forward and backward: 6 N + 12 L H E T.

        N counts the matrix-product parameters with the LM head and without the embedding; attention is counted in
        full (not halved for causality). This is the formula behind TinyLlama's published 56 % MFU: 7.313 GFLOP per
        token for the 1.1B model at 2,048 tokens.
        """
        query_width = self.num_attention_heads * self.head_dim
        attention = 12 * self.num_hidden_layers * query_width * sequence_length
        return 6 * self.num_matmul_parameters + attention

    def to_dict(self) -> dict:
        """The description in run.json and manifests, which is the identity of a model.

        Options of later versions are in it only if they are used, so that a model of an older one keeps its identity.
        """
        unused = _UNUSED | {"head_dim": self.hidden_size // self.num_attention_heads}
        return {key: value for key, value in asdict(self).items() if key not in unused or value != unused[key]}


def dtype_name(dtype: object) -> str:
    """A torch dtype as files and messages have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


# TinyLlama's three published shapes (lit_gpt/config.py of its repository; -8k is `code_tiny_LLaMA_1b`), the first with
# the positions of the recipes tinyllama-32k and -128k, then small ones for the demo and the tests.
MODEL_SIZES: dict[str, LlamaConfig] = {
    "tinyllama-1.1b": LlamaConfig(32_000, 2048, 5632, 22, 32, 4, 2048),
    "tinyllama-1.1b-8k": LlamaConfig(32_000, 2048, 5632, 22, 32, 4, 8192, rope_scaling_factor=4.0),
    "tinyllama-1.1b-32k": LlamaConfig(32_000, 2048, 5632, 22, 32, 4, 32_768, rope_theta=1_000_000.0),
    "tinyllama-1.1b-128k": LlamaConfig(
        32_000, 2048, 5632, 22, 32, 4, 131_072, rope_theta=1_000_000.0, rope_scaling=YarnScaling(4.0, 32_768)
    ),
    "tinyllama-120m": LlamaConfig(32_000, 768, 2048, 12, 12, 1, 2048),
    "demo": LlamaConfig(2048, 512, 1408, 3, 8, 2, 512),
    "test": LlamaConfig(512, 64, 176, 2, 4, 2, 128),
}


def model_config(name: str) -> LlamaConfig:
    """The shapes of a named size of `MODEL_SIZES`; raises `ConfigError` for other names."""
    if name not in MODEL_SIZES:
        raise ConfigError(f"model {name!r} is unknown; the known sizes are {', '.join(MODEL_SIZES)}")
    return MODEL_SIZES[name]
