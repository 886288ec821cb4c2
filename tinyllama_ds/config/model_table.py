"""A model as Hugging Face's `config.json` describes it: in an imported folder, and in a recipe's `[model]` table."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    GetPydanticSchema,
    StrictBool,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from tinyllama_ds.config.validation import AS_TABLE, BY_NAME, CONTRADICTION, expectation
from tinyllama_ds.errors import ConfigError, shown_as_json
from tinyllama_ds.model.config import MODEL_SIZES, Llama3Scaling, LlamaConfig, RopeScaling, YarnScaling

# Keys of Llama's config.json that change nothing about what the decoder computes, or belong to the tokenizer.
_WITHOUT_EFFECT = {
    *("_name_or_path", "bos_token_id", "dtype", "eos_token_id", "initializer_range"),
    *("is_llama_config", "pad_token_id", "pretraining_tp", "torch_dtype", "transformers_version", "use_cache"),
}


def only(value: object) -> Any:
    """For a field that has one value with our decoder, which older versions wrote into a list."""

    def check(found: object) -> object:
        if found not in (value, [value]):
            raise expectation(f"{shown_as_json(value)}, as in TinyLlama")
        return found

    return AfterValidator(check)


_Size = Annotated[int, Field(ge=1, lt=2**31, strict=True)]
_Number = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
_RopeType = Literal["default", "linear", "llama3", "yarn"]
_NEEDS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}


class _Rope(BaseModel, extra="forbid"):
    """`rope_parameters` of transformers 5, `rope_scaling` of transformers 4."""

    rope_type: _RopeType | None = None
    type: _RopeType | None = None  # as transformers 4 called it
    rope_theta: _Number | None = None
    partial_rotary_factor: Annotated[Any, only(1.0)] = 1.0
    factor: _Number | None = None
    original_max_position_embeddings: _Size | None = None
    low_freq_factor: _Number | None = None
    high_freq_factor: _Number | None = None
    attention_factor: _Number | None = None
    beta_fast: _Number | None = None
    beta_slow: _Number | None = None
    mscale: _Number | None = None
    mscale_all_dim: _Number | None = None
    truncate: StrictBool | None = None

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> Self:
        absent = [key for key in _NEEDS.get(self.kind, ()) if getattr(self, key) is None]
        if absent:
            raise expectation(f"{' and '.join(absent)} with the type {self.kind}")
        return self

    @property
    def kind(self) -> str:
        return self.rope_type or self.type or "default"

    def scaling(self, positions: int) -> RopeScaling | None:
        """The scaling of a model of so many positions, if it is more than a factor."""
        kinds: dict[str, type[RopeScaling]] = {"llama3": Llama3Scaling, "yarn": YarnScaling}
        if self.kind not in kinds:
            return None
        kind = kinds[self.kind]
        given = {key: value for key, value in dict(self).items() if value is not None and key in kind.__annotations__}
        return kind(**{"original_max_position_embeddings": positions} | given)


class HuggingFaceConfig(BaseModel):
    """The keys of Llama's `config.json` that determine what its decoder computes; others are ignored."""

    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None  # absent before transformers 4.31
    max_position_embeddings: _Size
    rms_norm_eps: _Number
    rope_theta: _Number = 10_000.0
    head_dim: _Size | None = None
    tie_word_embeddings: StrictBool = False
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    # What transformers' LlamaForCausalLM can be and our decoder is not. Ours is also transformers' default.
    model_type: Annotated[Any, only("llama")] = "llama"
    architectures: Annotated[Any, only("LlamaForCausalLM")] = "LlamaForCausalLM"
    hidden_act: Annotated[Any, only("silu")] = "silu"
    attention_bias: Annotated[Any, only(False)] = False
    attention_dropout: Annotated[Any, only(0.0)] = 0.0
    mlp_bias: Annotated[Any, only(False)] = False
    partial_rotary_factor: Annotated[Any, only(1.0)] = 1.0
    rope_interleaved: Annotated[Any, only(False)] = False
    auto_map: Annotated[Any, only(None)] = None
    quantization_config: Annotated[Any, only(None)] = None

    def config(self) -> LlamaConfig:
        """Our description of the same model. Raises `ConfigError` where values contradict each other."""
        rope = self.rope_scaling or self.rope_parameters or _Rope()
        values = {key: value for key, value in self if key in LlamaConfig.__annotations__ and value is not None}
        return LlamaConfig(
            **{"num_key_value_heads": self.num_attention_heads}
            | values
            | {
                "rope_theta": rope.rope_theta or self.rope_theta,
                "rope_scaling_factor": rope.factor if rope.kind == "linear" else 1.0,
                "rope_scaling": rope.scaling(self.max_position_embeddings),
            }
        )


class _ModelTable(HuggingFaceConfig, extra="forbid"):
    """The same in a recipe, where an unknown key is a mistake."""

    @model_validator(mode="before")
    @classmethod
    def _without_keys_of_no_effect(cls, raw: dict) -> dict:
        return {key: value for key, value in raw.items() if key not in _WITHOUT_EFFECT}


def _named(name: str) -> LlamaConfig:
    if name not in MODEL_SIZES:
        raise expectation(f"{', '.join(MODEL_SIZES)}, or a table [model] with the keys of Hugging Face's config.json")
    return MODEL_SIZES[name]


def _described(table: _ModelTable) -> LlamaConfig:
    try:
        return table.config()
    except ConfigError as error:
        raise PydanticCustomError(CONTRADICTION, "{reason}", {"reason": str(error)}) from error


_Either = Annotated[
    Annotated[str, AfterValidator(_named), Tag(BY_NAME)]
    | Annotated[_ModelTable, AfterValidator(_described), Tag(AS_TABLE)],
    Discriminator(lambda raw: AS_TABLE if isinstance(raw, dict) else BY_NAME),
]
# In a recipe: the name of a size, or a table.
Model = Annotated[LlamaConfig, GetPydanticSchema(lambda _, handler: handler(_Either))]
