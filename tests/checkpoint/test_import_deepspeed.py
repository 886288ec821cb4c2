"""What DeepSpeed itself saves, of every stage, is the same in our format; of ours before format 3 all else is too."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from forked import on_ranks
from test_layouts import BF16, FP32_SUMS, MODEL, MUON, STATES, Layout, assert_equal, slow, take_step
from test_layouts import save as save_ours

from tinyllama_ds.checkpoint.format import File, read_manifest, verify_checkpoint
from tinyllama_ds.checkpoint.import_deepspeed import import_checkpoint
from tinyllama_ds.checkpoint.retention import Retention
from tinyllama_ds.checkpoint.save import Saver, SaveSettings
from tinyllama_ds.cli import main
from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.errors import EXIT_CONFIG, ConfigError
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.train.engine import hard_exit, start_process_group, wrap

LAYOUTS = {
    "stage 3 in bf16": Layout(2, 3, BF16, {"sub_group_size": 30_000}),
    "stage 2": Layout(2, 2),
    "stage 1 with fp32 sums": Layout(2, 1, BF16, more=FP32_SUMS),
    "stage 1, aligned": Layout(2, 1, BF16, {"parameter_alignment": True}),
    "stage 0": Layout(1, 0),
    "stage 0 in bf16": Layout(2, 0, BF16),
    "states in bf16": Layout(2, 2, STATES),
    "Muon at stage 1": Layout(2, 1, BF16, more=MUON | FP32_SUMS),
    "Muon at stage 2": Layout(2, 2, BF16, more=MUON),
    "Muon at stage 3": Layout(2, 3, BF16, {"reduce_scatter": False}, MUON),
}


def save_both(root: Path, layout: Layout) -> None:
    """On every rank: two steps, then DeepSpeed's checkpoint and ours."""
    world = read_world()
    start_process_group(world)
    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    engine = wrap(build_model(MODEL, "sdpa", 1, dtype=dtype), layout.config(), 1.0)
    for number in range(2):
        take_step(engine, world, number)
    engine.save_checkpoint(str(root), tag="theirs", save_latest=False)
    save_ours(Saver(SaveSettings(root, Retention(9, 10**15), 1e9, MODEL, {}), world, lambda save: None), engine, 2)
    hard_exit(0)


def make(root: Path, layout: Layout) -> Path:
    """Returns DeepSpeed's folder."""
    finished = on_ranks(save_both, root, layout, ranks=layout.ranks)
    assert finished.returncode == 0, finished.stderr
    (root / "theirs").chmod(0o755)
    return root / "theirs"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("stage 3 in bf16", "stage 2") else slow) for n in LAYOUTS]
)
def test_deepspeeds_checkpoints_have_the_same_bits(name: str, tmp_path: Path) -> None:
    imported = import_checkpoint(make(tmp_path, LAYOUTS[name]), tmp_path / "run", MODEL)
    ours = tmp_path / "checkpoints" / "step_00000002"
    assert_equal(imported, ours)
    found, expected = verify_checkpoint(imported), read_manifest(ours)
    assert found.parameters == expected.parameters
    assert (found.optimizer.step, found.optimizer.counters) == (expected.optimizer.step, expected.optimizer.counters)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("stage_0"), Layout(1, 0))


def describe_in_format_2(folder: Path) -> None:
    """The manifest that such a checkpoint of ours has."""
    files = {}
    for path in folder.glob("*.pt"):
        files[path.name] = asdict(File(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()))
    probe = {"tokens": [1, 2], "segments": [0], "loss": 3.5, "dtype": "float32", "circumstances": {"world_size": 1}}
    manifest = {
        "progress": {"step": 7, "position": 56, "tokens": 1792, "chain": "ab"}, "world_size": 1, "zero_stage": 0,
        "dtype": "float32", "model": MODEL.to_dict(), "run": {"recipe": {"name": "small"}}, "files": files,
        "health": {"guard": {"skipped": 1}, "left_out": [[8, 15]], "probe": probe}, "format": 2,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "manifest.json").chmod(0o640)


def test_a_run_of_format_2_goes_on_with_all_that_it_knew(
    theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old" / "checkpoints" / "step_00000007"
    old.parent.mkdir(parents=True)
    theirs.rename(old)
    (tmp_path / "old" / "run.json").write_text("{}")
    try:
        describe_in_format_2(old)
        assert main(["export", str(tmp_path / "old"), str(tmp_path / "hf")]) == EXIT_CONFIG
        assert "has format 2, which is DeepSpeed's own; convert it to format 3 with tinyllama-ds import-checkpoint" in (
            capsys.readouterr().err
        )
        assert main(["import-checkpoint", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    finally:
        (old / "manifest.json").unlink()
        old.rename(theirs)
    output = capsys.readouterr()
    assert "unpickling" in output.err
    found = verify_checkpoint(tmp_path / "new" / "checkpoints" / "step_00000007")
    assert (found.progress.step, found.progress.chain, found.run) == (7, "ab", {"recipe": {"name": "small"}})
    assert found.health.left_out == [[8, 15]]
    assert found.health.probe is not None
    assert (found.health.probe.document_ids, found.health.probe.numerics_environment) == ([0], {"world_size": 1})
    assert (tmp_path / "new" / "run.json").read_text() == "{}"


def test_what_others_could_have_written_is_not_unpickled(theirs: Path, tmp_path: Path) -> None:
    shard = next(theirs.glob("*.pt"))
    shard.chmod(0o664)
    with pytest.raises(ConfigError, match="can be written by other users; expected at most mode 755"):
        import_checkpoint(theirs, tmp_path, MODEL)
    shard.chmod(0o640)
    describe_in_format_2(theirs)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=r"its SHA-256 is not the one in manifest\.json"):
        import_checkpoint(theirs, tmp_path, None)
