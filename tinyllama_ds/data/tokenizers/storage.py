"""Tokenizers as files: sentencepiece's `tokenizer.model`, or the tokenizers library's `tokenizer.json`."""

from pathlib import Path

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.fast_tokenizer import FastTokenizer
from tinyllama_ds.data.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import write_durably
from tinyllama_ds.layout import TOKENIZER_JSON, TOKENIZER_MODEL


def load_tokenizer(path: Path) -> Tokenizer:
    """A `tokenizer.model`, a `tokenizer.json` with the files next to it that name its special tokens, or the folder of
    either. Raises `ConfigError` for a file that is missing, damaged or of a different kind.
    """
    file = next((path / name for name in (TOKENIZER_MODEL, TOKENIZER_JSON) if (path / name).is_file()), path)
    if not file.is_file():
        raise ConfigError(
            f"{path}: the tokenizer is missing; expected {TOKENIZER_MODEL} (sentencepiece) or {TOKENIZER_JSON}"
        )
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: the tokenizer cannot be read ({error.strerror})") from error
    is_json = file.suffix == ".json" or content.lstrip().startswith(b"{")
    return FastTokenizer(file, content) if is_json else SentencePieceTokenizer(file, content)


def stored_tokenizer(folder: Path, sha256: str, holder: str) -> Tokenizer:
    """The tokenizer of a run or a data directory; raises `ConfigError` unless it has the recorded SHA-256."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.sha256 != sha256:
        raise ConfigError(
            f"{tokenizer.path}: is not the tokenizer of {holder}, its SHA-256 is {tokenizer.sha256[:16]}...; expected"
            f" {sha256[:16]}..."
        )
    return tokenizer


def store_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """Store the tokenizer with the tokens; raises `ConfigError` where a different one is stored already."""
    if any((output / name).exists() for name in (TOKENIZER_MODEL, TOKENIZER_JSON)):
        held = load_tokenizer(output)
        if held.sha256 != tokenizer.sha256:
            raise ConfigError(
                f"{held.path}: differs from {tokenizer.path}; one data directory holds tokens of one tokenizer"
            )
        return
    write_tokenizer(tokenizer, output)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files of the tokenizer, the one that makes it visible last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in reversed(tokenizer.files.items()):
        write_durably(folder / name, content)
