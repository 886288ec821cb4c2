"""What counts as a checkpoint, which one a run continues from, and which ones are removed."""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tinyllama_ds.checkpoint.format import (
    checkpoint_name,
    choose_checkpoint,
    find_checkpoints,
    read_manifest,
    resolve_checkpoint,
    verify_checkpoint,
)
from tinyllama_ds.checkpoint.retention import Retention, remove_old_checkpoints, sweep_leftovers
from tinyllama_ds.checkpoint.save import write_file
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.layout import reject_unusable_directory

MANIFEST = {
    "progress": {"step": 4, "position": 32, "tokens": 1024},
    "world_size": 2,
    "zero_stage": 3,
    "dtype": "float32",
    "model": {},
    "run": {},
    "parameters": {"weight": [3]},
    "optimizer": {"type": "AdamW", "step": 4, "groups": []},
    "format": 3,
    "files": {"weights.safetensors": {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}},
}


def commit(run_dir: Path, name: str, **changes: object) -> Path:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"abc")
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | changes))
    return folder


def test_the_newest_is_found_by_number(tmp_path: Path) -> None:
    """Past 999,999 steps, and past 99,999,999 too, where names sort wrongly."""
    steps = [900, 100_000_000, 99_999_999, 1_000_000, 999_999]
    folders = {step: commit(tmp_path, checkpoint_name(step)) for step in steps}
    assert find_checkpoints(tmp_path) == [folders[step] for step in sorted(steps)]
    assert resolve_checkpoint(tmp_path) == folders[100_000_000]
    assert resolve_checkpoint(folders[900]) == folders[900]


@pytest.mark.parametrize("content", ["", "step_00000099", "../../elsewhere", "/etc"])
def test_a_file_named_latest_is_not_believed(content: str, tmp_path: Path) -> None:
    """Nothing here writes one; other programs do."""
    folder = commit(tmp_path, "step_00000004")
    for place in (tmp_path, folder.parent):
        (place / "latest").write_text(content)
    assert choose_checkpoint(tmp_path).checkpoint == resolve_checkpoint(tmp_path) == folder


def test_a_folder_without_a_manifest_is_not_a_checkpoint(tmp_path: Path) -> None:
    (commit(tmp_path, "step_00000002") / "manifest.json").unlink()
    commit(tmp_path, ".step_00000003.partial")
    commit(tmp_path, "step_latest")
    assert find_checkpoints(tmp_path) == []
    with pytest.raises(ConfigError, match="holds no checkpoint; expected a run directory"):
        resolve_checkpoint(tmp_path)


def cut_short(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"ab")


def flip_a_byte(folder: Path) -> None:
    (folder / "weights.safetensors").write_bytes(b"abd")


def delete(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


def climb(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("weights.safetensors", "../weights.safetensors"))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut_short, "weights.safetensors: missing or size mismatch \\(expected 3 bytes"),
    (flip_a_byte, "weights.safetensors: its SHA-256 is not the one in manifest.json"),
    (delete, "weights.safetensors: missing or size mismatch"),
    (climb, "'../weights.safetensors' is not the name of a checkpoint's file"),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES)
def test_only_what_is_whole_verifies(damage: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    folder = commit(tmp_path, "step_00000004")
    assert verify_checkpoint(folder).progress.tokens == 1024
    damage(folder)
    with pytest.raises(ConfigError, match=sentence):
        verify_checkpoint(folder)


def test_storage_that_shows_everyone_as_owner_is_used(tmp_path: Path) -> None:
    """root_squash, CIFS, GCS-FUSE and volumes of Kubernetes show a fixed user, and mode 0777."""
    folder = commit(tmp_path, "step_00000004")
    for path in (*tmp_path.rglob("*"), tmp_path):
        path.chmod(0o777)
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345)
    assert verify_checkpoint(folder).progress.tokens == 1024
    reject_unusable_directory(tmp_path)


def test_the_newest_that_verifies_is_chosen_and_damaged_ones_are_quarantined(tmp_path: Path) -> None:
    good, *damaged = (commit(tmp_path, f"step_0000000{step}") for step in (2, 4, 6))
    for folder in damaged:
        flip_a_byte(folder)
    choice = choose_checkpoint(tmp_path)
    assert choice.checkpoint == good
    assert [str(folder) in damage for folder, damage in zip(reversed(damaged), choice.damages, strict=True)] == [
        True
    ] * 2
    assert find_checkpoints(tmp_path) == [good]
    assert sorted(path.name for path in (tmp_path / "quarantine").iterdir()) == ["step_00000004.0", "step_00000006.0"]
    flip_a_byte(commit(tmp_path, "step_00000006"))
    assert choose_checkpoint(tmp_path).checkpoint == good
    assert (tmp_path / "quarantine" / "step_00000006.1").is_dir()


def test_damaged_checkpoints_are_never_a_fresh_start(tmp_path: Path) -> None:
    assert choose_checkpoint(tmp_path).checkpoint is None
    folders = [commit(tmp_path, f"step_0000000{step}") for step in (2, 4)]
    for folder in folders:
        flip_a_byte(folder)
    with pytest.raises(ConfigError, match=r"none of 2 checkpoints verifies: .*step_00000004.*step_00000002"):
        choose_checkpoint(tmp_path)
    assert find_checkpoints(tmp_path) == folders, "nothing was moved"


def test_a_checkpoint_that_has_lost_its_manifest_is_damaged(tmp_path: Path) -> None:
    """In its place its step would not find room again."""
    older, newest = (commit(tmp_path, f"step_0000000{step}") for step in (2, 4))
    (newest / "manifest.json").unlink()
    assert choose_checkpoint(tmp_path).checkpoint == older
    assert not newest.exists()
    (older / "manifest.json").unlink()
    with pytest.raises(
        ConfigError, match=r"none of 1 checkpoints verifies: .*step_00000002/manifest.json: cannot be read"
    ):
        choose_checkpoint(tmp_path)


def test_a_file_is_readable_by_those_who_may_read_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    folder.chmod(0o750)
    write_file(folder / "rank_00000.master.safetensors", {"master/weight[0:3]": torch.zeros(3)})
    assert stat.S_IMODE((folder / "rank_00000.master.safetensors").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("version", "sentence"),
    [(99, "has format 99 and is known up to 3"), (2, "has format 2, .* with tinyllama-ds import-checkpoint")],
)
def test_a_checkpoint_of_a_different_version_is_neither_read_nor_moved(
    version: int, sentence: str, tmp_path: Path
) -> None:
    folders = [commit(tmp_path, "step_00000002"), commit(tmp_path, "step_00000004", format=version, new_key=1)]
    with pytest.raises(ConfigError, match=sentence):
        choose_checkpoint(tmp_path)
    assert find_checkpoints(tmp_path) == folders


def test_the_last_ones_and_one_for_every_so_many_tokens_stay(tmp_path: Path) -> None:
    for step in range(1, 11):
        progress = {"step": step, "position": 8 * step, "tokens": 256 * step}
        commit(tmp_path, f"step_{step:08d}", progress=progress)
        remove_old_checkpoints(tmp_path, Retention(keep_last=2, keep_tokens=768))
    assert [read_manifest(path).progress.step for path in find_checkpoints(tmp_path)] == [3, 6, 9, 10]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4, "and no trash"


def test_the_ends_of_stages_stay(tmp_path: Path) -> None:
    for step in range(1, 11):
        commit(tmp_path, f"step_{step:08d}", progress={"step": step, "position": 8 * step, "tokens": 256 * step})
        remove_old_checkpoints(tmp_path, Retention(2, 10**9, keep_steps=frozenset({4, 7})))
    assert [read_manifest(path).progress.step for path in find_checkpoints(tmp_path)] == [4, 7, 9, 10]


def test_leftovers_of_killed_processes_are_swept(tmp_path: Path) -> None:
    good = commit(tmp_path, "step_00000002")
    for name in (".step_00000004.partial", ".trash-step_00000001", ".mine"):
        commit(tmp_path, name)
    sweep_leftovers(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [".mine", good.name]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"progress": 3}'])
def test_broken_manifest_is_rejected(tmp_path: Path, content: str) -> None:
    folder = commit(tmp_path, "step_00000004")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match="not a checkpoint manifest"):
        read_manifest(folder)
