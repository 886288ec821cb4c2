"""What counts as a checkpoint, and which one is the newest."""

import json
from pathlib import Path

import pytest

from tinyllama_ds.errors import Refusal
from tinyllama_ds.training.checkpoint import find_checkpoints, read_manifest, resolve_checkpoint

MANIFEST = {
    "progress": {"step": 4, "position": 32, "tokens": 1024},
    "world_size": 2,
    "zero_stage": 3,
    "dtype": "float32",
    "model": {},
    "run": {},
    "files": {"weights.pt": 3},
}


def commit(run_dir: Path, name: str, **changes: object) -> Path:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"abc")
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | changes))
    return folder


def test_the_newest_is_found_by_number(tmp_path: Path) -> None:
    """Past 99,999,999 steps too, where names sort wrongly."""
    names = ["step_00000900", "step_100000000", "step_99999999", "step_00001000"]
    folders = [commit(tmp_path, name) for name in names]
    assert find_checkpoints(tmp_path) == [folders[0], folders[3], folders[2], folders[1]]
    assert resolve_checkpoint(tmp_path) == folders[1]
    assert resolve_checkpoint(folders[3]) == folders[3]


def test_what_has_no_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (commit(tmp_path, "step_00000002") / "manifest.json").unlink()
    commit(tmp_path, ".step_00000003.partial")
    commit(tmp_path, "step_latest")
    assert find_checkpoints(tmp_path) == []
    with pytest.raises(Refusal, match="holds no checkpoint; expected a run directory"):
        resolve_checkpoint(tmp_path)


def test_manifest_is_checked_against_the_files(tmp_path: Path) -> None:
    folder = commit(tmp_path, "step_00000004")
    assert read_manifest(folder).progress.tokens == 1024
    (folder / "weights.pt").write_bytes(b"ab")
    with pytest.raises(Refusal, match=r"weights.pt: is missing or has another size than the 3 bytes"):
        read_manifest(folder)
    (folder / "weights.pt").unlink()
    with pytest.raises(Refusal, match="weights.pt: is missing"):
        read_manifest(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"progress": 3}'])
def test_broken_manifest_is_refused(tmp_path: Path, content: str) -> None:
    folder = commit(tmp_path, "step_00000004")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(Refusal, match="not a checkpoint manifest"):
        read_manifest(folder)
