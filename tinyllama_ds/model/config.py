"""Shapes of the decoder, and the table of named sizes."""

from dataclasses import asdict, dataclass

from tinyllama_ds.errors import ConfigError

_LARGEST = 2**31 - 1
_MOST_LAYERS = 1000  # building each takes time
# fp32 logits alive at once: 2,048 rows of Llama's vocabulary keep a GPU busy. On a CPU every chunk adds a gradient of
# the whole weight, which is slow for small chunks, and large ones do not fit the cache (docs/performance.md).
MAX_CHUNK_LOGITS = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes of a Llama-2-architecture decoder, under the names that Hugging Face's `config.json` uses."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  where a description of a model is read
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

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            most = _MOST_LAYERS if key == "num_hidden_layers" else _LARGEST
            if not 0 < value <= most:
                raise ConfigError(f"{key} {value:.12g} is not above 0 and up to {most:,}")
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
            raise ConfigError(f"head size {self.head_dim} must be even, because RoPE rotates pairs")
        if not 1 <= self.rope_scaling_factor < float("inf"):
            raise ConfigError(f"rope_scaling_factor {self.rope_scaling_factor} must be 1 or more")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_matmul_parameters(self) -> int:
        """Parameters that take part in matrix products: all linear layers and the LM head, no embedding, no norms."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_attention_heads + 2 * self.num_key_value_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_hidden_layers * (attention + mlp) + self.hidden_size * self.vocab_size

    @property
    def num_parameters(self) -> int:
        """All parameters: the matrix products', the embedding table and the norms."""
        norms = self.hidden_size * (2 * self.num_hidden_layers + 1)
        return self.num_matmul_parameters + self.hidden_size * self.vocab_size + norms

    def flops_per_token(self, sequence_length: int) -> int:
        """Floating-point operations of one training token, forward and backward: 6 N + 12 L d T.

        N counts the matrix-product parameters with the LM head and without the embedding; attention is counted in
        full (not halved for causality). This is the formula behind TinyLlama's published 56 % MFU: 7.313 GFLOP per
        token for the 1.1B model at 2,048 tokens.
        """
        attention = 12 * self.num_hidden_layers * self.hidden_size * sequence_length
        return 6 * self.num_matmul_parameters + attention

    def to_dict(self) -> dict:
        """All values, without `rope_scaling_factor` where it is 1, as in runs of versions without it."""
        values = asdict(self)
        if self.rope_scaling_factor == 1:
            del values["rope_scaling_factor"]
        return values


def dtype_name(dtype: object) -> str:
    """A torch dtype as files and messages have it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


# TinyLlama's three published shapes (lit_gpt/config.py of its repository; the second is `code_tiny_LLaMA_1b`), then
# small ones for the demo and the tests.
MODEL_SIZES: dict[str, LlamaConfig] = {
    "tinyllama-1.1b": LlamaConfig(32_000, 2048, 5632, 22, 32, 4, 2048),
    "tinyllama-1.1b-8k": LlamaConfig(32_000, 2048, 5632, 22, 32, 4, 8192, rope_scaling_factor=4.0),
    "tinyllama-120m": LlamaConfig(32_000, 768, 2048, 12, 12, 1, 2048),
    "demo": LlamaConfig(2048, 512, 1408, 3, 8, 2, 512),
    "test": LlamaConfig(512, 64, 176, 2, 4, 2, 128),
}


def model_config(name: str, sequence_length: int = 0) -> LlamaConfig:
    """The shapes of a named size of `MODEL_SIZES`; raises `ConfigError` for other names, and for longer sequences."""
    if name not in MODEL_SIZES:
        raise ConfigError(f"model {name!r} is unknown; the known sizes are {', '.join(MODEL_SIZES)}")
    model = MODEL_SIZES[name]
    if sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"sequence_length {sequence_length} is beyond the {model.max_position_embeddings} positions of model"
            f" {name!r}"
        )
    return model
