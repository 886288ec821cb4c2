"""Ranks that share sequences train as one rank does: the same samples, losses, gradients and weights."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from chats import conversations, prepare_chat, write_chat_recipe, write_records
from forked import on_ranks, pretrain
from launching import read_series, write_deepspeed_config, write_recipe
from test_elastic import stop_after

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest
from tinyllama_ds.checkpoint.reader import stream_weights
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.distributed.collectives import sum_over_ranks
from tinyllama_ds.distributed.world import DistributedInfo, read_world
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.validation import mean_losses, sample_losses
from tinyllama_ds.health.guard import all_reduce_step_status
from tinyllama_ds.health.probe import take_probe
from tinyllama_ds.run.resolve import Options, resolve_run
from tinyllama_ds.train.batches import count_targets, open_loader
from tinyllama_ds.train.engine import hard_exit, set_learning_rate, start_process_group
from tinyllama_ds.train.phase_clock import PhaseClock
from tinyllama_ds.train.setup import ResumePoint, start_engine
from tinyllama_ds.train.step import accumulate_gradients, apply_gradients

STEPS = 6
TOLERANCE = 1e-5  # relative, fp32
LAYOUTS = [(2, 2), (4, 4), (2, 4)]  # ranks that share a sequence, of all ranks; the model has 2 key heads
STAGES, DATA, COMPUTING = (0, 1, 2, 3), ("rows", "documents", "packed", "chat"), ("plain", "recomputed", "compiled")
COVERING = {  # every stage, data and way of computing with 2 and with 4 ranks or key heads, by layout
    (2, 2): [(0, "rows", "plain"), (3, "documents", "compiled"), (1, "packed", "recomputed")],
    (4, 4): [(1, "documents", "plain"), (2, "chat", "recomputed"), (3, "chat", "plain")],
    (2, 4): [(0, "chat", "recomputed"), (2, "documents", "plain"), (3, "chat", "recomputed")],
}
SAMPLES = '[samples]\nprompts = ["the small llama", "loss"]\nevery_tokens = 2048\nnew_tokens = 5\n'


def train_all(settings: Path, sequence_parallel: int) -> None:
    """Rank 0 prints what each of the trainings has come to. Collective."""
    world = replace(read_world(), sequence_parallel=sequence_parallel)
    start_process_group(world)
    found = {}
    for name, setting in json.loads(settings.read_text()).items():
        paths = {key: Path(setting[key]) for key in ("deepspeed_config", "data", "run_dir")}
        options = Options(**setting | paths, sequence_parallel=sequence_parallel)
        with torch.compiler.set_stance("default", force_backend="aot_eager"):
            found[name] = train(options, world)
    if world.is_rank0:
        print(json.dumps(found))
    hard_exit(0)


def train(options: Options, world: DistributedInfo) -> dict[str, list[float]]:
    """The figures of every step, and of the weights at the end. Collective."""
    run = resolve_run(options, world.size, "cpu", bf16=False)
    engine, _ = start_engine(run, world, ResumePoint())
    batches, clock = open_loader(run, world, 0), PhaseClock(world.device)
    rows = []
    for step in run.plan.steps(0):
        set_learning_rate(engine, run.schedule.ratio(step.tokens_after))
        accumulation = step.batch // world.data_size // run.micro_batch
        loss = accumulate_gradients(engine, batches, accumulation, count_targets(run, step), world, clock)
        norm = apply_gradients(engine)
        status = all_reduce_step_status(False, False, False, batches.take_digest(), loss, norm)
        rows.append((status.digest, status.loss, status.grad_norm))
    figures = dict(zip(("samples", "loss", "gradient norm"), zip(*rows, strict=True), strict=True))
    held_out = sample_losses(run.evaluation.validation, engine, sum_over_ranks, world, run.micro_batch)
    validation = [*mean_losses(held_out).values(), take_probe(engine, run, world).loss]
    return figures | {"validation and probe": validation}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, tokenizer: Tokenizer) -> Path:
    """Text, and conversations."""
    root = tmp_path_factory.mktemp("shared")
    shutil.copytree(data_dir, root / "data")
    raw = root / "raw" / "train"
    records = [{"messages": messages} for messages in conversations()]
    write_records(raw / "chat.jsonl", records)
    prepare_chat(raw.parent, tokenizer.path, root / "data")
    return root / "data"


Train = Callable[[list[tuple], int, int], dict[str, dict[str, list[float]]]]


@pytest.fixture(scope="module")
def train_in(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Train:
    """Runs combinations of stage, data and way of computing on ranks that share sequences."""
    root = tmp_path_factory.mktemp("trainings")
    recipes = {
        "rows": write_recipe(root / "rows.toml", STEPS, save_every=STEPS),
        "documents": write_recipe(root / "documents.toml", STEPS, save_every=STEPS, document_mask=True),
        "packed": write_recipe(root / "packed.toml", STEPS, save_every=STEPS, document_mask=True, packing="best_fit"),
        "chat": write_chat_recipe(root / "chat.toml", STEPS),
    }

    def train_in(combinations: list[tuple], sequence_parallel: int, ranks: int) -> dict[str, dict[str, list[float]]]:
        settings = {}
        for stage, kind, computing in combinations:
            name = name_of((stage, kind, computing))
            config = root / f"{name}.json".replace(" ", "_")
            write_deepspeed_config(config, stage, 2)
            settings[name] = {
                "recipe": str(recipes[kind]), "deepspeed_config": str(config), "data": str(data),
                "run_dir": str(root / "run"), "compile": "on" if computing == "compiled" else "off",
                "activation_checkpointing": int(computing != "plain"),
            }  # fmt: skip
        file = root / f"{sequence_parallel}_{ranks}.json"
        file.write_text(json.dumps(settings))
        finished = on_ranks(train_all, file, sequence_parallel, ranks=ranks)
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout.splitlines()[-1])

    return train_in


def name_of(combination: tuple) -> str:
    return " ".join(map(str, combination))


@pytest.fixture(scope="module")
def reference(train_in: Train) -> dict[str, dict[str, list[float]]]:
    """One rank, at stage 0, by data."""
    found = train_in([(0, kind, "plain") for kind in DATA], 1, 1)
    by_data = {kind: found[name_of((0, kind, "plain"))] for kind in DATA}
    assert by_data["documents"]["loss"] != pytest.approx(by_data["rows"]["loss"], rel=1e-4), "there are borders in rows"
    return by_data


@pytest.mark.parametrize(("sequence_parallel", "ranks"), LAYOUTS)
def test_curves_are_those_of_one_rank(sequence_parallel: int, ranks: int, train_in: Train, reference: dict) -> None:
    """With key heads fewer than ranks, and with parts of sequences in which nothing is a target."""
    combinations = COVERING[sequence_parallel, ranks]
    assert_like(reference, combinations, train_in(combinations, sequence_parallel, ranks))


@pytest.mark.all_faults
@pytest.mark.parametrize(("sequence_parallel", "ranks"), LAYOUTS)
@pytest.mark.parametrize("stage", STAGES)
def test_all_curves_are_those_of_one_rank(
    stage: int, sequence_parallel: int, ranks: int, train_in: Train, reference: dict
) -> None:
    combinations = list(product([stage], DATA, COMPUTING))
    assert_like(reference, combinations, train_in(combinations, sequence_parallel, ranks))


def assert_like(reference: dict, combinations: list[tuple], found: dict) -> None:
    for combination in combinations:
        name, expected = name_of(combination), reference[combination[1]]
        assert found[name]["samples"] == expected["samples"], name
        for figure in ("loss", "gradient norm", "validation and probe"):
            assert found[name][figure] == pytest.approx(expected[figure], rel=TOLERANCE), (name, figure)


def test_a_run_goes_on_with_other_numbers(data: Path, tmp_path: Path) -> None:
    """From 2 ranks that share sequences to 1, and back, each time to the end. Also its texts and its weights after 20
    steps are those of one rank.
    """
    steps, stops = 20, (5, 15)
    recipe = write_recipe(tmp_path / "small.toml", steps, save_every=5, document_mask=True)
    recipe.write_text(recipe.read_text() + "keep_last = 10\n" + SAMPLES)
    layouts = [(0, 1, "whole"), (3, 2, "run"), (1, 1, "run"), (2, 2, "run")]
    for (stage, shared, name), stop in zip(layouts, (0, 0, *stops), strict=True):
        config = write_deepspeed_config(tmp_path / f"{stage}.json", stage, micro_batch=4)
        stop_after(tmp_path / name, stop)
        finished = pretrain(recipe, config, data, tmp_path / name, shared, "--sequence-parallel", str(shared))
        assert finished.returncode == 0, finished.stderr
        assert (f"resumed at step {stop} " in finished.stdout) == (stop > 0)
        assert_same_run(tmp_path / "run" if name == "run" else tmp_path / "whole", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["sequence_parallel"] == 2


@pytest.mark.all_faults
@pytest.mark.parametrize("shared", [2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_exported_weights_are_those_of_one_rank(stage: int, shared: int, data: Path, tmp_path: Path) -> None:
    """Compiled and recomputed, by the norm of each tensor: Adam makes a step of any gradient, also of one that is all
    rounding.
    """
    recipe = write_recipe(tmp_path / "small.toml", 20, save_every=20, document_mask=True)
    weights = []
    for ranks, flags in ((1, ()), (shared, ("--activation-checkpointing", "1", "--compile", "on"))):
        config = write_deepspeed_config(tmp_path / f"{ranks}.json", stage if ranks > 1 else 0, micro_batch=4)
        numbers = ("--sequence-parallel", str(ranks), *flags)
        finished = pretrain(recipe, config, data, tmp_path / f"run-{ranks}", ranks, *numbers)
        assert finished.returncode == 0, finished.stderr
        weights.append(exported(tmp_path / f"run-{ranks}"))
    for name, expected in weights[0].items():
        assert (weights[1][name] - expected).norm() <= TOLERANCE * expected.norm(), name


def assert_same_run(run: Path, whole: Path) -> None:
    found, expected = (read_manifest(find_checkpoints(path)[-1]) for path in (run, whole))
    assert found.progress == expected.progress, "the same samples in every step"
    for figure in ("Train/Loss", "Train/GradNorm", "Validation/Loss/slimpajama"):
        assert read_series(run, figure) == pytest.approx(read_series(whole, figure), rel=TOLERANCE), figure
    texts = [{(row["tokens"], row["prompt"], row["text"]) for row in rows_of(path)} for path in (run, whole)]
    assert texts[0] == texts[1]
    weights = [exported(path) for path in (run, whole)]
    for name, expected_weight in weights[1].items():
        torch.testing.assert_close(weights[0][name], expected_weight, rtol=0, atol=TOLERANCE, msg=name)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def exported(run: Path) -> dict[str, torch.Tensor]:
    """The weights as `export` writes them."""
    return dict(stream_weights(find_checkpoints(run)[-1])[1])


@pytest.mark.parametrize(
    ("shared", "ranks", "changes", "sentence"),
    [
        (3, 4, {}, "--sequence-parallel 3 does not divide the 4 ranks; numbers that work: 1, 2, 4"),
        (8, 8, {}, "--sequence-parallel 8 does not divide the 4 query heads; numbers that work: 1, 2, 4"),
        (4, 4, {"sequence_length": 32 * 3 + 2}, "does not divide the 98 tokens of a sequence; numbers that work: 1, 2"),
        (2, 6, {}, "8 sequences does not divide over 3 data-parallel ranks"),
    ],
)
def test_what_does_not_divide_is_rejected(
    shared: int, ranks: int, changes: dict, sentence: str, data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "small.toml", STEPS, save_every=STEPS, **changes)
    if changes:  # a batch of whole sequences
        recipe.write_text(recipe.read_text().replace("global_batch_tokens = 256", f"global_batch_tokens = {98 * 8}"))
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=1)
    options = Options(str(recipe), config, data, tmp_path / "run", sequence_parallel=shared)
    with pytest.raises(ConfigError, match=sentence):
        resolve_run(options, ranks, "cpu", bf16=False)


@pytest.mark.all_faults
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_bf16_is_that_of_one_rank_to_its_precision(stage: int, data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "small.toml", 8, save_every=8, document_mask=True)
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=4, bf16={"enabled": True})
    for shared in (1, 2):
        arguments = ("--sequence-parallel", str(shared))
        finished = pretrain(recipe, config, data, tmp_path / str(shared), shared, *arguments)
        assert finished.returncode == 0, finished.stderr
    for figure, tolerance in (("Train/Loss", 3e-3), ("Train/GradNorm", 3e-2)):
        alone, together = (read_series(tmp_path / str(shared), figure) for shared in (1, 2))
        assert together == pytest.approx(alone, rel=tolerance), figure
