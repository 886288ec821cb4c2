"""A model of the Llama family with tied embeddings: one parameter under every ZeRO stage, in training and checkpoints.

Its losses are those of transformers' model in a plain loop, on one rank and on two.
"""

import json
from itertools import repeat
from pathlib import Path

import pytest
import torch
from forked import on_ranks, pretrain
from launching import write_deepspeed_config, write_recipe

from tinyllama_ds.checkpoint.format import Health, Progress, checkpoint_name
from tinyllama_ds.checkpoint.load import load_checkpoint
from tinyllama_ds.checkpoint.reader import CheckpointReader
from tinyllama_ds.checkpoint.retention import Retention
from tinyllama_ds.checkpoint.save import Saver, SaveSettings
from tinyllama_ds.cli import main
from tinyllama_ds.config.run_plan import Step
from tinyllama_ds.distributed.collectives import sum_over_ranks
from tinyllama_ds.distributed.world import DistributedInfo, read_world
from tinyllama_ds.errors import EXIT_FINISHED
from tinyllama_ds.hf.convert import hf_model
from tinyllama_ds.hf.import_model import read_config
from tinyllama_ds.model.config import Llama3Scaling, LlamaConfig
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.train.batches import Batch
from tinyllama_ds.train.engine import hard_exit, start_process_group, wrap
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.step import train_step

MODEL = LlamaConfig(
    97, 64, 96, 2, 4, 2, 64, rope_theta=500.0, head_dim=32, tie_word_embeddings=True,
    rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16),
)  # fmt: skip
STAGES = (0, 1, 2, 3)
STEPS, SAVED, T, BATCH = 4, 2, 32, 4
ADAMW = {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
TOLERANCE = 1e-5  # relative, fp32


def config(stage: int, ranks: int) -> dict:
    small = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 20_000} if stage == 3 else {}
    return {
        "train_micro_batch_size_per_gpu": BATCH // ranks, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": ADAMW | {"torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000} | small,
        "timers": {"throughput": {"enabled": False}},
    }  # fmt: skip


def tokens_of(step: int) -> torch.Tensor:
    return torch.randint(MODEL.vocab_size, (BATCH, T + 1), generator=torch.Generator().manual_seed(step))


def train_all(root: Path) -> None:
    """On every rank: train under each stage and save on the way; one rank also continues what two have saved."""
    world = read_world()
    start_process_group(world)
    curves: dict[str, list[float]] = {}
    for stage in STAGES:
        place = root / f"{world.size} ranks, stage {stage}"
        curves[f"from the start, stage {stage}"] = train(world, stage, place, None)
        other = root / f"2 ranks, stage {3 - stage}" / "checkpoints" / checkpoint_name(SAVED)
        if world.size == 1:
            curves[f"continued, stage {stage}"] = train(world, stage, None, other)
    if world.is_rank0:
        (root / f"{world.size}.json").write_text(json.dumps(curves))
    hard_exit(0)


def train(world: DistributedInfo, stage: int, run: Path | None, checkpoint: Path | None) -> list[float]:
    """The losses of the steps, from the checkpoint on if there is one; `run` gets a checkpoint on the way."""
    engine = wrap(build_model(MODEL, "sdpa", 1), config(stage, world.size), 1.0)
    if checkpoint is not None:
        load_checkpoint(engine, checkpoint)
    losses = []
    for number in range(0 if checkpoint is None else SAVED, STEPS):
        mine = Batch(tokens_of(number).chunk(world.size)[world.rank])
        step = Step(number, "only", 0, BATCH, 0, BATCH * T)
        loss, _ = train_step(engine, step, repeat(mine), BATCH // world.size, world, PhaseClock(world.device))
        losses.append(float(sum_over_ranks(loss)) / world.size)
        if run is not None and number + 1 == SAVED:
            saver = Saver(SaveSettings(run, Retention(9, 10**15), 1e9, MODEL, {}), world, lambda save: None)
            saver.save(engine, Progress(SAVED, 0, 0), Health)
            saver.finish_or_raise()
    return losses


def train_plainly() -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of transformers' model without DeepSpeed, and its weights at the step of the checkpoint."""
    weights = {name: p.detach().clone() for name, p in build_model(MODEL, "sdpa", 1).named_parameters()}
    model = hf_model(weights, MODEL).train()
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    losses, saved = [], {}
    for number in range(STEPS):
        tokens = tokens_of(number)
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if number + 1 == SAVED:
            saved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return losses, saved


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tied")
    for ranks in (2, 1):
        finished = on_ranks(train_all, root, ranks=ranks)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    return root


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], dict[str, torch.Tensor]]:
    return train_plainly()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_are_transformers_in_a_plain_loop(ranks: int, stage: int, trained: Path, reference: tuple) -> None:
    curves = json.loads((trained / f"{ranks}.json").read_text())
    assert curves[f"from the start, stage {stage}"] == pytest.approx(reference[0], rel=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_continues_under_any_other_stage(stage: int, trained: Path, reference: tuple) -> None:
    """On one rank, from what two ranks have saved."""
    curves = json.loads((trained / "1.json").read_text())
    assert curves[f"continued, stage {stage}"] == pytest.approx(reference[0][SAVED:], rel=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_holds_the_table_once(ranks: int, stage: int, trained: Path, reference: tuple) -> None:
    checkpoint = trained / f"{ranks} ranks, stage {stage}" / "checkpoints" / checkpoint_name(SAVED)
    weights = dict(CheckpointReader(checkpoint).weights())
    assert weights.keys() == reference[1].keys()
    assert "lm_head.weight" not in weights
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, reference[1][name], rtol=1e-4, atol=1e-5, msg=name)


TABLE = """
[model]
vocab_size = 576 # of a tokenizer of 512
hidden_size = 64
intermediate_size = 96
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
max_position_embeddings = 64
rms_norm_eps = 1e-5
rope_theta = 500.0
rope_scaling = { type = "yarn", factor = 4.0, original_max_position_embeddings = 16 }
tie_word_embeddings = true
torch_dtype = "bfloat16" # as pasted
"""


def test_a_table_in_a_recipe_trains_and_is_exported(data_dir: Path, tmp_path: Path) -> None:
    """The exported folder has the logits and the loss of the run's probe, or there would be none."""
    recipe = write_recipe(tmp_path / "mine.toml", 6, save_every=6)
    recipe.write_text(recipe.read_text().replace('model = "test"\n', "") + TABLE)
    run, folder = tmp_path / "run", tmp_path / "hf"
    finished = pretrain(recipe, write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2), data_dir, run, 2)
    assert finished.returncode == 0, finished.stderr
    assert "custom: 123,200 parameters (64 rows of the vocabulary are padding" in finished.stdout
    description = json.loads((run / "run.json").read_text())
    assert description["recipe"]["model"] == description["model"]
    assert main(["export", str(run), str(folder)]) == EXIT_FINISHED
    described = json.loads((folder / "config.json").read_text())
    assert (described["tie_word_embeddings"], described["head_dim"], described["vocab_size"]) == (True, 32, 576)
    assert described["rope_parameters"]["rope_type"] == "yarn"
    assert read_config(folder / "config.json").to_dict() == description["model"]
