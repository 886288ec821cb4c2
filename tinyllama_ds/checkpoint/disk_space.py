"""Disk space for checkpoints: what they need is known by arithmetic, before the first one is written."""

import os
from dataclasses import dataclass
from pathlib import Path

from tinyllama_ds.checkpoint.format import find_checkpoints
from tinyllama_ds.checkpoint.retention import find_leftovers
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.layout import CHECKPOINTS

_HEADER = 2**16  # bytes of a safetensors file that are not tensors, ample


@dataclass(frozen=True)
class Need:
    """What one checkpoint takes."""

    size: int  # bytes
    files: int

    def __mul__(self, times: int) -> "Need":
        return Need(self.size * times, self.files * times)


def checkpoint_need(parameters: int, deepspeed_config: dict, ranks: int) -> Need:
    """What one checkpoint takes at most, over all ranks and at any ZeRO stage.

    Master weights and both moments of AdamW in fp32 are 12 bytes per parameter. Muon has one moment of its matrices.
    """
    bf16, optimizer = deepspeed_config.get("bf16", {}), deepspeed_config.get("optimizer", {}).get("params", {})
    master = 2 if bf16.get("bf16_master_weights_and_grads") else 4
    moment = 2 if bf16.get("bf16_optimizer_states") else 4
    moments = 3 if optimizer.get("amsgrad") else 2
    files = (1 + moments) * ranks
    return Need(parameters * (master + moments * moment) + files * _HEADER, files + 2)  # manifest and folder


def check_free_space(run_dir: Path, need: Need, keep_last: int) -> None:
    """Raise `ConfigError` where the checkpoints that a run keeps, and the one it writes meanwhile, do not fit.

    Checkpoints that are there already have their place, and leftovers of a killed process are going to be swept.
    """
    times = max(1, keep_last + 1 - len(find_checkpoints(run_dir)))
    swept = sum(map(_bytes_in, find_leftovers(run_dir)))
    what = "1 checkpoint needs" if times == 1 else f"{times} checkpoints need"
    shortage = _shortage(_existing(run_dir / CHECKPOINTS), what, need * times, swept)
    if shortage:
        raise ConfigError(shortage)


def check_disk_space(folder: Path, need: Need) -> None:
    """Raise OSError where one more checkpoint does not fit."""
    shortage = _shortage(folder, "1 checkpoint needs", need)
    if shortage:
        raise OSError(shortage)


def _shortage(folder: Path, what: str, need: Need, swept: int = 0) -> str | None:
    """What the file system of a folder lacks, if anything; `swept` bytes are going to be free."""
    free = _free(folder)
    if free.size + swept < need.size:
        return f"{folder}: {what} {_bytes(need.size)}, and {_bytes(free.size + swept)} are free there"
    if free.files < need.files:
        return f"{folder}: {what} {need.files} files, and {free.files} inodes are left there"
    return None


def _bytes_in(leftover: Path) -> int:
    try:
        return sum(file.stat().st_size for file in leftover.rglob("*"))
    except OSError:  # the run is at work, and has committed it in this moment, or it cannot be read
        return 0


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _free(folder: Path) -> Need:
    status = os.statvfs(folder)
    counts_inodes = status.f_files > 0  # btrfs and some network file systems make them as they go
    return Need(status.f_bavail * status.f_frsize, status.f_favail if counts_inodes else 2**62)


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.2f} MiB"
