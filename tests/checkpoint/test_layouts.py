"""A checkpoint of any layout in an engine of any other: master weights and optimizer state have the same bits."""

import re
import runpy
from dataclasses import dataclass, field
from itertools import repeat
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import on_ranks

from tinyllama_ds.checkpoint.format import Health, Progress, checkpoint_name
from tinyllama_ds.checkpoint.fragments import MASTER, local_fragments
from tinyllama_ds.checkpoint.load import load_checkpoint
from tinyllama_ds.checkpoint.reader import CheckpointReader
from tinyllama_ds.checkpoint.retention import Retention
from tinyllama_ds.checkpoint.save import Saver, SaveSettings
from tinyllama_ds.config.run_plan import Step
from tinyllama_ds.distributed.world import DistributedInfo, read_world
from tinyllama_ds.model.config import model_config
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.train.batches import Batch
from tinyllama_ds.train.engine import hard_exit, start_process_group, wrap
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.step import train_step

MODEL = model_config("test")
T, BATCH = 32, 4
slow = pytest.mark.all_faults


@dataclass(frozen=True)
class Layout:
    """An engine of 1, 2 or 4 ranks."""

    ranks: int
    stage: int
    bf16: dict = field(default_factory=dict)
    zero: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)  # at the top level of DeepSpeed's JSON

    def config(self) -> dict:
        zero: dict = {"stage": self.stage}
        zero |= {"reduce_bucket_size": 20_000} if self.stage else {}
        zero |= (
            {"stage3_prefetch_bucket_size": 20_000, "stage3_param_persistence_threshold": 0} if self.stage == 3 else {}
        )
        params = {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "torch_adam": True}
        return {
            "train_micro_batch_size_per_gpu": BATCH // self.ranks, "gradient_accumulation_steps": 1,
            "gradient_clipping": 1.0, "timers": {"throughput": {"enabled": False}}, "bf16": self.bf16,
            "optimizer": {"type": "AdamW", "params": params}, "zero_optimization": zero | self.zero,
        } | self.more  # fmt: skip


ZERO_3 = {"stage3_prefetch_bucket_size": 20_000, "stage3_param_persistence_threshold": 0}
BF16, FP32_SUMS = {"enabled": True}, {"data_types": {"grad_accum_dtype": "fp32"}}
STATES = BF16 | {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
CPU = {"device": "cpu"}
FUSED = {"optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True, "fused": True}}}
MUON = {"optimizer": {"type": "Muon", "params": {
    "lr": 4e-4, "muon_lr": 0.02, "adam_lr": 4e-4, "momentum": 0.95, "betas": [0.9, 0.95], "weight_decay": 0.1,
    "torch_adam": True,
}}}  # fmt: skip

WHOLE = {"reduce_scatter": False}  # gradients, for Muon

# Each layout continues what the one before it has saved, and the first one continues its own save.
CHAINS = {
    "fp32": [Layout(2, 3), Layout(1, 1), Layout(2, 0), Layout(4, 3)],
    "bf16": [Layout(2, 1, BF16, more=FP32_SUMS), Layout(2, 3, BF16, {"stage3_param_persistence_threshold": 3000})],
    "more stages in fp32": [Layout(2, 0), Layout(4, 2), Layout(2, 1), Layout(1, 3)],
    "more stages in bf16": [Layout(2, 0, BF16), Layout(2, 2, BF16), Layout(1, 0, BF16, more=FUSED), Layout(4, 1, BF16)],
    "states in bf16": [Layout(2, 2, STATES), Layout(1, 3, STATES), Layout(2, 1, STATES)],
    "hpZ": [Layout(2, 3, BF16, {"zero_hpz_partition_size": 2}), Layout(1, 2, BF16)],
    "offload": [
        Layout(2, 3, BF16, {"offload_optimizer": CPU, "offload_param": CPU, "sub_group_size": 30_000}),
        Layout(2, 2, BF16, {"offload_optimizer": CPU}),
    ],
    "order of gradients": [
        Layout(2, 2, zero={"round_robin_gradients": True}), Layout(2, 1, zero={"parameter_alignment": True}),
    ],
    "Muon": [Layout(2, 1, BF16, more=MUON | FP32_SUMS), Layout(1, 0, BF16, more=MUON)],
    "Muon with momentum in bf16": [Layout(2, 3, BF16, WHOLE, MUON), Layout(2, 2, BF16, WHOLE, MUON)],
    "Muon in fp32": [Layout(ranks, stage, zero=WHOLE, more=MUON) for ranks, stage in ((2, 2), (1, 3), (2, 1), (1, 2))],
}  # fmt: skip


def train_and_save(root: Path, layout: Layout, first: Path | None) -> None:
    """On every rank: continue from a checkpoint, and save that at once, then after each of two steps."""
    world = read_world()
    start_process_group(world)
    torch.compiler.set_stance("force_eager")  # DeepSpeed compiles Muon's update for each shape
    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    engine = wrap(build_model(MODEL, "sdpa", 1, dtype=dtype), layout.config(), 1.0)
    saver = Saver(SaveSettings(root, Retention(9, 10**15), 1e9, MODEL, {}), world, lambda save: None)
    start = 0
    if first is not None:
        load_checkpoint(engine, first)
        start = engine.global_steps
        save(saver, engine, start)
    for number in range(start, start + 2):
        take_step(engine, world, number)
        save(saver, engine, number + 1)
        assert_masters_are_of_the_weights(engine, layout)
    hard_exit(0)


def take_step(engine: object, world: DistributedInfo, number: int) -> None:
    """The same samples on any number of ranks."""
    tokens = torch.randint(MODEL.vocab_size, (BATCH, T + 1), generator=torch.Generator().manual_seed(number))
    mine = tokens.chunk(world.size)[world.rank]
    step = Step(number, "only", 0, BATCH, 0, BATCH * T)
    train_step(engine, step, repeat(Batch(mine)), len(mine), world, PhaseClock(world.device))


def save(saver: Saver, engine: object, step: int) -> None:
    saver.save(engine, Progress(step, 0, 0), Health)
    saver.finish_or_raise()


def assert_masters_are_of_the_weights(engine: object, layout: Layout) -> None:
    """Below stage 3, where the weights are whole: each fragment has the values of its name and range, rounded."""
    if layout.stage < 3:
        weights = dict(engine.module.named_parameters())
        for fragment in local_fragments(engine):
            weight = weights[fragment.name].detach().flatten()[fragment.start : fragment.stop]
            assert torch.equal(fragment.values({}, MASTER).to(weight.dtype), weight), fragment.name


def read_all(checkpoint: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(checkpoint)
    return {
        f"{kind}/{name}": reader.read(kind, name, 0, prod(shape))
        for name, shape in reader.manifest.parameters.items()
        for kind in reader.kinds(name)
    }


def start(root: Path, layout: Layout, first: Path | None) -> list[Path]:
    finished = on_ranks(train_and_save, root, layout, first, ranks=layout.ranks)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return sorted((root / "checkpoints").iterdir())


def assert_equal(found: Path, expected: Path) -> None:
    tensors, others = read_all(found), read_all(expected)
    assert tensors.keys() == others.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("fp32", "bf16") else slow) for name in CHAINS]
)
def test_state_is_the_same_in_every_bit_in_any_layout(name: str, tmp_path: Path) -> None:
    first, *others = CHAINS[name]
    saved = start(tmp_path / "first", first, None)
    again, *_ = start(tmp_path / "again", first, saved[0])
    assert_equal(again, saved[0])
    assert_equal(tmp_path / "again" / "checkpoints" / checkpoint_name(2), saved[1])
    last = saved[-1]
    for number, layout in enumerate(others):
        loaded, *_, end = start(tmp_path / str(number), layout, last)
        assert_equal(loaded, last)
        last = end


READER = Path(__file__).parents[2] / "docs" / "reliability.md"


def masters_by_the_docs(checkpoint: Path) -> dict[str, np.ndarray]:
    """What the program of the docs makes of a checkpoint, as it stands there."""
    (program,) = re.findall(r"```python\n(.*?)```", READER.read_text(), re.DOTALL)
    path = checkpoint.parent / "reader.py"
    path.write_text(program.replace("runs/v1/checkpoints/step_00001000", str(checkpoint)))
    return runpy.run_path(str(path))["weights"]


def test_numpy_reads_what_other_ranks_and_stages_train_alike(tmp_path: Path) -> None:
    """Two ranks under ZeRO-3, and one under ZeRO-1: they add gradients in a different order."""
    sharded, whole = (start(tmp_path / str(place.stage), place, None)[0] for place in (Layout(2, 3), Layout(1, 1)))
    assert {path.suffix for path in sharded.iterdir()} == {".safetensors", ".json"}
    found, expected = masters_by_the_docs(sharded), masters_by_the_docs(whole)
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name].shape == values.shape
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-6, err_msg=name)
