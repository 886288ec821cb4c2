"""Variants that begin with one run's checkpoint: what was trained is what a run of its own would have trained on."""

import hashlib
import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from forked import pretrain
from launching import SEQUENCE_LENGTH, STEP_TOKENS, Finished, read_series, write_deepspeed_config
from test_resume import tensors_of

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.fault_injection import FAULT_VARIABLE
from tinyllama_ds.health.guard import extend_chain
from tinyllama_ds.run.resolve import Options, resolve_run
from tinyllama_ds.train.batches import HashingLoader, micro_batches

BASIC, DOMAIN, COOLDOWN = 4, 4, 2  # steps; the last ones four times as large
STAGES = """
[[stages]]
name = "basic"
tokens = {basic}
global_batch_tokens = {batch}
weights = {{ slimpajama = 1.0 }}
[[stages]]
name = "domain"
tokens = {domain}
global_batch_tokens = {batch}
weights = {{ {weights} }}
ramp_tokens = {ramp}
[[stages]]
name = "cooldown"
tokens = {cooldown}
global_batch_tokens = {large_batch}
weights = {{ {weights} }}
[intervals]
log_steps = 1
evaluate_tokens = {domain}
save_tokens = {save}
"""
GENERAL, MIXED = "slimpajama = 1.0", "slimpajama = 0.6, starcoderdata = 0.4"


def write_variant(path: Path, weights: str, basic: int = BASIC) -> Path:
    """Three stages in the proportions of v1.1, saved in the middle of the second one."""
    head = (
        f'name = "{path.stem}"\nmodel = "test"\nsequence_length = {SEQUENCE_LENGTH}\nseed = 1\nvalidation_samples = 5'
    )
    path.write_text(head + STAGES.format(
        basic=basic * STEP_TOKENS, domain=DOMAIN * STEP_TOKENS, cooldown=COOLDOWN * 4 * STEP_TOKENS, weights=weights,
        batch=STEP_TOKENS, large_batch=4 * STEP_TOKENS, ramp=2 * STEP_TOKENS, save=6 * STEP_TOKENS,
    ))  # fmt: skip
    return path


@dataclass(frozen=True)
class Family:
    """A general run to its end, and the recipe of a variant."""

    root: Path
    data: Path
    config: Path
    general: Path
    mixed: Path

    @property
    def parent(self) -> Path:
        return self.root / "general"


@pytest.fixture(scope="module")
def family(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    root = tmp_path_factory.mktemp("family")
    config = write_deepspeed_config(root / "ds.json", 3, micro_batch=4)
    general, mixed = write_variant(root / "general.toml", GENERAL), write_variant(root / "mixed.toml", MIXED)
    finished = pretrain(general, config, data_dir, root / "general", 2)
    assert finished.returncode == 0, finished.stderr
    return Family(root, data_dir, config, general, mixed)


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def chain_of_a_run_of_its_own(family: Family, recipe: Path) -> str:
    """The hash chain over all samples that the recipe trains on from its beginning, on one rank, without training."""
    resolved = resolve_run(Options(str(recipe), family.config, family.data, family.root / "none"), 1, "cpu", bf16=False)
    batches = HashingLoader(micro_batches(resolved, DistributedInfo(0, 0, 1, torch.device("cpu")), 0))
    chain = ""
    for step in resolved.plan.steps(0):
        for _ in range(step.batch // resolved.micro_batch):
            next(batches)
        chain = extend_chain(chain, step.number, batches.take_digest())
    return chain


def start_branch(family: Family, config: Path, run_dir: Path, ranks: int, **environment: str) -> Finished:
    branch_from = ("--branch-from", str(family.parent))
    return pretrain(family.mixed, config, family.data, run_dir, ranks, *branch_from, **environment)


@pytest.fixture(scope="module")
def killed_branch(family: Family) -> tuple[Path, str]:
    """On another number of ranks, ZeRO stage and micro batch; killed in its second stage, once it had saved."""
    branch, config = family.root / "branch", write_deepspeed_config(family.root / "other.json", 1, micro_batch=8)
    before = contents(family.parent)
    killed = start_branch(family, config, branch, 1, **{FAULT_VARIABLE: f"save.ended:0:{BASIC + 2}:kill"})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = start_branch(family, config, branch, 1)
    assert finished.returncode == 0, finished.stderr
    assert contents(family.parent) == before, "the parent is only read"
    return branch, killed.stdout + finished.stdout


def test_a_branch_on_another_layout_is_killed_and_goes_on(family: Family, killed_branch: tuple[Path, str]) -> None:
    branch, said = killed_branch
    origin = find_checkpoints(family.parent)[0]
    assert f"branched off at step {BASIC} ({BASIC * STEP_TOKENS:,} tokens) of {origin}" in said
    assert said.count("branched off") == 1
    assert f"resumed at step {BASIC + 2}" in said, "from its own checkpoint"
    last = read_manifest(find_checkpoints(branch)[-1])
    assert last.progress.step == BASIC + DOMAIN + COOLDOWN
    assert last.progress.tokens == (BASIC + DOMAIN + 4 * COOLDOWN) * STEP_TOKENS
    assert last.progress.chain == chain_of_a_run_of_its_own(family, family.mixed)
    parent = json.loads((branch / "run.json").read_text())["parent"]
    assert parent == last.run["parent"]
    assert (parent["checkpoint"], parent["step"]) == (str(origin), BASIC)
    assert parent["manifest_sha256"] == hashlib.sha256((origin / "manifest.json").read_bytes()).hexdigest()
    assert read_series(branch, "step")[0] == BASIC, "the validation that its curves begin with"


def test_a_branch_equals_a_run_of_its_own(family: Family, killed_branch: tuple[Path, str], tmp_path: Path) -> None:
    """On the layout of the parent bit for bit; on the other one, killed and resumed, to rounding."""
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    finished = pretrain(family.mixed, family.config, family.data, whole, 2)
    assert finished.returncode == 0, finished.stderr
    before = contents(family.parent)
    finished = start_branch(family, family.config, branch, 2)
    assert finished.returncode == 0, finished.stderr
    assert contents(family.parent) == before, "the parent is only read"
    expected, found = (tensors_of(find_checkpoints(path)[-1]) for path in (whole, branch))
    assert found.keys() == expected.keys()
    assert [place for place in found if not torch.equal(found[place], expected[place])] == []
    for path, tolerance in ((branch, 0), (killed_branch[0], 1e-5)):
        for figure, factor in (("Train/Loss", 1), ("Train/GradNorm", 10), ("Train/LearningRate", 0)):
            later = read_series(whole, figure)[BASIC:]
            assert read_series(path, figure) == pytest.approx(later, rel=factor * tolerance, abs=0), figure
    progress = [read_manifest(find_checkpoints(path)[-1]).progress for path in (whole, branch, killed_branch[0])]
    assert progress[0] == progress[1] == progress[2]


@pytest.mark.all_faults
def test_a_damaged_parent_is_rejected_and_left_alone(family: Family, tmp_path: Path) -> None:
    parent = tmp_path / "general"
    shutil.copytree(family.parent, parent)
    shard = next(find_checkpoints(parent)[0].glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    before = contents(parent)
    finished = pretrain(
        family.mixed, family.config, family.data, tmp_path / "branch", 1, "--branch-from", str(parent)
    )  # fmt: skip
    assert finished.returncode == EXIT_CONFIG, finished.stderr
    assert f"{shard}: its SHA-256 is not the one in manifest.json" in finished.stderr
    assert contents(parent) == before
