"""A Hugging Face folder to a model folder of ours; all differences from our decoder are errors that name the key.

No code of the folder is executed: tensors come from safetensors alone.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from tinyllama_ds.config.model_table import HuggingFaceConfig
from tinyllama_ds.config.validation import validate_json
from tinyllama_ds.data.loader import reject_unfit_vocabulary
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.data.tokenizers.vocabulary import difference_of
from tinyllama_ds.errors import ConfigError, shown_as_json
from tinyllama_ds.files import SAFE_FILE_NAME, read_object_if_whole
from tinyllama_ds.hf.convert import load_reference_pair, logit_difference
from tinyllama_ds.hf.model_folder import write_model_folder
from tinyllama_ds.hf.weights import INDEX_FILE, parameter_shapes, read_tensor, tensor_names
from tinyllama_ds.inputs import read_text
from tinyllama_ds.layout import TOKENIZER_JSON, TOKENIZER_MODEL
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.outputs import new_folder

CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", INDEX_FILE)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OF_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_COMPUTED = re.compile(r".*rotary_emb\.inv_freq")  # a buffer that transformers stored until 4.31


@dataclass(frozen=True)
class ImportResult:
    """The result of an import."""

    model: LlamaConfig
    dtype: torch.dtype
    largest_logit_difference: float
    padding: int  # rows of the embeddings beyond the tokenizer's ids


def import_hf_folder(
    folder: Path, output: Path, tokenizer: Path | None = None, layers: Sequence[int] | None = None
) -> ImportResult:
    """Write a model folder with the weights and the tokenizer of a Hugging Face folder.

    `tokenizer` is a file to use instead of the folder's own. Of the decoder layers only `layers` are taken, by their
    numbers from 0 on, which is how a draft for speculative decoding begins. Raises `ConfigError`, leaving nothing
    behind, where the folder has a different architecture, is damaged, or its tokenizer does not fit; and
    unless transformers loads the same bits from it and has the logits of our decoder.
    """
    config = read_config(folder / CONFIG_FILE)
    loaded = _tokenizer_of(folder, config, tokenizer)
    tensors = read_parameters(find_tensors(folder, config), config)
    if layers is not None:
        _reject_bad_layers(layers, folder, config)
        config = replace(config, num_hidden_layers=len(layers))
        tensors = _only(layers, tensors)
    with new_folder(output) as partial:
        written = write_model_folder(partial, tensors, config, loaded)
        difference = logit_difference(*load_reference_pair(folder, written, config, layers), loaded)
    return ImportResult(config, written.dtype, difference, config.vocab_size - loaded.vocab_size)


def _reject_bad_layers(layers: Sequence[int], folder: Path, config: LlamaConfig) -> None:
    is_rising = all(before < after for before, after in pairwise(layers))
    if not layers or not is_rising or not 0 <= layers[0] <= layers[-1] < config.num_hidden_layers:
        raise ConfigError(
            f"--layers {','.join(map(str, layers))}: expected numbers in rising order from 0 to"
            f" {config.num_hidden_layers - 1}, the layers of {folder}"
        )


def _only(layers: Sequence[int], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of some layers, which get the numbers from 0 on, and those outside layers."""
    for name, tensor in tensors:
        is_of_layer = _OF_LAYER.match(name)
        if is_of_layer is None or int(is_of_layer[1]) in layers:
            yield _OF_LAYER.sub(lambda match: f"model.layers.{layers.index(int(match[1]))}.", name), tensor


def read_config(path: Path) -> LlamaConfig:
    """The model in a `config.json` of transformers 4 or 5; raises `ConfigError` for what our decoder is not."""
    found = validate_json(HuggingFaceConfig, read_text(path, "the description of a Hugging Face folder"), path)
    try:
        return found.config()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _tokenizer_of(folder: Path, config: LlamaConfig, instead: Path | None) -> Tokenizer:
    if instead is None and not any((folder / name).is_file() for name in (TOKENIZER_MODEL, TOKENIZER_JSON)):
        raise ConfigError(
            f"{folder}: holds no tokenizer; expected {TOKENIZER_MODEL} or {TOKENIZER_JSON}, or --tokenizer FILE"
        )
    tokenizer = load_tokenizer(instead or folder)
    reject_unfit_vocabulary(tokenizer, config.vocab_size)
    tokenizer.reject_inconvertible()
    _reject_other_special_ids(folder / CONFIG_FILE, tokenizer)
    fast = folder / TOKENIZER_JSON
    if instead is None and isinstance(tokenizer, SentencePieceTokenizer) and fast.is_file():
        _reject_other_ids(fast, tokenizer)
    return tokenizer


def _reject_other_special_ids(path: Path, tokenizer: Tokenizer) -> None:
    """The ids that `config.json` names, which may be lists, contain those of the tokenizer."""
    described = read_object_if_whole(path)
    for role, number in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        found = described.get(f"{role}_token_id")
        if None not in (found, number) and number not in (found if isinstance(found, list) else [found]):
            raise ConfigError(
                f"{path}: {role}_token_id is {shown_as_json(found)}; expected {number}, as in {tokenizer.path}"
            )


def _reject_other_ids(path: Path, tokenizer: SentencePieceTokenizer) -> None:
    """The model was trained with the ids of one of the two, and it is not known which."""
    import tokenizers

    try:
        fast = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ConfigError(f"{path}: not a tokenizer ({error})") from error
    expected = "; give the sentencepiece model that the weights were trained with by --tokenizer"
    if fast.get_vocab(with_added_tokens=True) != {piece: number for number, piece in enumerate(tokenizer.pieces)}:
        raise ConfigError(f"{path}: its pieces are not those of {tokenizer.path}{expected}")
    text = difference_of(fast, tokenizer)
    if text is not None:
        raise ConfigError(f"{path}: its ids of {text!r} are not those of {tokenizer.path}{expected}")


def find_tensors(folder: Path, config: LlamaConfig) -> dict[str, Path]:
    """In which file of the folder each parameter is; raises `ConfigError` unless exactly those of the model are there.

    Of tied embeddings there may be both copies, if they are equal.
    """
    shapes = parameter_shapes(config)
    path = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if path is None:
        for other in sorted(folder.glob("pytorch_model*.bin*")):
            raise ConfigError(
                f"{other}: weights in PyTorch's format are not read, as they can run code; convert the folder to"
                " safetensors with from_pretrained and save_pretrained of transformers"
            )
        raise ConfigError(f"{folder}: holds no weights; expected {' or '.join(WEIGHT_FILES)}")
    found = _read_index(path) if path.suffix == ".json" else dict.fromkeys(tensor_names(path), path)
    found = {name: file for name, file in found.items() if not _COMPUTED.fullmatch(name)}
    if config.tie_word_embeddings and {_HEAD, _TABLE} <= found.keys():
        if not torch.equal(read_tensor(found[_HEAD], _HEAD), read_tensor(found[_TABLE], _TABLE)):
            raise ConfigError(
                f"{found[_HEAD]}: {_HEAD} differs from {_TABLE}, and {CONFIG_FILE} has tie_word_embeddings true;"
                " expected equal tensors, or false"
            )
        del found[_HEAD]
    for names, what in (
        (shapes.keys() - found.keys(), "is missing"),
        (found.keys() - shapes.keys(), "is not expected"),
    ):
        if names:
            more = f" and so are {len(names) - 1} more" if len(names) > 1 else ""
            ties = "" if config.tie_word_embeddings else ", where tie_word_embeddings is false"
            raise ConfigError(
                f"{path}: the tensor {min(names)} {what}{more}; expected the {len(shapes)} of a Llama decoder"
                f" with the shapes of {CONFIG_FILE}{ties if _HEAD in names else ''}"
            )
    return found


def _read_index(path: Path) -> dict[str, Path]:
    """The file of each tensor; all files are present and hold the tensors that the index lists."""
    try:
        places: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path}: not an index of shards with a weight_map ({repr(error):.80})") from error
    for name in names:
        if not isinstance(name, str) or not SAFE_FILE_NAME.fullmatch(name):
            raise ConfigError(f"{path}: weight_map names {name!r:.200}; expected the plain name of a file beside it")
        if not (path.parent / name).is_file():
            raise ConfigError(f"{path.parent / name}: this shard is missing, {path.name} names it")
        lacking = {tensor for tensor, file in places.items() if file == name} - set(tensor_names(path.parent / name))
        if lacking:
            raise ConfigError(f"{path.parent / name}: does not hold {min(lacking)}, which {path.name} lists for it")
    return {tensor: path.parent / name for tensor, name in places.items()}


def read_parameters(files: dict[str, Path], config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """All parameters in the order of the model, checked one by one."""
    dtype = None
    for name, shape in parameter_shapes(config).items():
        path = files[name]
        tensor = read_tensor(path, name)
        dtype = dtype or tensor.dtype
        if tensor.shape != shape:
            raise ConfigError(f"{path}: {name} has the shape {list(tensor.shape)}; expected {list(shape)}")
        if tensor.dtype != dtype or dtype not in _DTYPES:
            expected = dtype if dtype in _DTYPES else "float32, bfloat16 or float16"
            raise ConfigError(f"{path}: {name} is {tensor.dtype}; expected {expected}".replace("torch.", ""))
        if not tensor.isfinite().all():
            raise ConfigError(f"{path}: {name} holds values that are not finite; expected weights of a trained model")
        yield name, tensor
