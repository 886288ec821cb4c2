"""Reads the tensors of a checkpoint, whole or any range of them, for any number of ranks and ZeRO stage that wrote it.

Files are mapped while they are read: a reader holds nothing in memory, and the ranks of a host share what they read.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tinyllama_ds.checkpoint.format import CheckpointManifest, read_manifest, verify_checkpoint
from tinyllama_ds.checkpoint.fragments import MASTER
from tinyllama_ds.errors import ConfigError

_KEY = re.compile(r"(?P<kind>\w+)/(?P<name>.+)\[(?P<start>\d+):(?P<stop>\d+)\]")


class _Stored(NamedTuple):
    """The elements `start` to `stop` of a flattened parameter, and where they are."""

    start: int
    stop: int
    path: Path
    key: str


class CheckpointReader:
    """The tensors of a checkpoint that has been verified; what is read stays valid."""

    def __init__(self, checkpoint: Path) -> None:
        """Raises `ConfigError` where the manifest or the header of a file cannot be read."""
        self.checkpoint = checkpoint
        self.manifest: CheckpointManifest = read_manifest(checkpoint)
        self._stored: dict[str, dict[str, list[_Stored]]] = defaultdict(lambda: defaultdict(list))
        for name in self.manifest.files:
            self._list(checkpoint / name)

    def kinds(self, name: str) -> list[str]:
        """What is stored of a parameter: "master", "exp_avg", ..."""
        return list(self._stored[name])

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """In which a kind of a parameter is stored."""
        return self.read(kind, name, 0, 1).dtype

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """The elements `start` to `stop` of a flattened parameter.

        Raises `ConfigError` where the files do not hold each of them once.
        """
        from safetensors import safe_open

        pieces, place = [], start
        for stored in sorted(self._stored[name][kind]):
            if stored.start <= place < min(stop, stored.stop):
                end = min(stop, stored.stop)
                with safe_open(stored.path, "pt") as file:
                    pieces.append(file.get_slice(stored.key)[place - stored.start : end - stored.start])
                place = end
        if place != stop or not pieces:
            raise ConfigError(f"{self.checkpoint}: does not hold elements {place} to {stop} of {kind}/{name}")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every parameter whole, one after another: the master weights, or what they are rounded to."""
        for name, shape in self.manifest.parameters.items():
            whole = self.read(MASTER, name, 0, prod(shape)).view(shape)
            yield name, whole if dtype is None else whole.to(dtype)

    def _list(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                keys = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{path}: not a whole safetensors file ({error})") from error
        for key in keys:
            match = _KEY.fullmatch(key)
            if match is None:
                raise ConfigError(f"{path}: holds {key!r}; expected names such as master/NAME[0:100]")
            stored = _Stored(int(match["start"]), int(match["stop"]), path, key)
            self._stored[match["name"]][match["kind"]].append(stored)


def stream_weights(checkpoint: Path) -> tuple[CheckpointManifest, Iterator[tuple[str, Tensor]]]:
    """Verify a checkpoint; the whole parameters one after another, in the dtype that the forward pass used.

    Under bf16 training these are the master weights rounded once, exactly what the last step left in the model.
    """
    manifest = verify_checkpoint(checkpoint)
    return manifest, CheckpointReader(checkpoint).weights(getattr(torch, manifest.dtype))


def stream_average(checkpoints: Sequence[Path]) -> tuple[CheckpointManifest, Iterator[tuple[str, Tensor]]]:
    """Verify some checkpoints of one run; the means of their master weights in fp32, rounded once to the last's dtype.

    Averaged weights of a constant learning rate are close to those of a decay (Sanyal et al. 2023, arXiv 2306.03241).
    Returns the manifest of the last one.
    """
    manifests = [verify_checkpoint(checkpoint) for checkpoint in checkpoints]
    readers, last = [CheckpointReader(checkpoint) for checkpoint in checkpoints], manifests[-1]

    def means() -> Iterator[tuple[str, Tensor]]:
        for name, shape in last.parameters.items():
            total = torch.zeros(prod(shape))
            for reader in readers:
                total += reader.read(MASTER, name, 0, prod(shape))
            yield name, (total / len(readers)).view(shape).to(getattr(torch, last.dtype))

    return last, means()
