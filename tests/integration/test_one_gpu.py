"""Every command and every way of loading on one GPU, as far as a machine without any can tell: `fake_cuda`.

An operator whose tensors lie on different devices raises there, and every wait of the host for the GPU is counted.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import one_gpu
import pytest
from chats import conversations, prepare_chat, write_chat_recipe, write_records
from launching import read_series, write_deepspeed_config, write_recipe
from local_tasks import write_tasks
from one_gpu import Ran
from test_reproduce import write_toy

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest
from tinyllama_ds.config.recipe import RECIPE_DIRECTORY
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_ROLLBACK
from tinyllama_ds.fault_injection import FAULT_VARIABLE

CONFIGS = Path(__file__).parents[2] / "ds_configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.json"))
STEPS = 6
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
FUSED = {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.1, "torch_adam": True, "fused": True}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "small.toml", STEPS, save_every=STEPS // 2)


def passed(ran: Ran) -> Ran:
    assert ran.code == 0, ran.output
    return ran


def shipped(name: str, path: Path, **zero: object) -> Path:
    """A shipped file, with a micro batch, a warm-up and a decay for few steps, and changes to its ZeRO section."""
    config = json.loads((CONFIGS / f"{name}.json").read_text()) | {"train_micro_batch_size_per_gpu": 4}
    config["zero_optimization"] |= zero
    has_decay = config["scheduler"]["type"] == "warmup_stable_decay"
    steps = {"num_warmup_steps": 2, "num_decay_steps": 2} if has_decay else {"warmup_num_steps": 2}
    config["scheduler"]["params"] |= steps
    config["zero_optimization"].pop("zero_hpz_partition_size", None)  # of several GPUs
    path.write_text(json.dumps(config))
    return path


def forget_last(run_dir: Path) -> None:
    """So that the run's second half is trained again, from the checkpoint in the middle."""
    last = find_checkpoints(run_dir)[-1]
    assert read_manifest(last).progress.step == STEPS
    shutil.rmtree(last)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_train_and_resume(name: str, recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    config = shipped(name, tmp_path / "ds.json")
    passed(one_gpu.pretrain(recipe, config, data_dir, tmp_path / "run"))
    losses = read_series(tmp_path / "run", "Train/Loss")
    forget_last(tmp_path / "run")
    passed(one_gpu.pretrain(recipe, config, data_dir, tmp_path / "run", "--resume", "must"))
    assert read_series(tmp_path / "run", "Train/Loss") == losses


@pytest.mark.parametrize("is_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("stages", [(3, 1, 0, 2, 3), (0, 1)], ids=str)
def test_another_stage_goes_on(
    stages: tuple[int, ...], is_fused: bool, recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    """In fp32, where every stage can follow every other; the losses are those of a run that stayed on its own.

    A save reads the optimizer's step of all parameters at once, which fused kernels count on the GPU.
    """
    more = {"optimizer": FUSED} if is_fused else {}
    configs = {stage: write_deepspeed_config(tmp_path / f"{stage}.json", stage, 4, **more) for stage in stages}
    waits = passed(one_gpu.pretrain(recipe, configs[stages[0]], data_dir, tmp_path / "run")).waits
    saves = len(find_checkpoints(tmp_path / "run"))
    assert sum(count for wait, count in waits.items() if "checkpoint/save.py" in wait.where) == saves * is_fused
    losses = read_series(tmp_path / "run", "Train/Loss")
    for stage in stages[1:]:
        forget_last(tmp_path / "run")
        passed(one_gpu.pretrain(recipe, configs[stage], data_dir, tmp_path / "run", "--resume", "must"))
        assert read_series(tmp_path / "run", "Train/Loss") == pytest.approx(losses, rel=1e-5)


def test_another_stage_goes_on_in_bf16(recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    """With the fused kernels of the shipped files, which take no step counter in host memory."""
    passed(one_gpu.pretrain(recipe, shipped("zero3", tmp_path / "first.json"), data_dir, tmp_path / "run"))
    losses = read_series(tmp_path / "run", "Train/Loss")
    for name in ("zero1", "zero2", "zero3_keep"):
        forget_last(tmp_path / "run")
        config = shipped(name, tmp_path / f"{name}.json")
        passed(one_gpu.pretrain(recipe, config, data_dir, tmp_path / "run", "--resume", "must"))
        assert read_series(tmp_path / "run", "Train/Loss") == pytest.approx(losses, rel=5e-3)


@pytest.mark.parametrize("stage", [1, 3])
def test_branches_and_stored_weights_start(stage: int, recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    config = shipped(f"zero{stage}", tmp_path / "ds.json")
    passed(one_gpu.pretrain(recipe, config, data_dir, tmp_path / "run"))
    forget_last(tmp_path / "run")
    branch = ("--branch-from", str(tmp_path / "run"))
    passed(one_gpu.pretrain(recipe, config, data_dir, tmp_path / "branch", *branch))
    passed(one_gpu.pretrain(recipe, config, data_dir, tmp_path / "other", "--init-from", str(tmp_path / "run")))
    validation = [read_series(tmp_path / run, "Validation/Loss/slimpajama")[0] for run in ("branch", "other")]
    assert validation[0] == validation[1]


@pytest.mark.parametrize(
    ("policy", "name"),
    [("skip", "zero1"), ("skip", "zero2"), ("skip", "zero3"), ("rollback", "zero3"), ("log", "zero1")],
)
def test_spikes(policy: str, name: str, data_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", 6, save_every=4)
    guard = f'[guard]\nspike_policy = "{policy}"\nspike_window = 4\nspike_sigmas = 100\nmax_rollbacks = 2\n'
    recipe.write_text(recipe.read_text() + guard)
    fault = {FAULT_VARIABLE: "step.forward:0:5:spike"}
    ran = one_gpu.pretrain(recipe, shipped(name, tmp_path / "ds.json"), data_dir, tmp_path / "run", **fault)
    assert ran.code == (EXIT_ROLLBACK if policy == "rollback" else 0), ran.output
    assert "step 6: " in ran.output


def test_a_recipe_with_everything(tokenizer: Tokenizer, data_dir: Path, tmp_path: Path) -> None:
    """Document mask, samples, scores on tasks, recomputed blocks."""
    (tmp_path / "tasks").mkdir()
    tasks = write_tasks(tmp_path / "tasks", 6)
    recipe = write_recipe(tmp_path / "r.toml", STEPS, save_every=STEPS, document_mask=True)
    recipe.write_text(
        recipe.read_text()
        + '[samples]\nprompts = ["the small llama"]\nnew_tokens = 4\nevery_tokens = 256\n'
        + f"[evaluation]\ntasks = {json.dumps([str(task) for task in tasks])}\nevery_tokens = 512\nlimit = 2\n"
    )
    more = ("--activation-checkpointing", "1")
    ran = passed(one_gpu.pretrain(recipe, shipped("zero3", tmp_path / "ds.json"), data_dir, tmp_path / "run", *more))
    assert "scoring on tasks failed" not in ran.output
    assert len((tmp_path / "run" / "samples.jsonl").read_text().splitlines()) == STEPS
    assert (tmp_path / "run" / "tasks.jsonl").read_text()


def test_commands_on_what_was_trained(tokenizer: Tokenizer, recipe: Path, data_dir: Path, tmp_path: Path) -> None:
    """Export, import, generation from a checkpoint and from a folder, scores, and a measurement of the step."""
    config = shipped("zero3", tmp_path / "ds.json")
    passed(one_gpu.pretrain(recipe, config, data_dir, tmp_path / "run"))
    passed(one_gpu.command("export", tmp_path / "run", tmp_path / "hf"))
    passed(one_gpu.command("import", tmp_path / "hf", tmp_path / "model", "--tokenizer", tokenizer.path))
    for model in ("run", "hf", "model"):
        passed(one_gpu.command("generate", tmp_path / model, "the small llama", "--max-new-tokens", 4))
    (tmp_path / "tasks").mkdir()
    tasks = write_tasks(tmp_path / "tasks", 4)
    passed(one_gpu.script("score", tmp_path / "run", "--task-file", *tasks, "--output", tmp_path / "scores"))
    passed(
        one_gpu.script(
            "measure", "--deepspeed-config", config, "--attention", "sdpa", "--model", "test", "--micro-batch", 2,
            "--output", tmp_path / "figures.json", "--activation-checkpointing", 0, "--sequence-length", 32,
            "--accumulation", 2, "--steps", 1,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def all_sources(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small sources once more, under the names of those that other recipes mix in."""
    data = tmp_path_factory.mktemp("sources") / "data"
    shutil.copytree(data_dir, data)
    for name in ("proof-pile-2", "skypile", "slimpajama-long", "numbers-short", "numbers-in-prose"):
        shutil.copytree(data / "slimpajama", data / name)
        for manifest in (data / name).rglob("*.json"):
            manifest.write_text(manifest.read_text().replace('"slimpajama"', f'"{name}"'))
    return data


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in RECIPE_DIRECTORY.glob("*.toml") if "chat" not in path.stem)
)
def test_shipped_recipes_train(name: str, all_sources: Path, tmp_path: Path) -> None:
    """With their stages, mixtures and ramps, few steps of each and a small model."""
    write_toy(name, tmp_path / "toy.toml", (4, 2, 2))
    config = shipped("zero3", tmp_path / "ds.json")
    passed(one_gpu.pretrain(tmp_path / "toy.toml", config, all_sources, tmp_path / "run"))


def test_a_chat_model(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"messages": messages} for messages in conversations(120)]
    write_records(tmp_path / "raw" / "train" / "a.jsonl", records[:110])
    write_records(tmp_path / "raw" / "validation" / "c.jsonl", records[110:])
    prepare_chat(tmp_path / "raw", tokenizer.path, tmp_path / "data")
    recipe = write_chat_recipe(tmp_path / "chat.toml", STEPS, save_every=STEPS)
    config = shipped("chat_zero2", tmp_path / "ds.json")
    passed(one_gpu.pretrain(recipe, config, tmp_path / "data", tmp_path / "run"))


@pytest.mark.parametrize(("stage", "bf16"), [(0, {}), (1, BF16), (2, BF16), (3, BF16)])
def test_the_dry_run_batch_changes_nothing(
    stage: int, bf16: dict, recipe: Path, data_dir: Path, tmp_path: Path
) -> None:
    """At a fresh start and after a load: every file of every checkpoint is the same bit for bit without it."""
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=4, **bf16)
    files = []
    for name, dry_run in (("with", True), ("without", False)):
        run_dir = tmp_path / name
        ran = passed(one_gpu.pretrain(recipe, config, data_dir, run_dir, dry_run=dry_run))
        assert ("dry-run batch passed" in ran.output) == dry_run
        first = {path.name: read_manifest(path).files for path in find_checkpoints(run_dir)}
        forget_last(run_dir)
        passed(one_gpu.pretrain(recipe, config, data_dir, run_dir, "--resume", "must", dry_run=dry_run))
        assert {path.name: read_manifest(path).files for path in find_checkpoints(run_dir)} == first
        files.append(first)
    assert files[0] == files[1]


# Waits per optimizer step of two micro batches: the one of ours, and those in DeepSpeed 0.19.8's own code.
RELEASED = {  # every weight of ZeRO-3 after its use, which on one GPU frees nothing
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 1,
    "stage3_max_reuse_distance": 1,
}
AGREE = "tinyllama_ds/health/guard.py:all_reduce_step_status"
BACKWARD, STEP = (f"tinyllama_ds/train/step.py:{name}" for name in ("backward", "apply_gradients"))
WAITS = {
    "zero1": {AGREE: 1, STEP: 2},
    "zero2": {AGREE: 1, STEP: 3, BACKWARD: 2},
    "zero3": {AGREE: 1, STEP: 2, BACKWARD: 2},
    "zero3_keep": {AGREE: 1, STEP: 2, BACKWARD: 2},
}


@pytest.mark.parametrize("name", list(WAITS))
def test_the_host_waits_for_the_gpu_once_per_step_next_to_what_deepspeed_does(
    name: str, data_dir: Path, tmp_path: Path
) -> None:
    """Between logged steps. Two runs, of three and five steps, differ by two steps of which none is logged."""
    config = shipped(name, tmp_path / "ds.json", **(RELEASED if "zero3" in name else {}))
    waits = []
    for steps in (3, 5):
        recipe = write_recipe(tmp_path / f"{steps}.toml", steps, save_every=1000)
        recipe.write_text(recipe.read_text().replace("log_steps = 1", "log_steps = 1000"))
        waits.append(passed(one_gpu.pretrain(recipe, config, data_dir, tmp_path / f"run{steps}")).waits)
    found: Counter = Counter()
    for wait, count in (waits[1] - waits[0]).items():
        found[wait.where] += count
        is_ours = wait.inside.split(":")[0] == Path(wait.where.split(":")[0]).name
        assert is_ours == (wait.where == AGREE), wait
    assert found == {place: 2 * count for place, count in WAITS[name].items()}


def test_offloaded_activations_change_no_loss_and_let_the_host_wait_no_more(data_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "r.toml", 3, save_every=1000, document_mask=True)
    config, recomputed = shipped("zero3", tmp_path / "ds.json"), ("--activation-checkpointing", "1")
    plain = passed(one_gpu.pretrain(recipe, config, data_dir, tmp_path / "plain", *recomputed))
    offloading = (*recomputed, "--activation-offloading")
    offloaded = passed(one_gpu.pretrain(recipe, config, data_dir, tmp_path / "offloaded", *offloading))
    assert offloaded.waits == plain.waits
    losses = [read_series(tmp_path / name, "Train/Loss") for name in ("plain", "offloaded")]
    assert losses[0] == losses[1]
    assert json.loads((tmp_path / "offloaded" / "run.json").read_text())["activation_offloading"]


def test_a_snapshot_pins_as_many_bytes_as_the_state_has(data_dir: Path, tmp_path: Path) -> None:
    """fp32 master weights and two moments are 12 bytes per parameter; pages are rounded up, and not powers of two."""
    recipe = write_recipe(tmp_path / "r.toml", STEPS, save_every=STEPS)
    config = shipped("zero1", tmp_path / "ds.json")
    ran = passed(one_gpu.pretrain(recipe, config, data_dir, tmp_path / "run"))
    parameters = 158_016
    assert 12 * parameters <= ran.pinned_bytes <= 12 * parameters + 100 * 4096


def test_out_of_memory_in_the_dry_run_batch_names_the_part(data_dir: Path, tmp_path: Path) -> None:
    """Weights, gradients and optimizer fit, the activations do not: one sentence, code 78, and no checkpoint."""
    recipe = write_recipe(tmp_path / "r.toml", STEPS, save_every=STEPS)
    recipe.write_text(recipe.read_text().replace("sequence_length = 32", "sequence_length = 128"))
    recipe.write_text(recipe.read_text().replace("global_batch_tokens = 256", "global_batch_tokens = 512"))
    config = shipped("zero3", tmp_path / "ds.json", reduce_bucket_size=20_000)
    states = 20 * 158_016
    ran = one_gpu.pretrain(recipe, config, data_dir, tmp_path / "run", memory_bytes=int(1.1 * states))
    assert ran.code == EXIT_CONFIG, ran.output
    (sentence,) = [line for line in ran.output.splitlines() if "out of memory" in line]
    assert re.search(r"rank 0 on \S+ ran out of memory in the (forward|backward) of the dry-run batch", sentence)
    assert "plan estimates" in sentence
    assert "Traceback" not in ran.output
    assert not find_checkpoints(tmp_path / "run")


def test_a_part_that_fails_is_named(data_dir: Path, tmp_path: Path) -> None:
    """A copy into host memory that the machine refuses: the run ends before its first step, as a crash."""
    recipe = write_recipe(tmp_path / "r.toml", STEPS, save_every=STEPS)
    fault = {FAULT_VARIABLE: "save.copy:0:0:raise"}
    ran = one_gpu.pretrain(recipe, shipped("zero1", tmp_path / "ds.json"), data_dir, tmp_path / "run", **fault)
    assert ran.code == 1
    assert "the dry-run batch failed in its snapshot: OSError" in ran.output
