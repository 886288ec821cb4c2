"""From which checkpoints a run may branch off, and what it inherits; the training itself is in tests/integration."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from launching import BATCH, SEQUENCE_LENGTH, STEP_TOKENS, write_deepspeed_config

from tinyllama_ds.checkpoint.format import CheckpointManifest, Health, OptimizerRecord, Progress, checkpoint_name
from tinyllama_ds.config.ablation import Ablation
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.run.directory import open_run_directory
from tinyllama_ds.run.identity import verify_parent
from tinyllama_ds.run.ledger import ROLLED_BACK, SKIPPED, Entry, read_ledger, record
from tinyllama_ds.run.resolve import Options, Run, resolve_run

RECIPE = """
name = "{name}"
model = "test"
sequence_length = 32
seed = 1
validation_samples = 5
[[stages]]
name = "basic"
tokens = {basic}
global_batch_tokens = 256
weights = {{ {first} }}
[[stages]]
name = "domain"
tokens = {later}
global_batch_tokens = {batch}
weights = {{ slimpajama = 0.5, starcoderdata = 0.5 }}
[intervals]
log_steps = 1
evaluate_tokens = 256
save_tokens = 256
"""
BASIC, STEPS = 6, 10
USUAL = {"basic": BASIC * STEP_TOKENS, "later": 4 * STEP_TOKENS, "first": "slimpajama = 1", "batch": 256}


def write_recipe(path: Path, **changes: object) -> Path:
    path.write_text(RECIPE.format(**USUAL | {"name": path.stem} | changes))
    return path


@pytest.fixture
def options(data_dir: Path, tmp_path: Path) -> Options:
    """Of a branch; its parent was trained with the recipe `parent`."""
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    recipe = write_recipe(tmp_path / "child.toml")
    write_recipe(tmp_path / "parent.toml")
    return Options(str(recipe), config, data_dir, tmp_path / "child", branch_from=tmp_path / "parent")


def resolve(options: Options) -> Run:
    return resolve_run(options, 2, "cpu", bf16=False)


def commit_parent(options: Options, *steps: int, left_out: list[list[int]] = []) -> list[Path]:  # noqa: B006
    """Checkpoints without tensors, as the run of the parent's recipe would describe them."""
    root = options.run_dir.with_name("parent")
    parent = resolve(replace(options, recipe=f"{root}.toml", run_dir=root, branch_from=None))
    folders = [root / "checkpoints" / checkpoint_name(step) for step in steps]
    for step, folder in zip(steps, folders, strict=True):
        folder.mkdir(parents=True, mode=0o750)
        progress = Progress(step, *parent.plan.end_of(step))
        manifest = CheckpointManifest(
            progress, 2, 3, "float32", {}, parent.description,
            {}, OptimizerRecord("AdamW", step, []), {}, Health(left_out=left_out),
        )  # fmt: skip
        (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))
        (folder / "manifest.json").chmod(0o640)
    return folders


def test_the_newest_checkpoint_with_the_same_history_is_chosen(options: Options) -> None:
    folders = commit_parent(options, 4, BASIC, 8)
    run = resolve(options)
    assert run.parent is not None
    assert run.parent.checkpoint == str(folders[2]), "the whole plan is the same"
    assert run.description["parent"] == asdict(run.parent)
    write_recipe(Path(options.recipe), first="slimpajama = 1.0", later=2 * STEP_TOKENS, batch=128)
    during_warmup = resolve(options).parent
    assert during_warmup is not None
    assert during_warmup.step == 4, "a different end of the cosine has no effect before it begins"
    with pytest.raises(ConfigError, match=r"schedule.decays.0.1 is 2560 there and 2048 now"):
        resolve(replace(options, branch_from=folders[1]))
    write_recipe(Path(options.recipe), batch=128)  # twice as many steps over the same tokens
    taken = resolve(options).parent
    assert taken is not None
    assert (taken.checkpoint, taken.step, taken.tokens) == (str(folders[1]), BASIC, BASIC * STEP_TOKENS)
    named = resolve(replace(options, branch_from=folders[0])).parent
    assert named is not None
    assert named.step == 4


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            {"basic": (BASIC - 1) * STEP_TOKENS, "later": 5 * STEP_TOKENS},
            "recipe.stages is .* there and .* now",
        ),
        (
            {"first": "slimpajama = 1, starcoderdata = 1"},
            "recipe.stages.0.weights.starcoderdata is absent there and 1.0 now",
        ),
        ({"later": 5 * STEP_TOKENS}, "schedule.decays.0.1 is 2560 there and 2816 now"),
    ],
)
def test_a_different_history_is_rejected_with_the_differences(options: Options, change: dict, difference: str) -> None:
    (folder,) = commit_parent(options, BASIC)
    write_recipe(Path(options.recipe), **change)
    with pytest.raises(
        ConfigError, match=f"^{folder}: history differs from this run: .*{difference}.*; branch from another"
    ):
        resolve(options)
    assert not options.run_dir.exists()


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("seed = 1", "seed = 2", "recipe.seed is 1 there and 2 now"),
        ("global_batch_tokens = 256\nweights = { slim", "global_batch_tokens = 128\nweights = { slim",
         "global_batch_tokens is 256 there and 128 now"),
        ("sequence_length = 32", "sequence_length = 16", "recipe.sequence_length is 32 there and 16 now"),
    ],
)  # fmt: skip
def test_different_settings_are_a_different_history(options: Options, old: str, new: str, difference: str) -> None:
    commit_parent(options, BASIC)
    recipe = Path(options.recipe)
    recipe.write_text(recipe.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=difference):
        resolve(options)


def test_a_different_optimizer_is_rejected_unless_allowed_by_name(options: Options) -> None:
    commit_parent(options, BASIC)
    config = json.loads(options.deepspeed_config.read_text())
    config["optimizer"]["params"]["lr"] = 1.0
    options.deepspeed_config.write_text(json.dumps(config))
    key = "deepspeed_config.optimizer.params.lr"
    with pytest.raises(ConfigError, match=f"{key} is 0.003 there and 1.0 now; .* --allow-change {key}$"):
        resolve(options)
    assert resolve(replace(options, allow_change=(key,))).parent is not None


def test_only_the_data_of_the_history_count(options: Options) -> None:
    (folder,) = commit_parent(options, BASIC)
    manifest = json.loads((folder / "manifest.json").read_text())
    for source, is_past in (("starcoderdata", False), ("slimpajama", True)):
        manifest["run"]["data"]["train"][source]["bin_sha256"] = ["0" * 64]
        (folder / "manifest.json").write_text(json.dumps(manifest))
        if is_past:
            with pytest.raises(ConfigError, match="data.train.slimpajama.bin_sha256.0 is .* --allow-change data$"):
                resolve(options)
        else:
            assert resolve(options).parent is not None


def test_equal_weights_in_a_different_order_are_a_different_history(options: Options) -> None:
    """Of two sources with one weight the first named goes first."""
    for name, first in (
        ("parent", "slimpajama = 1, starcoderdata = 1"),
        ("child", "starcoderdata = 1, slimpajama = 1"),
    ):
        write_recipe(options.run_dir.with_name(f"{name}.toml"), first=first)
    commit_parent(options, BASIC)
    with pytest.raises(ConfigError, match='sources.0 is "slimpajama" there and "starcoderdata" now'):
        resolve(options)


def test_a_run_that_is_complete_leaves_nothing_to_train(options: Options) -> None:
    folders = commit_parent(options, BASIC, STEPS)
    with pytest.raises(ConfigError, match=f"{folders[1]}: is the last of {STEPS} steps"):
        resolve(replace(options, branch_from=folders[1]))
    parent = resolve(options).parent
    assert parent is not None
    assert parent.step == BASIC


@pytest.mark.parametrize("place", ["parent", "parent/checkpoints/step_00000004"])
def test_a_parent_without_a_checkpoint_is_rejected(options: Options, tmp_path: Path, place: str) -> None:
    with pytest.raises(ConfigError, match=f"^{tmp_path / place}: holds no checkpoint"):
        resolve(replace(options, branch_from=tmp_path / place))


def test_a_branch_keeps_its_parent_whatever_the_parent_does(options: Options, tmp_path: Path) -> None:
    first, second = commit_parent(options, 4, BASIC)
    begun = resolve(replace(options, branch_from=first))
    open_run_directory(begun)
    for branch_from in (None, first, tmp_path / "parent"):
        assert resolve(replace(options, branch_from=branch_from)).parent == begun.parent
    with pytest.raises(ConfigError, match=rf"run.json: holds a run that began with {first}, not with {second}; choose"):
        resolve(replace(options, branch_from=second))
    assert begun.parent is not None
    assert verify_parent(begun.parent) == first
    (first / "manifest.json").write_text((second / "manifest.json").read_text())
    with pytest.raises(ConfigError, match="manifest.json: has changed since this run was branched off"):
        verify_parent(begun.parent)


def test_a_source_is_excluded_from_the_checkpoint_on(options: Options) -> None:
    """It is still validated, the samples before are the parent's, and the same command resumes."""
    commit_parent(options, 4, 8)
    at = 8 * STEP_TOKENS
    ablated = replace(options, without=Ablation("starcoderdata", at))
    run, whole = resolve(ablated), resolve(replace(options, branch_from=None))
    assert run.parent is not None
    assert (run.parent.step, run.plan.total_steps) == (8, STEPS)
    assert [held_out.source for held_out in run.evaluation.validation] == ["slimpajama", "starcoderdata"]
    orders = [each.data.order for each in (run, whole)]
    assert orders[0].counts(8 * BATCH) == orders[1].counts(8 * BATCH)
    assert orders[0].counts(STEPS * BATCH)["starcoderdata"] == orders[0].counts(8 * BATCH)["starcoderdata"]
    assert [stage["weights"] for stage in run.description["recipe"]["stages"]][-1] == {"slimpajama": 0.5}
    open_run_directory(run)
    shutil.rmtree(options.run_dir.with_name("parent") / "checkpoints")
    assert resolve(ablated).parent == run.parent


def test_a_source_is_excluded_from_the_beginning(options: Options) -> None:
    run = resolve(replace(options, branch_from=None, without=Ablation("starcoderdata")))
    assert run.recipe.sources == ["slimpajama"] == list(run.description["data"]["train"])
    assert [held_out.source for held_out in run.evaluation.validation] == ["slimpajama", "starcoderdata"]


def test_a_source_can_only_be_excluded_at_a_checkpoint(options: Options) -> None:
    commit_parent(options, 4, 8)
    ablated = replace(options, without=Ablation("starcoderdata", 7 * STEP_TOKENS))
    with pytest.raises(ConfigError, match="has no checkpoint of 1,792 tokens; expected one of 1,024, 2,048 tokens"):
        resolve(ablated)
    with pytest.raises(ConfigError, match="--without starcoderdata@1792: expected --branch-from RUN, a run with a"):
        resolve(replace(ablated, branch_from=None))


def test_a_run_that_is_there_does_not_become_a_branch(options: Options) -> None:
    commit_parent(options, BASIC)
    open_run_directory(resolve(replace(options, branch_from=None)))
    with pytest.raises(
        ConfigError, match=r"run.json: holds a run that is not a branch, not with .*parent; choose another"
    ):
        resolve(options)


def test_samples_excluded_by_the_parent_stay_excluded(options: Options) -> None:
    """Two rollbacks that touch, and a skipped step; not what came after the checkpoint."""
    parent_dir = options.run_dir.with_name("parent")
    parent_dir.mkdir()
    mine = [
        Entry(ROLLED_BACK, 3, 16, 23, "spike"),
        Entry(SKIPPED, 4, 32, 39, "bad"),
        Entry(ROLLED_BACK, 4, 24, 31, "-"),
    ]
    for entry in [*mine, Entry(SKIPPED, 7, 64, 71, "later"), Entry(ROLLED_BACK, 9, 80, 87, "later")]:
        record(parent_dir, entry)
    commit_parent(options, BASIC, left_out=[[16, 31]])
    run = resolve(options)
    assert run.data.order.excluded_samples == [range(16, 32)]
    open_run_directory(run)
    assert read_ledger(options.run_dir) == mine
    assert resolve(options).rollbacks == run.rollbacks
    record(options.run_dir, Entry(ROLLED_BACK, 8, 72, 79, "its own"))
    assert resolve(options).rollbacks == run.rollbacks + 1
    assert resolve(options).data.order.excluded_samples == [range(16, 32), range(72, 80)]
    assert run.data.order.counts(BATCH)["slimpajama"] * SEQUENCE_LENGTH == STEP_TOKENS
