"""What counts as a checkpoint, which one a run continues from, and which ones are removed."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tinyllama_ds.checkpoint.format import (
    checkpoint_name,
    choose_checkpoint,
    consolidated_weights,
    find_checkpoints,
    read_manifest,
    resolve_checkpoint,
    verify_checkpoint,
)
from tinyllama_ds.checkpoint.retention import Retention, remove_old_checkpoints, sweep_leftovers
from tinyllama_ds.errors import ConfigError

MANIFEST = {
    "progress": {"step": 4, "position": 32, "tokens": 1024},
    "world_size": 2,
    "zero_stage": 3,
    "dtype": "float32",
    "model": {},
    "run": {},
    "files": {"weights.pt": {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}},
}


def commit(run_dir: Path, name: str, **changes: object) -> Path:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"abc")
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


def test_what_has_no_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (commit(tmp_path, "step_00000002") / "manifest.json").unlink()
    commit(tmp_path, ".step_00000003.partial")
    commit(tmp_path, "step_latest")
    assert find_checkpoints(tmp_path) == []
    with pytest.raises(ConfigError, match="holds no checkpoint; expected a run directory"):
        resolve_checkpoint(tmp_path)


def cut_short(folder: Path) -> None:
    (folder / "weights.pt").write_bytes(b"ab")


def flip_a_byte(folder: Path) -> None:
    (folder / "weights.pt").write_bytes(b"abd")


def delete(folder: Path) -> None:
    (folder / "weights.pt").unlink()


def open_to_the_group(folder: Path) -> None:
    (folder / "weights.pt").chmod(0o664)


def open_the_folder(folder: Path) -> None:
    folder.chmod(0o777)


def give_away(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(folder / "weights.pt", 12345, -1)


def link_elsewhere(folder: Path) -> None:
    (folder / "weights.pt").rename(folder.parent / "elsewhere")
    (folder / "weights.pt").symlink_to(folder.parent / "elsewhere")


def climb(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("weights.pt", "../weights.pt"))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut_short, "weights.pt: is missing or has another size than the 3 bytes"),
    (flip_a_byte, "weights.pt: its SHA-256 is not the one in manifest.json"),
    (delete, "weights.pt: is missing"),
    (open_to_the_group, "weights.pt: can be written by other users"),
    (open_the_folder, "step_00000004: can be written by other users"),
    (give_away, "weights.pt: belongs to user 12345"),
    (link_elsewhere, "weights.pt: is a symbolic link"),
    (climb, "'../weights.pt' is not the name of a checkpoint's file"),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES)
def test_only_what_is_whole_and_ours_verifies(damage: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    folder = commit(tmp_path, "step_00000004")
    assert verify_checkpoint(folder).progress.tokens == 1024
    damage(folder)
    with pytest.raises(ConfigError, match=sentence):
        verify_checkpoint(folder)


def test_nothing_is_unpickled_before_it_verifies(tmp_path: Path) -> None:
    """A pickle that would create a file must not get the chance."""
    folder, canary = commit(tmp_path, "step_00000004", zero_stage=0), tmp_path / "canary"
    attack = b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    (folder / "mp_rank_00_model_states.pt").write_bytes(attack)
    (folder / "weights.pt").write_bytes(attack)
    with pytest.raises(ConfigError, match=r"weights.pt: is missing or has another size"):
        consolidated_weights(folder)
    assert not canary.exists()


def test_the_newest_that_verifies_is_chosen_and_damaged_ones_are_put_aside(tmp_path: Path) -> None:
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


def test_a_checkpoint_of_a_later_version_is_neither_read_nor_put_aside(tmp_path: Path) -> None:
    folders = [commit(tmp_path, "step_00000002"), commit(tmp_path, "step_00000004", format=99, new_key=1)]
    with pytest.raises(ConfigError, match="has format 99 and is known up to"):
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
def test_broken_manifest_is_refused(tmp_path: Path, content: str) -> None:
    folder = commit(tmp_path, "step_00000004")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match="not a checkpoint manifest"):
        read_manifest(folder)
