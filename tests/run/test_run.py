"""Resolving a run, and comparing it with the run of a directory."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import BATCH, SEQUENCE_LENGTH, write_deepspeed_config, write_recipe

from tinyllama_ds.checkpoint.format import Health, Progress
from tinyllama_ds.config.recipe import Evaluation, Samples
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.layout import RUN_FILE
from tinyllama_ds.run.directory import check_run_directory, open_run_directory, reject_different_history
from tinyllama_ds.run.ledger import ROLLED_BACK, Entry, record
from tinyllama_ds.run.resolve import Options, Run, resolve_run
from tinyllama_ds.train.setup import print_changes


@pytest.fixture
def options(data_dir: Path, tmp_path: Path) -> Options:
    recipe = write_recipe(tmp_path / "small.toml", 10, save_every=5)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    return Options(str(recipe), config, data_dir, tmp_path / "run")


def resolve(options: Options, world_size: int = 2) -> Run:
    return resolve_run(options, world_size, "cpu", bf16=False)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batch_order_and_schedule_do_not_depend_on_ranks(options: Options, world_size: int) -> None:
    run, alone = resolve(options, world_size), resolve(options, 1)
    assert run.engine_config["train_batch_size"] == BATCH
    assert run.engine_config["gradient_accumulation_steps"] == BATCH // 2 // world_size
    assert run.schedule == alone.schedule
    assert list(run.plan.steps(0)) == list(alone.plan.steps(0))
    assert run.data.order.counts(37) == alone.data.order.counts(37)


def test_schedule_counts_tokens(options: Options) -> None:
    run = resolve(options)
    step = BATCH * SEQUENCE_LENGTH
    assert (run.schedule.warmup_tokens, run.schedule.decays) == (5 * step, ((5 * step, 10 * step),))


def test_a_warmup_as_long_as_the_run_is_rejected(options: Options, tmp_path: Path) -> None:
    short = write_recipe(tmp_path / "short.toml", 5, save_every=5)
    expected = "warmup_num_steps 5 leaves nothing of the run's 5 steps; expected fewer than 5, such as 1, or .auto."
    with pytest.raises(ConfigError, match=expected):
        resolve(replace(options, recipe=str(short)))


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed here")
@pytest.mark.parametrize(
    ("document_mask", "capability", "attention", "reason"),
    [
        (False, (8, 0), "sdpa", " (flash_attention_2: flash_attn is not installed)"),
        (True, (8, 0), "varlen", " (flash_attention_2: flash_attn is not installed)"),
        (True, None, "auto", ""),  # on a machine that does not see the ranks' GPUs
    ],
)
def test_attention_of_a_gpu_is_resolved_and_logged(
    document_mask: bool, capability: tuple[int, int] | None, attention: str, reason: str, options: Options
) -> None:
    recipe = write_recipe(Path(options.recipe), 10, save_every=5, document_mask=document_mask)
    config = write_deepspeed_config(options.deepspeed_config, 3, micro_batch=2, bf16={"enabled": True})
    options = replace(options, recipe=str(recipe), deepspeed_config=config)
    run = resolve_run(options, 2, "cuda", bf16=True, capability=capability)
    assert run.attention.backend == run.description["attention"] == attention
    assert run.kernels == f"attention {attention}{reason}"
    assert resolve_run(replace(options, deterministic=True), 2, "cuda", True).kernels == "attention auto, deterministic"


@pytest.mark.parametrize(
    ("every", "device_type", "sentence"),
    [
        (0, "cuda", "moves the inputs of recomputed blocks; expected --activation-checkpointing 1 or more with it"),
        (1, "cpu", "on CPUs activations are in host memory already; expected GPUs"),
    ],
)
def test_offloading_without_effect_is_rejected(every: int, device_type: str, sentence: str, options: Options) -> None:
    options = replace(options, activation_checkpointing=every, activation_offloading=True)
    with pytest.raises(ConfigError, match=f"^--activation-offloading:? {sentence}"):
        resolve_run(options, 2, device_type, bf16=False)


def test_a_fresh_directory_is_a_fresh_start(options: Options) -> None:
    run = resolve(options)
    assert check_run_directory(run) is None
    open_run_directory(run)
    assert check_run_directory(resolve(options)) is None
    assert run.run_dir.stat().st_mode & 0o777 == 0o750


def change_config(options: Options, section: str, **params: object) -> None:
    config = json.loads(options.deepspeed_config.read_text())
    config[section]["params"] |= params
    options.deepspeed_config.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"seed": 2}, "recipe.seed is 1 there and 2 now"),
        ({"sequence_length": 16}, "recipe.sequence_length is 32 there and 16 now"),
        ({"document_mask": True}, "recipe.document_mask is false there and true now"),
    ],
)
def test_a_different_recipe_is_a_different_run(options: Options, tmp_path: Path, change: dict, difference: str) -> None:
    open_run_directory(resolve(options))
    write_recipe(tmp_path / "small.toml", 10, save_every=5, **change)
    with pytest.raises(ConfigError, match="holds a different run: ") as error:
        check_run_directory(resolve(options))
    assert difference in str(error.value)


def test_the_error_lists_every_change_and_the_names_that_allow_them(options: Options, tmp_path: Path) -> None:
    open_run_directory(resolve(options))
    change_config(options, "optimizer", lr=1.0, betas=[0.9, 0.99])
    change_config(options, "scheduler", cos_min_ratio=0.5)
    recipe = Path(options.recipe)
    recipe.write_text(recipe.read_text().replace("slimpajama = 0.7", "slimpajama = 0.6"))
    changes = {
        "deepspeed_config.optimizer.params.betas.1": "0.95 there and 0.99 now",
        "deepspeed_config.optimizer.params.lr": "0.003 there and 1.0 now",
        "deepspeed_config.scheduler.params.cos_min_ratio": "0.1 there and 0.5 now",
        "recipe.stages.0.weights.slimpajama": "0.7 there and 0.6 now",
    }
    with pytest.raises(ConfigError) as error:
        check_run_directory(resolve(options))
    for key, values in changes.items():
        assert f"{key} is {values}" in str(error.value)
        assert f"--allow-change {key}" in str(error.value)
    some = replace(options, allow_change=("deepspeed_config.optimizer", "recipe.stages.0.weights.slimpajama"))
    with pytest.raises(ConfigError) as error:
        check_run_directory(resolve(some))
    assert "cos_min_ratio" in str(error.value)
    assert "lr" not in str(error.value)
    assert check_run_directory(resolve(replace(options, allow_change=tuple(changes)))) is None


def test_evaluation_settings_may_change(options: Options) -> None:
    run = resolve(options)
    open_run_directory(run)
    recipe = replace(run.recipe, evaluation=Evaluation(("piqa",), 640), samples=Samples(("the",), 640, 2))
    changed = replace(run, description=run.description | {"recipe": recipe.to_dict()})
    assert check_run_directory(changed) is None
    assert "recipe.evaluation.tasks" in [change.key for change in open_run_directory(changed, step=2)]


def test_the_history_keeps_every_change(options: Options) -> None:
    open_run_directory(resolve(options))
    change_config(options, "optimizer", lr=1.0)
    changed = resolve(replace(options, allow_change=("deepspeed_config.optimizer.params.lr",)), world_size=1)
    changes = open_run_directory(changed, step=7)
    open_run_directory(changed, step=8)
    held = json.loads((options.run_dir / RUN_FILE).read_text())
    assert held["deepspeed_config"]["optimizer"]["params"]["lr"] == 1.0
    (entry,) = held["history"]
    assert entry["step"] == 7
    found = {change["key"]: (change["there"], change["now"]) for change in entry["changes"]}
    assert found["deepspeed_config.optimizer.params.lr"] == (0.003, 1.0)
    assert found["world_size"] == (2, 1)
    assert found == {change.key: (change.there, change.now) for change in changes}


def test_different_packages_are_recorded_and_accepted(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    open_run_directory(resolve(options))
    held = json.loads((options.run_dir / RUN_FILE).read_text())
    now = held["versions"]["torch"]
    held["versions"] |= {"torch": "2.0.0", "flash-attn": "1.0"}
    (options.run_dir / RUN_FILE).write_text(json.dumps(held))
    run = resolve(options)
    assert check_run_directory(run) is None
    print_changes(open_run_directory(run), ())
    told = capsys.readouterr().err
    differ = f"flash-attn 1.0 -> absent, torch 2.0.0 -> {now}"
    assert f"warning: package versions differ from the last start: {differ}\n" in told


def test_different_data_is_rejected_unless_allowed_by_name(options: Options, data_dir: Path) -> None:
    open_run_directory(resolve(options))
    held = json.loads((options.run_dir / RUN_FILE).read_text())
    held["data"]["train"]["slimpajama"]["bin_sha256"] = ["0" * 64]
    (options.run_dir / RUN_FILE).write_text(json.dumps(held))
    with pytest.raises(
        ConfigError, match=r'data.train.slimpajama.bin_sha256.0 is "0+" there and .* --allow-change data$'
    ):
        check_run_directory(resolve(options))
    assert check_run_directory(resolve(replace(options, allow_change=("data",)))) is None


def test_a_different_model_cannot_be_allowed(options: Options) -> None:
    open_run_directory(resolve(options))
    held = json.loads((options.run_dir / RUN_FILE).read_text())
    held["model"]["hidden_size"] = 1
    (options.run_dir / RUN_FILE).write_text(json.dumps(held))
    with pytest.raises(ConfigError, match="model.hidden_size is 1 there and .*; cannot be changed on resume"):
        check_run_directory(resolve(replace(options, allow_change=("model",))))


def test_a_checkpoint_must_fit_the_plan_and_the_ledger(options: Options) -> None:
    options.run_dir.mkdir()
    record(options.run_dir, Entry(ROLLED_BACK, 3, 16, 23, "spike"))
    run = resolve(options)
    at = {step: Progress(step, step * BATCH, step * BATCH * SEQUENCE_LENGTH) for step in (0, 2, 3, 10)}
    for step, known in {0: [], 2: [], 3: [[16, 23]], 10: [[16, 23]]}.items():
        reject_different_history(run, at[step], Health(left_out=known))
    with pytest.raises(ConfigError, match=r"excludes the samples \[\[16, 23\]\] of the first 32, but .* excludes \[\]"):
        reject_different_history(run, at[3], Health())
    with pytest.raises(ConfigError, match=r"excludes the samples \[\] of the first 16, but .* excludes \[\[8, 15\]\]"):
        reject_different_history(run, at[2], Health(left_out=[[8, 15]]))
    with pytest.raises(ConfigError, match="the first 3 steps are 24 samples of 768 tokens now, but the checkpoint has"):
        reject_different_history(run, replace(at[3], position=48), Health(left_out=[[16, 23]]))


def test_the_layout_may_change(options: Options) -> None:
    """Number of ranks, ZeRO stage and micro-batch do not affect what is trained."""
    open_run_directory(resolve(options, 2))
    write_deepspeed_config(options.deepspeed_config, 1, micro_batch=4)
    assert check_run_directory(resolve(options, 1)) is None


def test_intervals_may_change(options: Options, tmp_path: Path) -> None:
    open_run_directory(resolve(options))
    write_recipe(tmp_path / "small.toml", 10, save_every=2, evaluate_every=3, validation_samples=2)
    assert check_run_directory(resolve(options)) is None


def test_samples_may_begin_later_and_must_fit_a_row(options: Options, tmp_path: Path) -> None:
    run = resolve_run(options, 2, "cpu", False)
    assert run.evaluation.prompts == []
    open_run_directory(run)
    table = '[samples]\nprompts = ["the small llama"]\nevery_tokens = 640\nnew_tokens = {}\n'
    recipe = Path(options.recipe)
    without = recipe.read_text()
    recipe.write_text(without + table.format(5))
    check_run_directory(resolve_run(options, 2, "cpu", False))
    recipe.write_text(without + table.format(SEQUENCE_LENGTH))
    with pytest.raises(
        ConfigError, match=r"the prompt 'the small llama' has \d+ tokens, and new_tokens 32 more are beyond"
    ):
        resolve_run(options, 2, "cpu", False)


def test_a_directory_that_cannot_be_written_is_rejected(options: Options, small_disk: Callable[..., Path]) -> None:
    """A file system that was mounted read-only; whether the run directory is there already or not."""
    disk = small_disk(size=64 * 2**20)
    here, new = (resolve(replace(options, run_dir=disk / name)) for name in ("here", "new"))
    open_run_directory(here)
    check_run_directory(new)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for run, place in ((here, disk / "here"), (new, disk)):
        with pytest.raises(ConfigError, match=f"^{place}: cannot be written; expected a directory that this user may"):
            check_run_directory(run)


def test_resume_never_rejects_an_existing_run(options: Options) -> None:
    open_run_directory(resolve(options))
    with pytest.raises(ConfigError, match="already holds this run, and --resume never was given"):
        check_run_directory(resolve(replace(options, resume="never")))
