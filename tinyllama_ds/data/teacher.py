"""What a teacher predicts at every token of a source's samples, cached for the distillation of students.

`<data>/<source>/<split>/teacher/shard_NNNNN.bin` is an array of records, one for each of the T input tokens of
consecutive samples of a `TokenStream`: the k token ids that the teacher finds most probable as the next one, in the
type of the tokens, and k + 1 log-probabilities in fp16, of these ids and of all other tokens together. The teacher has
seen the tokens before it in the sample, with a document mask those of its document, as a student does in training.
`shard_NNNNN.json` is the manifest, written last.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, StrictBool

from tinyllama_ds import __version__
from tinyllama_ds.config.recipe import CONCATENATE, Packing
from tinyllama_ds.config.validation import validate_json, whole_number
from tinyllama_ds.data.shards import read_array, token_dtype
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.errors import ConfigError, DataError
from tinyllama_ds.files import sha256_of
from tinyllama_ds.inputs import read_text

TEACHER_FOLDER = "teacher"
_Count = Annotated[int, whole_number()]
_Positive = Annotated[int, whole_number(1)]
_FORBID = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Predictions:
    """Of what, by whom and how: the same in all shards of a source and split."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID
    model: str  # the name of the teacher's folder
    model_sha256: str
    tokens_sha256: str  # of all shards of the source
    sequence_length: _Positive
    document_mask: StrictBool
    top_k: _Positive
    vocab_size: _Positive  # tokens that the probabilities are over
    packing: Packing = CONCATENATE

    @property
    def record(self) -> np.dtype:
        """Of a token: ids (k,) and log_probs (k + 1,)."""
        ids = token_dtype(self.vocab_size)
        return np.dtype([("ids", ids, (self.top_k,)), ("log_probs", "<f2", (self.top_k + 1,))])


@dataclass(frozen=True)
class TeacherManifest:
    """What a shard holds, and everything needed to verify it."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID
    predictions: Predictions
    bytes_per_token: _Positive
    number: _Count  # of this shard, from 0
    shards: _Positive  # of this source and split
    first_sample: _Count
    samples: _Positive
    sha256: str
    environment: dict[str, str]  # on which the last bits depend
    tool_version: str = __version__
    manifest_version: Literal[1] = 1

    @staticmethod
    def read(path: Path) -> "TeacherManifest":
        """Raises `ConfigError` unless it is a complete manifest of this version."""
        return validate_json(TeacherManifest, read_text(path, "the manifest of a teacher's predictions"), path)


class TeacherCache:
    """Random access to the predictions for a stream's samples."""

    def __init__(
        self, stream: TokenStream, sequence_length: int, document_mask: bool, packing: str = CONCATENATE
    ) -> None:
        """Raises `ConfigError` unless they are complete, and of these tokens with this length, mask and packing."""
        self.directory = stream.directory / TEACHER_FOLDER
        paths = sorted(self.directory.glob("*.json"))
        if not paths:
            raise ConfigError(
                f"{self.directory}: holds no predictions of a teacher, which the recipe's [teacher] needs; make them by"
                f" prepare --teacher HF_DIR --sequence-length {sequence_length}"
            )
        self.manifests = [TeacherManifest.read(path) for path in paths]
        self.predictions = self.manifests[0].predictions
        self._paths = [path.with_suffix(".bin") for path in paths]
        self._record = self.predictions.record
        self._sequence_length = sequence_length
        self._reject_different(stream, document_mask, packing)
        self._reject_incomplete(stream.num_samples(sequence_length))

    def _reject_different(self, stream: TokenStream, document_mask: bool, packing: str) -> None:
        wanted = {
            "sequence_length": (self._sequence_length, "the recipe's"),
            "document_mask": (document_mask, "the recipe's"),
            "packing": (packing, "the recipe's"),
            "tokens_sha256": (tokens_sha256(stream), "that of the tokens next to them"),
        }
        for key, (expected, whose) in wanted.items():
            found = getattr(self.predictions, key)
            if found != expected:
                raise ConfigError(
                    f"{self.directory}: its predictions have {key} {json.dumps(found)}; expected {whose}"
                    f" {json.dumps(expected)}, or remove the folder and make it by prepare --teacher again"
                )
        if any(manifest.predictions != self.predictions for manifest in self.manifests):
            raise ConfigError(f"{self.directory}: holds predictions of several kinds; remove it and make it again")

    def _reject_incomplete(self, samples: int) -> None:
        planned = {manifest.shards for manifest in self.manifests}
        held = [manifest.number for manifest in self.manifests]
        if len(planned) != 1 or held != list(range(*planned)) or sum(m.samples for m in self.manifests) != samples:
            raise ConfigError(
                f"{self.directory}: {len(held)} of {max(planned)} shards are there; run prepare --teacher again"
            )
        for path, manifest in zip(self._paths, self.manifests, strict=True):
            size = manifest.samples * self._sequence_length * self._record.itemsize
            if not path.is_file() or path.stat().st_size != size:
                raise ConfigError(f"{path}: expected a file of {size} bytes; remove its manifest and make it again")

    def read(self, sample: int) -> np.ndarray:
        """The records of a sample's input tokens (T,), fields `ids` (T, k) and `log_probs` (T, k + 1).

        Raises `DataError` for an id beyond the vocabulary.
        """
        T = self._sequence_length
        number, within = divmod(sample, self.manifests[0].samples)  # the last shard alone is shorter
        records = read_array(self._paths[number], self._record, within * T, T)
        largest = int(records["ids"].max())
        if largest >= self.predictions.vocab_size:
            raise DataError(
                f"{self._paths[number]} at sample {within}: token id {largest} is beyond the vocabulary of"
                f" {self.predictions.vocab_size}"
            )
        return records

    def fingerprint(self) -> dict:
        """What identifies the predictions."""
        return {
            "model_sha256": self.predictions.model_sha256,
            "top_k": self.predictions.top_k,
            "sha256": [manifest.sha256 for manifest in self.manifests],
        }


def damaged_shards(directory: Path) -> list[str]:
    """The shards of predictions for a split that differ from the hash in their manifest. Reads every byte."""
    paths = sorted((directory / TEACHER_FOLDER).glob("*.json"))
    pairs = [(path.with_suffix(".bin"), TeacherManifest.read(path)) for path in paths]
    return [
        f"{path} differs from the hash in its manifest"
        for path, manifest in pairs
        if not path.is_file() or sha256_of(path) != manifest.sha256
    ]


def tokens_sha256(stream: TokenStream) -> str:
    """What identifies the tokens of a stream, their documents and loss masks."""
    hashes = [(manifest.bin_sha256, manifest.idx_sha256, manifest.mask_sha256) for manifest in stream.manifests]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
