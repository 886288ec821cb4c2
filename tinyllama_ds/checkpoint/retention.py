"""Which checkpoints are retained, and how the others are removed."""

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import remove
from tinyllama_ds.layout import CHECKPOINTS

_LEFTOVER = re.compile(r"\.(step_\d{8,}\.(partial|whole|dry_run)|trash-step_\d{8,})")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are retained: the newest `keep_last`, one per `keep_tokens` tokens, and `keep_steps`."""

    keep_last: int
    keep_tokens: int
    keep_steps: frozenset[int] = frozenset()


def remove_old_checkpoints(run_dir: Path, retention: Retention) -> None:
    """Remove what the retention does not keep. What cannot be removed stays; training does not stop for it."""
    kept_multiples: set[int] = set()
    for checkpoint in find_checkpoints(run_dir)[: -retention.keep_last]:
        try:
            progress = read_manifest(checkpoint).progress
        except ConfigError:
            continue  # damaged since it was committed: keep it for inspection
        if progress.step in retention.keep_steps:
            continue
        multiple = progress.tokens // retention.keep_tokens
        if multiple > 0 and multiple not in kept_multiples:
            kept_multiples.add(multiple)  # the first one past each multiple
            continue
        with suppress(OSError):
            remove(_move_to_trash(checkpoint))


def _move_to_trash(checkpoint: Path) -> Path:
    trash = checkpoint.with_name(f".trash-{checkpoint.name}")
    remove(trash)
    checkpoint.rename(trash)
    return trash


def find_leftovers(run_dir: Path) -> list[Path]:
    """What a killed process left of a save or a removal."""
    return [path for path in (run_dir / CHECKPOINTS).glob(".*") if _LEFTOVER.fullmatch(path.name)]


def sweep_leftovers(run_dir: Path) -> None:
    """Remove what a killed process left. Called by one rank before training."""
    for path in (*find_leftovers(run_dir), *run_dir.glob(".*.partial")):
        remove(path)
