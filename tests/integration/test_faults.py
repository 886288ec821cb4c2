"""Real processes, killed, stopped and lied to: each run ends with the samples and the tensors of a run left alone.

The fast part runs by default, all of it with `--all-faults`.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import forked
import launching
import psutil
import pytest
import torch
from forked import tinyllama_ds
from launching import (
    TIMEOUT,
    Finished,
    pretrain_command,
    rank_process,
    read_series,
    read_series_so_far,
    wait_until,
    write_deepspeed_config,
    write_recipe,
)
from test_resume import tensors_of

from tinyllama_ds.checkpoint.format import (
    Progress,
    find_checkpoints,
    newest_progress,
    read_manifest,
    verify_checkpoint,
)
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_RESTART
from tinyllama_ds.fault_injection import FAULT_VARIABLE
from tinyllama_ds.launch.lock import hold_run
from tinyllama_ds.train.stop import STOP_FILE

STEPS, SAVE_EVERY = 6, 2
ORPHAN_SECONDS = 60  # less than the long runs take that would be left
# Phases of a save that every rank goes through, and those of the commit, which is rank 0's; in order.
RANK_PHASES = ("copy", "begin", "mid_shard", "after_shard", "agreed", "ended")
COMMIT_PHASES = ("before_manifest", "before_rename", "after_rename")
slow = pytest.mark.all_faults


@dataclass(frozen=True)
class Setup:
    """A small run on two ranks under ZeRO-3, and how it ends when it is left alone."""

    recipe: Path
    config: Path
    data: Path
    finished: Path  # its run directory
    progress: Progress
    tensors: dict[str, torch.Tensor]

    def start(self, run_dir: Path, **environment: str) -> Finished:
        """Its ranks alone."""
        return forked.pretrain(self.recipe, self.config, self.data, run_dir, 2, **environment)

    def launch(self, run_dir: Path, *more: str) -> Finished:
        """With launcher and supervisor."""
        return launching.pretrain(self.recipe, self.config, self.data, run_dir, 2, *more)

    def command(self, run_dir: Path, *more: str) -> list[str]:
        return pretrain_command(self.recipe, self.config, self.data, run_dir, 2, *more)

    def assert_same_end(self, run_dir: Path) -> None:
        """The hash chain over all samples and every tensor are those of the run that was left alone."""
        last = find_checkpoints(run_dir)[-1]
        assert verify_checkpoint(last).progress == self.progress
        found = tensors_of(last)
        assert found.keys() == self.tensors.keys()
        assert [place for place in found if not torch.equal(found[place], self.tensors[place])] == []
        assert [path.name for path in (run_dir / "checkpoints").glob(".*")] == [], "leftovers"


@pytest.fixture(scope="module")
def setup(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    root = tmp_path_factory.mktemp("reference")
    recipe = write_recipe(root / "small.toml", STEPS, save_every=SAVE_EVERY)
    recipe.write_text(recipe.read_text() + "keep_last = 2\n")
    config = write_deepspeed_config(root / "ds.json", 3, micro_batch=4)
    finished = forked.pretrain(recipe, config, data_dir, root / "run", 2)
    assert finished.returncode == 0, finished.stderr
    last = find_checkpoints(root / "run")[-1]
    return Setup(recipe, config, data_dir, root / "run", read_manifest(last).progress, tensors_of(last))


def cases(points: dict[str, bool]) -> list:
    return [pytest.param(fault, id=fault, marks=() if is_fast else slow) for fault, is_fast in points.items()]


KILLS = {
    f"save.{point}:{rank}:4:kill"
    for ranks, points in (((0, 1), RANK_PHASES), ((0,), COMMIT_PHASES))
    for rank in ranks
    for point in points
} | {"purge.mid:0:2:kill"}
FAST_KILLS = {"save.mid_shard:1:4:kill", "save.before_rename:0:4:kill", "save.after_rename:0:4:kill"}
# Ends of a rank that the supervisor has to see. The last one is of the thread that reads ahead, and ends its rank.
DEATHS = {
    "save.mid_shard:1:4:kill": False,
    "save.after_rename:0:4:kill": False,
    "step.before_optimizer:0:4:kill": True,
    "step.begin:1:4:kill": False,
    "data.read:1:4:raise": False,
}
STUCK = {"step.begin:1:3:stop": True, "step.begin:0:3:spin": False, "data.read:1:3:block": False}


def committed_after(fault: str) -> set[int]:
    """The checkpoints that a run can go on from when the save of step 4 was cut off there."""
    if fault.startswith("purge"):
        return {STEPS}
    if "after_rename" in fault or "ended" in fault:
        return {4}
    meanwhile = "agreed:1" in fault or not fault.startswith("save")  # rank 0 may be committing
    return {2, 4} if meanwhile else {2}


@pytest.mark.parametrize("fault", cases(DEATHS))
def test_a_death_costs_steps_and_nothing_else(
    fault: str, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank dies in the middle of a step or of a save; the supervisor starts the run again."""
    monkeypatch.setenv(FAULT_VARIABLE, fault)
    finished = setup.launch(tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    said = re.search(r"at checkpoint (\d+); restarting in", finished.stderr)
    assert said, finished.stderr
    assert int(said[1]) in committed_after(fault)
    assert f"resumed at step {said[1]}" in finished.stdout
    assert re.search(r"goodput [\d.]+%: .* and 1 restarts included", finished.stdout)
    setup.assert_same_end(tmp_path / "run")


@pytest.mark.parametrize("fault", cases({fault: fault in FAST_KILLS for fault in sorted(KILLS)}))
def test_a_kill_in_any_phase_of_a_save_leaves_one_that_is_whole(fault: str, setup: Setup, tmp_path: Path) -> None:
    """Ranks alone, started again by hand: what matters here is on the disk."""
    killed = setup.start(tmp_path / "run", **{FAULT_VARIABLE: fault})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    committed, _ = newest_progress(tmp_path / "run")
    assert committed in committed_after(fault)
    again = setup.start(tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {committed}" in again.stdout
    setup.assert_same_end(tmp_path / "run")


@pytest.mark.parametrize("fault", cases(STUCK))
def test_a_stuck_rank_is_noticed_and_its_stacks_are_shown(
    fault: str, setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FAULT_VARIABLE, fault)
    finished = setup.launch(tmp_path / "run", "--step-timeout", "20")  # more than a save takes on a busy machine
    assert finished.returncode == 0, finished.stderr
    assert "has been training at step 3 for 20 s; stacks of all ranks" in finished.stderr
    assert "in _act" in finished.stderr, "the stack of the stuck rank"
    setup.assert_same_end(tmp_path / "run")


PHASES = {
    "start:1:0:exhaust:always": "start-up",
    "step.begin:0:0:exhaust:always": "training step 1",
    "step.before_optimizer:1:4:exhaust:always": "training step 5",
}


@pytest.mark.parametrize("fault", cases({fault: phase == "training step 5" for fault, phase in PHASES.items()}))
def test_out_of_memory_is_said_once_and_not_tried_again(fault: str, setup: Setup, tmp_path: Path) -> None:
    """One rank has no room, while the other waits for it in a collective. PyTorch's own exception, without a GPU."""
    finished = setup.start(tmp_path / "run", **{FAULT_VARIABLE: fault})
    assert finished.returncode == EXIT_CONFIG, finished.stderr
    said = re.findall("tinyllama-ds: .*", finished.stderr)
    assert len(said) == 1, finished.stderr
    rank = fault.split(":")[1]
    place = f"rank {rank} on {socket.gethostname()} ran out of memory in {PHASES[fault]}, "
    assert place in said[0]
    assert re.search(rf"GiB at the peak; try a smaller train_micro_batch_size_per_gpu .* in {setup.config}", said[0])
    again = setup.start(tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert ("resumed at step" in again.stdout) == (PHASES[fault] == "training step 5")
    setup.assert_same_end(tmp_path / "run")


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def swap_with_rank_0(shard: Path) -> None:
    """Both are whole and in place, and yet not what they ought to be."""
    other = shard.with_name(shard.name.replace("rank_00001", "rank_00000"))
    shard.rename(shard.with_name("aside"))
    other.rename(shard)
    shard.with_name("aside").rename(other)


DAMAGES = {
    "flipped byte": flip_a_byte,
    "cut short": lambda file: os.truncate(file, 100),
    "deleted": lambda file: file.unlink(),
    "swapped with another rank's": swap_with_rank_0,
}


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=() if name == "flipped byte" else slow) for name in DAMAGES]
)
def test_a_damaged_checkpoint_is_quarantined(damage: str, setup: Setup, tmp_path: Path) -> None:
    shutil.copytree(setup.finished, tmp_path / "run")
    newest = find_checkpoints(tmp_path / "run")[-1]
    shard = sorted(newest.glob("*.master.safetensors"))[1]
    DAMAGES[damage](shard)
    finished = setup.start(tmp_path / "run")
    assert finished.returncode == 0, finished.stderr
    assert re.search(f"moved to quarantine: {newest}/.*.safetensors: ", finished.stderr), finished.stderr
    assert f"resumed at step {STEPS - SAVE_EVERY}" in finished.stdout
    assert (tmp_path / "run" / "quarantine" / f"{newest.name}.0").is_dir()
    setup.assert_same_end(tmp_path / "run")


def test_damaged_checkpoints_alone_are_rejected(setup: Setup, tmp_path: Path) -> None:
    shutil.copytree(setup.finished, tmp_path / "run")
    for checkpoint in find_checkpoints(tmp_path / "run"):
        flip_a_byte(next(checkpoint.glob("*.safetensors")))
    finished = setup.start(tmp_path / "run")
    assert finished.returncode == EXIT_CONFIG
    assert "none of 2 checkpoints verifies" in finished.stderr
    assert len(find_checkpoints(tmp_path / "run")) == 2


def start_in_background(setup: Setup, run_dir: Path, save_every: int = 5000, sign: str = "") -> subprocess.Popen:
    """A long run, once it is training, or once a file of its directory is there."""
    recipe = write_recipe(run_dir.parent / "long.toml", 5000, save_every=save_every)
    command = [str(recipe) if part == str(setup.recipe) else part for part in setup.command(run_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def is_there() -> bool:
        assert process.poll() is None, process.communicate()[1]
        return (run_dir / sign).exists() if sign else bool(read_series_so_far(run_dir, "Train/Loss"))

    wait_until(is_there, "it does not train")
    return process


@pytest.mark.parametrize(
    "how",
    ["SIGTERM to one rank", *(pytest.param(how, marks=slow) for how in ("SIGTERM", "SIGINT", "SIGUSR1", "stop file"))],
)
def test_a_graceful_stop_loses_nothing(how: str, setup: Setup, tmp_path: Path) -> None:
    supervisor = start_in_background(setup, tmp_path / "run")
    family = psutil.Process(supervisor.pid).children(recursive=True)
    if how == "stop file":
        (tmp_path / "run" / "stop").touch()
    elif how.endswith("one rank"):
        rank = rank_process(supervisor, 1)
        assert rank is not None
        rank.terminate()
    else:
        supervisor.send_signal(getattr(signal, how))
    _, errors = supervisor.communicate(timeout=TIMEOUT)
    assert supervisor.returncode == EXIT_RESTART, errors
    assert "did not stop by themselves" not in errors, "in the time that a scheduler leaves"
    assert psutil.wait_procs(family, timeout=ORPHAN_SECONDS)[1] == [], "orphans"
    saved = verify_checkpoint(find_checkpoints(tmp_path / "run")[-1]).progress
    assert saved.step == max(read_series(tmp_path / "run", "step")), "the step that was trained last"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"


@slow
def test_a_stop_waits_for_the_save_that_is_under_way(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 is slow to write; both that save and the one of the stop are committed."""
    monkeypatch.setenv(FAULT_VARIABLE, "save.mid_shard:1:20:pause")
    partial = "checkpoints/.step_00000020.partial"
    supervisor = start_in_background(setup, tmp_path / "run", save_every=20, sign=partial)
    supervisor.terminate()
    said, errors = supervisor.communicate(timeout=TIMEOUT)
    assert supervisor.returncode == EXIT_RESTART, errors
    steps = [verify_checkpoint(path).progress.step for path in find_checkpoints(tmp_path / "run")]
    assert steps[0] == 20
    assert steps[-1] == max(read_series(tmp_path / "run", "step"))
    assert said.count(f"step {steps[-1]}: checkpoint saved") == 1
    assert list((tmp_path / "run" / "checkpoints").glob(".*")) == []


@slow
def test_a_stop_during_the_first_step_is_kept_for_its_end(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which compiles, and takes long."""
    monkeypatch.setenv(FAULT_VARIABLE, "step.begin:0:0:pause")
    supervisor = start_in_background(setup, tmp_path / "run", sign="run.json")
    supervisor.terminate()
    said, errors = supervisor.communicate(timeout=TIMEOUT)
    assert supervisor.returncode == EXIT_RESTART, errors
    assert [verify_checkpoint(path).progress.step for path in find_checkpoints(tmp_path / "run")] == [1]
    assert said.count("step 1: checkpoint saved") == 1


@slow
def test_a_second_signal_is_quick(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is stuck, and whoever stops the run does not want to wait for it."""
    monkeypatch.setenv(FAULT_VARIABLE, "step.begin:1:10:block")
    supervisor = start_in_background(setup, tmp_path / "run")
    family = psutil.Process(supervisor.pid).children(recursive=True)
    supervisor.terminate()
    wait_until((tmp_path / "run" / "stop").exists, "the first signal is not noted")
    assert supervisor.poll() is None
    supervisor.terminate()
    _, errors = supervisor.communicate(timeout=15)
    assert supervisor.returncode == EXIT_RESTART
    assert "the ranks did not stop in time; the last checkpoint is kept" in errors
    assert psutil.wait_procs(family, timeout=ORPHAN_SECONDS)[1] == [], "orphans"


def test_a_stop_ends_in_a_save_and_the_next_start_ends_equal(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o750)
    (tmp_path / "run" / STOP_FILE).touch()
    finished = setup.start(tmp_path / "run")
    assert finished.returncode == EXIT_RESTART, finished.stderr
    assert newest_progress(tmp_path / "run")[0] == 1
    (tmp_path / "run" / STOP_FILE).unlink()
    resumed = setup.start(tmp_path / "run")
    assert resumed.returncode == 0, resumed.stderr
    setup.assert_same_end(tmp_path / "run")


def test_one_writer_and_no_orphans_when_the_supervisor_is_killed(setup: Setup, tmp_path: Path) -> None:
    supervisor = start_in_background(setup, tmp_path / "run")
    second = tinyllama_ds(*replace(setup, recipe=tmp_path / "long.toml").command(tmp_path / "run")[3:])
    assert second.returncode == EXIT_CONFIG
    assert f"is in use by process {supervisor.pid} on host" in second.stderr
    family = psutil.Process(supervisor.pid).children(recursive=True)
    supervisor.kill()
    supervisor.communicate(timeout=ORPHAN_SECONDS)
    assert psutil.wait_procs(family, timeout=ORPHAN_SECONDS)[1] == [], "orphans"
    with hold_run(tmp_path / "run"):
        pass


@slow
def test_an_export_that_is_killed_leaves_no_folder(setup: Setup, tmp_path: Path) -> None:
    output, partial = tmp_path / "hf", tmp_path / ".hf.partial"
    process = subprocess.Popen([sys.executable, "-m", "tinyllama_ds.cli", "export", str(setup.finished), str(output)])
    wait_until(lambda: partial.exists() or process.poll() is not None, "it does not begin")
    process.kill()
    process.wait()
    assert not output.exists()
    finished = tinyllama_ds("export", setup.finished, output)
    assert finished.returncode == 0, finished.stderr
    assert (output / "model.safetensors").is_file()
    assert not partial.exists()


def test_a_damaged_checkpoint_is_not_exported(setup: Setup, tmp_path: Path) -> None:
    shutil.copytree(setup.finished, tmp_path / "run")
    shard = next(find_checkpoints(tmp_path / "run")[-1].glob("*.safetensors"))
    flip_a_byte(shard)
    finished = tinyllama_ds("export", tmp_path / "run", tmp_path / "hf")
    assert finished.returncode == EXIT_CONFIG
    assert f"{shard}: its SHA-256 is not the one in manifest.json" in finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
