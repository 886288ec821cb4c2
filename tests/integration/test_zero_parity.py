"""ZeRO stage, ranks and accumulation change speed and memory only: one loss curve, and it is plain PyTorch's."""

import json
from pathlib import Path

import pytest
from forked import on_ranks, plain_curves, pretrain
from launching import BATCH, read_series, write_deepspeed_config, write_recipe

from tinyllama_ds.distributed.collectives import sum_over_ranks
from tinyllama_ds.distributed.world import read_world
from tinyllama_ds.model.config import model_config
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.run.resolve import Options, resolve_run
from tinyllama_ds.train.batches import micro_batches
from tinyllama_ds.train.engine import hard_exit, set_learning_rate, start_process_group, wrap
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.step import train_step

STEPS = 12
TOLERANCE = 1e-5  # relative, fp32
STAGES = (0, 1, 2, 3)
GROUPS = [  # as in plain_loop.py
    {"params": ["*norm*"], "weight_decay": 0.0},
    {"params": ["model.embed_tokens.weight"], "weight_decay": 0.0, "lr_multiplier": 3.0},
    {"params": ["*.q_proj.*", "*.k_proj.*"], "lr_multiplier": 0.5},
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "small.toml", STEPS, save_every=STEPS)


@pytest.fixture(scope="module")
def reference(recipe: Path, data_dir: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of every step in a plain PyTorch loop in a process of its own."""
    return plain_curves("plain_loop.py", recipe, data_dir, STEPS)


@pytest.mark.parametrize(  # every pair of two of them
    ("stage", "ranks", "accumulation"),
    [(0, 1, 4), (0, 2, 1), (1, 1, 1), (1, 2, 4), (2, 1, 4), (2, 2, 1), (3, 1, 1), (3, 2, 4)],
)
def test_curve_equals_plain_pytorch(
    stage: int, ranks: int, accumulation: int, recipe: Path, reference: dict, data_dir: Path, tmp_path: Path
) -> None:
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=BATCH // ranks // accumulation)
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", ranks)
    assert finished.returncode == 0, finished.stderr
    assert read_series(tmp_path / "run", "Train/Loss") == pytest.approx(reference["loss"], rel=TOLERANCE)
    assert read_series(tmp_path / "run", "Train/GradNorm") == pytest.approx(reference["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("switch", ["--compile=on", "--activation-checkpointing=1", "--attention=eager"])
def test_switches_for_speed_and_memory_keep_the_curve(
    switch: str, recipe: Path, reference: dict, data_dir: Path, tmp_path: Path
) -> None:
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    finished = pretrain(recipe, config, data_dir, tmp_path / "run", 2, switch)
    assert finished.returncode == 0, finished.stderr
    assert read_series(tmp_path / "run", "Train/Loss") == pytest.approx(reference["loss"], rel=TOLERANCE)


def test_document_mask_trains_and_changes_the_loss(reference: dict, data_dir: Path, tmp_path: Path) -> None:
    """The same curve whatever the backend and the ranks, and another than without the mask."""
    recipe = write_recipe(tmp_path / "masked.toml", STEPS, save_every=STEPS, document_mask=True)
    curves = []
    for ranks, attention in ((1, "eager"), (2, "auto")):
        config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
        finished = pretrain(recipe, config, data_dir, tmp_path / attention, ranks, "--attention", attention)
        assert finished.returncode == 0, finished.stderr
        curves.append(read_series(tmp_path / attention, "Train/Loss"))
    assert curves[0] == pytest.approx(curves[1], rel=TOLERANCE)
    assert curves[0] != pytest.approx(reference["loss"], rel=1e-4)


def train_at_every_stage(recipe: Path, folder: Path, data: Path) -> None:
    """With parameter groups; rank 0 prints the losses by stage. Collective."""
    world = read_world()
    start_process_group(world)
    curves = {}
    for stage in STAGES:
        config = write_deepspeed_config(folder / f"{stage}.{world.rank}.json", stage, micro_batch=BATCH // world.size)
        raw = json.loads(config.read_text())
        raw["optimizer"]["param_groups"] = GROUPS
        config.write_text(json.dumps(raw))
        run = resolve_run(Options(str(recipe), config, data, folder / "run"), world.size, "cpu", bf16=False)
        engine = wrap(build_model(run.model, "sdpa", run.recipe.seed), run.engine_config, run.schedule.ratio(0))
        batches = micro_batches(run, world, 0)
        curves[stage] = []
        for step in run.plan.steps(0):
            set_learning_rate(engine, run.schedule.ratio(step.tokens_after))
            loss, _ = train_step(engine, step, batches, run.micro_batch, world, PhaseClock(world.device))
            curves[stage].append(float(sum_over_ranks(loss)) / world.size)
    if world.is_rank0:
        print(json.dumps(curves))
    hard_exit(0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_parameter_groups_are_plain_pytorchs(
    ranks: int, recipe: Path, reference: dict, data_dir: Path, tmp_path: Path
) -> None:
    """At every stage: norms and embeddings without weight decay, and multipliers of the learning rate."""
    grouped = plain_curves("plain_loop.py", recipe, data_dir, STEPS, "grouped")["loss"]
    finished = on_ranks(train_at_every_stage, recipe, tmp_path, data_dir, ranks=ranks)
    assert finished.returncode == 0, finished.stderr
    curves = json.loads(finished.stdout.splitlines()[-1])
    assert len(curves) == len(STAGES)
    for stage, losses in curves.items():
        assert losses == pytest.approx(grouped, rel=TOLERANCE), stage
    assert grouped != pytest.approx(reference["loss"], rel=1e-4)


def print_groups_of_muon(config: Path) -> None:
    """What every parameter of the size `test` is trained with, as JSON."""
    start_process_group(read_world())
    raw = json.loads(config.read_text())
    raw |= {"train_batch_size": 8, "timers": {"throughput": {"enabled": False}}}
    engine = wrap(build_model(model_config("test"), "sdpa", 1), raw, 0.5)
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    groups = engine.optimizer.param_groups
    found = {names[p]: [g["use_muon"], g["lr"], g["weight_decay"]] for g in groups for p in g["params"]}
    print(json.dumps(found | {"logged": set_learning_rate(engine, 0.5)}))
    hard_exit(0)


def test_groups_and_muons_two_rates_go_together(tmp_path: Path) -> None:
    params = {"lr": 1e-3, "muon_lr": 2e-2, "adam_lr": 4e-3, "weight_decay": 0.1, "torch_adam": True}
    optimizer = {"type": "Muon", "params": params, "param_groups": GROUPS}
    config = write_deepspeed_config(tmp_path / "ds.json", 0, 8, optimizer=optimizer, gradient_clipping=0.0)
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "scheduler"}))
    finished = on_ranks(print_groups_of_muon, config, ranks=1)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found["logged"] == 1e-2
    layer = "model.layers.1"
    assert found[f"{layer}.self_attn.q_proj.weight"] == [True, 5e-3, 0.1]
    assert found[f"{layer}.mlp.up_proj.weight"] == [True, 1e-2, 0.1]
    assert found[f"{layer}.input_layernorm.weight"] == [False, 2e-3, 0.0]
    assert found["model.embed_tokens.weight"] == [False, pytest.approx(6e-3), 0.0]
    assert found["lm_head.weight"] == [False, 2e-3, 0.1]
