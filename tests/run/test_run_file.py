"""A run whose run.json did not survive a power loss."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from launching import BATCH, SEQUENCE_LENGTH, write_deepspeed_config, write_recipe

from tinyllama_ds.checkpoint.format import CheckpointManifest, OptimizerRecord, Progress, checkpoint_name
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.launch.supervisor import _read_state
from tinyllama_ds.layout import RUN_FILE
from tinyllama_ds.run.directory import check_run_directory, open_run_directory
from tinyllama_ds.run.resolve import Options, Run, resolve_run
from tinyllama_ds.run.run_file import read_run_file

damages = pytest.mark.parametrize("damage", [b"", bytes(20), b'{"recipe": {"na', b"[]", b'{"x": "\xff"}'], ids=range(5))


@pytest.fixture
def options(data_dir: Path, tmp_path: Path) -> Options:
    recipe = write_recipe(tmp_path / "small.toml", 10, save_every=5)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    return Options(str(recipe), config, data_dir, tmp_path / "run")


def resolve(options: Options) -> Run:
    return resolve_run(options, 2, "cpu", bf16=False)


def commit(run: Run, step: int) -> Path:
    """A checkpoint without tensors."""
    folder = run.run_dir / "checkpoints" / checkpoint_name(step)
    folder.mkdir(parents=True)
    progress = Progress(step, step * BATCH, step * BATCH * SEQUENCE_LENGTH)
    optimizer = OptimizerRecord("AdamW", step, [])
    manifest = CheckpointManifest(progress, 2, 3, "float32", {}, run.description, {}, optimizer, {})
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))
    return folder


@damages
def test_it_is_restored_from_the_newest_checkpoint(
    damage: bytes, options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    run = resolve(options)
    open_run_directory(run)
    path = run.run_dir / RUN_FILE
    whole = json.loads(path.read_text())
    older, newest = commit(run, 2), commit(run, 4)
    path.write_bytes(damage)
    again = resolve(options)
    assert check_run_directory(again) == newest
    assert capsys.readouterr().err == "", "said once, by the rank that restores it"
    assert open_run_directory(again, 4) == []
    assert capsys.readouterr().err == (
        f"tinyllama-ds: warning: {path}: was damaged, and is restored from {newest}, without its history\n"
    )
    assert json.loads(path.read_text()) == whole
    path.write_bytes(damage)
    (newest / "manifest.json").write_bytes(damage)
    held = read_run_file(run.run_dir)
    assert held is not None
    assert held.restored_from == older


@damages
def test_a_different_run_is_still_rejected(damage: bytes, options: Options, tmp_path: Path) -> None:
    run = resolve(options)
    open_run_directory(run)
    commit(run, 2)
    (run.run_dir / RUN_FILE).write_bytes(damage)
    write_recipe(tmp_path / "small.toml", 10, save_every=5, seed=2)
    with pytest.raises(ConfigError, match="run.json: holds a different run: recipe.seed is 1 there and 2 now"):
        check_run_directory(resolve(options))


@damages
def test_without_a_checkpoint_it_is_rejected(damage: bytes, options: Options) -> None:
    """Neither the logged metrics nor the parent of `--branch-from` are known."""
    run = resolve(options)
    open_run_directory(run)
    path = run.run_dir / RUN_FILE
    path.write_bytes(damage)
    with pytest.raises(
        ConfigError, match=rf"^{path}: is damaged, expected one JSON object, and there is no checkpoint to"
    ):
        resolve(options)
    assert path.read_bytes() == damage


def test_a_branch_keeps_its_parent(options: Options, tmp_path: Path) -> None:
    parent = resolve(replace(options, run_dir=tmp_path / "parent"))
    open_run_directory(parent)
    commit(parent, 4)
    branch = resolve(replace(options, branch_from=tmp_path / "parent"))
    open_run_directory(branch)
    commit(branch, 5)
    (branch.run_dir / RUN_FILE).write_bytes(b"")
    assert resolve(options).parent == branch.parent


@pytest.mark.parametrize("damage", [b"", bytes(64), b"[1]", b"3", b"{}", b'{"state": ["finished"]}'], ids=repr)
def test_a_damaged_status_is_ignored(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_bytes(damage)
    assert _read_state(tmp_path / "status.json") is None
