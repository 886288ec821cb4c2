"""Room for checkpoints, on real file systems that are too small."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_checkpoint import commit

from tinyllama_ds.checkpoint.disk_space import Need, check_disk_space, check_free_space, checkpoint_need
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.config import model_config

MIB = 2**20


BF16_STATES = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}


@pytest.mark.parametrize(
    ("config", "bytes_per_parameter"),
    [({}, 12), ({"bf16": {"enabled": True}}, 12), (BF16_STATES, 6), ({"optimizer": {"params": {"amsgrad": True}}}, 16)],
)
def test_the_size_of_a_checkpoint_is_arithmetic(config: dict, bytes_per_parameter: int) -> None:
    """13.2 GB for TinyLlama, at any ZeRO stage."""
    parameters = model_config("tinyllama-1.1b").num_parameters
    assert checkpoint_need(parameters, config, 16).size == pytest.approx(bytes_per_parameter * parameters, rel=1e-3)


def test_what_is_there_already_needs_no_more_room(tmp_path: Path, small_disk: Callable[..., Path]) -> None:
    """Four checkpoints with keep_last = 3; committed ones have their place, leftovers give theirs back."""
    disk, need = small_disk(size=7 * MIB), Need(2 * MIB, 6)
    sentence = rf"{disk}: 4 checkpoints need 8\.00 MiB, and [67]\.\d\d MiB are free there"
    with pytest.raises(ConfigError, match=sentence):
        check_free_space(disk / "run", need, keep_last=3)
    assert list(disk.iterdir()) == []
    commit(disk / "run", "step_00000002")
    check_free_space(disk / "run", need, keep_last=3)
    leftover = commit(disk / "run", ".step_00000004.partial")
    (leftover / "shard.safetensors").write_bytes(bytes(3 * MIB))
    check_free_space(disk / "run", need, keep_last=3)
    (leftover / "shard_of_a_run_at_work").symlink_to("committed_in_this_moment")
    with pytest.raises(ConfigError, match="3 checkpoints need"):
        check_free_space(disk / "run", need, keep_last=3)
    leftover.rename(leftover.with_name("mine"))
    with pytest.raises(ConfigError, match="3 checkpoints need"):
        check_free_space(disk / "run", need, keep_last=3)


def test_inodes_run_out_too(small_disk: Callable[..., Path]) -> None:
    disk = small_disk(size=64 * MIB, inodes=20)
    with pytest.raises(ConfigError, match="4 checkpoints need 24 files, and 19 inodes are left"):
        check_free_space(disk / "run", Need(2 * MIB, 6), keep_last=3)
    check_disk_space(disk, Need(2 * MIB, 6))
    for number in range(15):
        (disk / str(number)).touch()
    with pytest.raises(OSError, match="1 checkpoint needs 6 files, and 4 inodes are left"):
        check_disk_space(disk, Need(2 * MIB, 6))


def test_a_save_checks_the_space_before_it_writes(small_disk: Callable[..., Path]) -> None:
    disk = small_disk(size=4 * MIB)
    check_disk_space(disk, Need(2 * MIB, 6))
    (disk / "others").write_bytes(os.urandom(3 * MIB))
    with pytest.raises(OSError, match=r"1 checkpoint needs 2\.00 MiB, and [01]\.\d\d MiB are free there"):
        check_disk_space(disk, Need(2 * MIB, 6))
