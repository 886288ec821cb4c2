"""Our weights to a Hugging Face folder, verified before it appears."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyllama_ds.data.chat import Message, chat_template, conversation_ids, prompt_ids
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.vocabulary import PROBE_TEXTS, difference_of
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.weights import MAX_SHARD_SIZE, WeightsInfo, digest, parameter_shapes, write_weights
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import LlamaForCausalLM, assign_weights
from tinyllama_ds.model.probe import TOLERANCE, Probe, loss_difference, probe_loss
from tinyllama_ds.outputs import new_folder

LOGIT_TOLERANCE = 1e-4  # largest difference in fp32, relative to the largest logit


@dataclass(frozen=True)
class ExportOptions:
    """What a folder may have beside the weights: the tokenizer of a chat model brings the chat template."""

    probe: Probe | None = None  # a sample with the loss that the weights had on it in training
    max_shard_size: str = MAX_SHARD_SIZE
    is_chat_model: bool = False


def export(
    tensors: Iterable[tuple[str, Tensor]],
    config: LlamaConfig,
    tokenizer: Tokenizer,
    output: Path,
    options: ExportOptions = ExportOptions(),
) -> float:
    """Write config.json, safetensors and the tokenizer to a new folder; returns the largest relative logit difference.

    The tensors are read one by one.

    Raises `ConfigError`, leaving nothing behind, unless transformers loads the folder and has the same bits, the
    logits of our model, the tokenizer's ids, and on the checkpoint's probe the loss that training had on it.
    """
    tokenizer.reject_inconvertible()
    with new_folder(output) as folder:
        written = write_weights(folder, tensors, parameter_shapes(config), options.max_shard_size)
        hf_config(config, written.dtype, tokenizer).save_pretrained(folder)
        _generation_config(tokenizer).save_pretrained(folder)
        template = chat_template(tokenizer) if options.is_chat_model else None
        _write_tokenizer(folder, tokenizer, config.max_position_embeddings, template)
        _verify_ids(folder, tokenizer)
        ours, theirs = load_reference_pair(folder, written, config)
        difference = logit_difference(ours, theirs, tokenizer)
        if (probe := options.probe) is not None:
            # A Hugging Face folder has no document mask; our model has, and equal logits without it.
            _verify_loss(probe, ours if probe.document_ids else lambda ids, labels: _loss(theirs(ids).logits, labels))
    return difference


def load_hf_folder(folder: Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """transformers' model, in evaluation mode, and tokenizer of a folder that a user names.

    Raises `ConfigError` where it cannot be loaded, for which transformers raises many classes of errors: a file that is
    missing, truncated, of a wrong JSON type, of a different architecture. It accepts missing parameters; this does not.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
    options |= {} if dtype is None else {"dtype": dtype}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, found = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{folder}: transformers cannot load it: {lines[0]}") from error
    if found["missing_keys"]:
        raise ConfigError(
            f"{folder}: its weights lack {sorted(found['missing_keys'])[0]}; expected all parameters of config.json"
        )
    return model.eval(), tokenizer


def hf_config(config: LlamaConfig, dtype: torch.dtype, tokenizer: Tokenizer | None = None) -> Any:
    """transformers' LlamaConfig of the same model, with the special ids of its tokenizer, if it is known.

    It has no multipliers: those of muP are folded into the weights (`fold_multipliers`).
    """
    import transformers

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling_factor != 1:
        rope |= {"rope_type": "linear", "factor": config.rope_scaling_factor}
    if config.rope_scaling is not None:
        rope |= {key: value for key, value in vars(config.rope_scaling).items() if value is not None}
    shapes = {key: value for key, value in vars(config).items() if not key.startswith("rope_") and key != "mup"}
    return transformers.LlamaConfig(
        **shapes,
        rope_parameters=rope,
        architectures=["LlamaForCausalLM"],
        **_special_ids(tokenizer),
        dtype=dtype,
    )


def hf_model(weights: Mapping[str, Tensor], config: LlamaConfig, tokenizer: Tokenizer | None = None) -> Any:
    """transformers' LlamaForCausalLM around the same tensors: the parameter names are the same, nothing is permuted."""
    import transformers

    described = hf_config(config, next(iter(weights.values())).dtype, tokenizer)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(described)
    assign_weights(model, weights)
    model.model.rotary_emb = type(model.model.rotary_emb)(described)  # its buffers are computed, not stored
    model.generation_config = _generation_config(tokenizer)
    return model.eval()


def _generation_config(tokenizer: Tokenizer | None) -> Any:
    import transformers

    return transformers.GenerationConfig(**_special_ids(tokenizer), do_sample=False)


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """By transformers' names; without a tokenizer it would take Llama 2's."""
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if tokenizer else (None, None, None)
    return dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids, strict=True))


def hf_tokenizer(tokenizer: Tokenizer, max_length: int, chat_template: str | None = None) -> Any:
    """The tokenizer as transformers has it, with the same ids."""
    import transformers

    fast = tokenizer.to_fast()
    numbers = {"unk": tokenizer.unk_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    roles = {f"{role}_token": fast.id_to_token(number) for role, number in numbers.items() if number is not None}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast,
        **roles,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int, chat_template: str | None) -> None:
    hf_tokenizer(tokenizer, max_length, chat_template).save_pretrained(folder)
    for name, content in tokenizer.files.items():
        (folder / name).write_bytes(content)
    # transformers adds no BOS by default; llama.cpp would add one.
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"add_bos_token": False, "add_eos_token": False}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _verify_ids(folder: Path, tokenizer: Tokenizer) -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()  # it warns of texts longer than the model's positions
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    differing = [
        text for text in PROBE_TEXTS if loaded.encode(text, split_special_tokens=True) != tokenizer.encode(text)
    ]
    differing += filter(None, [difference_of(loaded.backend_tokenizer, tokenizer)])
    if differing:
        raise ConfigError(f"export: transformers' token ids of {differing[0]!r} differ from {tokenizer.library}'s")
    if loaded.chat_template is not None:
        _verify_chat_template(loaded, tokenizer)


def load_reference_pair(
    folder: Path, written: WeightsInfo, config: LlamaConfig, layers: Sequence[int] | None = None
) -> tuple[LlamaForCausalLM, Any]:
    """Our decoder and transformers' over the tensors that transformers loads from a folder, both computing in fp32.

    Of transformers' layers only `layers` are kept, if they are given.

    Raises `ConfigError` unless every parameter has the bits that were written, so that both share one copy.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # it warns of buffers that older versions stored
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=written.dtype, attn_implementation="sdpa", local_files_only=True
    )
    if layers is not None:
        theirs.model.layers = torch.nn.ModuleList(theirs.model.layers[number] for number in layers)
        theirs.config.num_hidden_layers = len(layers)
        for number, layer in enumerate(theirs.model.layers):
            layer.self_attn.layer_idx = number  # its place in the cache
    loaded = {name: parameter.detach() for name, parameter in theirs.named_parameters()}
    if loaded.keys() != written.digests.keys():
        raise ConfigError(
            f"{folder}: transformers' parameters differ from ours: {sorted(loaded.keys() ^ written.digests.keys())}"
        )
    for name, tensor in loaded.items():
        if digest(tensor) != written.digests[name]:
            raise ConfigError(f"{folder}: transformers loads different bits of {name}")
    with torch.device("meta"):
        ours = LlamaForCausalLM(config)
    assign_weights(ours, loaded)
    for model in (ours, theirs):
        _compute_in_fp32(model)
    return ours, theirs


def _compute_in_fp32(model: Any) -> None:
    """Convert each layer to fp32 for its own forward pass only: that is exact, and needs little memory."""
    stored: dict[torch.nn.Parameter, Tensor] = {}

    def widen(layer: torch.nn.Module, inputs: Any) -> None:
        for parameter in layer.parameters():
            stored[parameter] = parameter.data
            parameter.data = parameter.data.float()

    def narrow(layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        for parameter in layer.parameters():
            parameter.data = stored.pop(parameter)

    for layer in (model.model.embed_tokens, *model.model.layers, model.model.norm, model.lm_head):
        layer.register_forward_pre_hook(widen)
        layer.register_forward_hook(narrow)


def logit_difference(ours: LlamaForCausalLM, theirs: Any, tokenizer: Tokenizer) -> float:
    """The largest difference of their logits on the probe texts, relative to the largest logit.

    Raises `ConfigError` where it is beyond `LOGIT_TOLERANCE`.
    """
    length = min(64, ours.config.max_position_embeddings)
    ids = torch.tensor([(tokenizer.encode(" ".join(PROBE_TEXTS)) * length)[:length]])
    with torch.no_grad():
        expected, found = ours(ids), theirs(ids).logits
    difference = ((expected - found).abs().max() / expected.abs().max()).item()
    if not difference <= LOGIT_TOLERANCE:
        raise ConfigError(f"transformers' logits differ from ours by {difference:.1e} of the largest logit")
    return difference


def _verify_chat_template(loaded: Any, tokenizer: Tokenizer) -> None:
    """transformers' ids and loss masks of whole conversations and of prompts equal ours.

    Texts that contain control tokens have different ids there, but none of control tokens. Where a turn is encoded in
    two parts, so have texts that begin with white space.
    """
    for text in PROBE_TEXTS:
        if not text.strip() or (tokenizer.cuts_turns and text[0].isspace()):
            continue
        roles = ("system", "user", "assistant", "user", "assistant")
        messages = [Message(role, text) for role in roles]
        turns = [{"role": message.role, "content": message.content} for message in messages]
        whole = loaded.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
        theirs = whole["input_ids"], list(whole["assistant_masks"])
        prompt = loaded.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
        if any(control in text for control in tokenizer.control_tokens()):
            special = [token for token in theirs[0] if token in tokenizer.special_ids]
            is_same = special == [tokenizer.eos_id] * len(turns)
        else:
            ours = conversation_ids(tokenizer, messages)
            is_same = theirs == ours and prompt == prompt_ids(tokenizer, messages[:-1])
        if not is_same:
            raise ConfigError(f"export: transformers' chat template gives different ids than ours with {text!r}")


def _verify_loss(probe: Probe, score: Callable[..., Tensor]) -> None:
    loss = probe_loss(score, probe.tokens, probe.document_ids, 1, torch.device("cpu"))
    allowed = TOLERANCE[probe.dtype]
    if loss_difference(probe, loss) > allowed:
        raise ConfigError(
            f"export: the loss on the checkpoint's probe is {loss:.6f} and was {probe.loss:.6f} in training, more than"
            f" {allowed:g} of it apart; the weights differ from those that were saved"
        )


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
