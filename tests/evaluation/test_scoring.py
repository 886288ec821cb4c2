"""Scores during training: those of `evaluate` for the same weights, and the run is bit-identical without them."""

import json
import re
from pathlib import Path

import pytest
import torch
from forked import pretrain
from launching import STEP_TOKENS, read_series, write_deepspeed_config, write_recipe
from local_tasks import write_tasks
from test_resume import tensors_of

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest
from tinyllama_ds.cli import main
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED, EXIT_RESTART

datasets = pytest.importorskip("datasets")  # of the extra `eval`; collecting goes on without it
DOCUMENTS, LIMIT, BATCH = 17, 11, 4  # not multiples of each other or of two ranks
BROKEN = """
task: broken
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: !function broken.question
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
process_results: !function broken.judge
metric_list:
  - {{metric: fine, aggregation: mean, higher_is_better: true}}
"""
# The first time rank 0 cannot judge an answer, the second time rank 1 cannot ask, the fourth time the run is to stop.
FUNCTIONS = """
import os
import signal

judged = asked_since = 0


def question(document):
    global asked_since
    if judged and document["answer"] == 0:
        asked_since += 1
        if asked_since == 1 and os.environ["RANK"] == "1":
            raise OSError("no question")
        if asked_since == 3:
            os.kill(os.getpid(), signal.SIGTERM)
    return document["question"]


def judge(document, answers):
    global judged
    if document["answer"] == 0:
        judged += 1
        if judged == 1 and os.environ["RANK"] == "0":
            raise OSError("no judgement")
    return {"fine": 1.0}
"""


def write_scored_recipe(path: Path, steps: int, save_every: int, tasks: list[str], every: int, more: str = "") -> Path:
    write_recipe(path, steps, save_every)
    table = f"tasks = {json.dumps(tasks)}\nevery_tokens = {every * STEP_TOKENS}\nbatch_size = {BATCH}\n{more}"
    path.write_text(f"{path.read_text()}\n[evaluation]\n{table}")
    return path


def read_rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "tasks.jsonl").read_text().splitlines()]


SLOW = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "bfloat16")]


@pytest.mark.parametrize(
    ("stage", "dtype"), [(3, "float32"), *(pytest.param(*case, marks=pytest.mark.all_faults) for case in SLOW)]
)
def test_a_run_scores_what_its_checkpoints_do_and_is_the_same_without(
    stage: int, dtype: str, data_dir: Path, tmp_path: Path
) -> None:
    """The same few examples are drawn each time; the random numbers of training are unchanged."""
    choice, _, generation = write_tasks(tmp_path, DOCUMENTS)
    config, how = write_config(tmp_path / "ds.json", stage, dtype)
    tasks = [choice.name, generation.name]  # next to the recipe
    recipe = write_scored_recipe(tmp_path / "with.toml", 6, 4, tasks, every=4, more=f"limit = {LIMIT}\n")
    run, without = tmp_path / "with", tmp_path / "without"
    for where, which in ((run, recipe), (without, write_recipe(tmp_path / "without.toml", 6, 4))):
        finished = pretrain(which, config, data_dir, where, 2, *how)
        assert finished.returncode == EXIT_FINISHED, finished.stderr
        assert ("local_choice acc 0." in finished.stdout) == (where == run)
    checkpoints = find_checkpoints(run)
    assert [row["step"] for row in read_rows(run)] == [4, 4, 4, 6, 6, 6]
    for checkpoint in checkpoints:
        progress = read_manifest(checkpoint).progress
        arguments = [checkpoint, "--task-file", choice, generation, "--limit", LIMIT, "--batch-size", BATCH]
        arguments += ["--dtype", dtype, "--output", tmp_path / checkpoint.name, "--device", "cpu"]
        assert main(["evaluate", *map(str, arguments)]) == EXIT_FINISHED
        expected = json.loads((tmp_path / checkpoint.name / "tasks.json").read_text())["scores"]
        rows = [row for row in read_rows(run) if row["step"] == progress.step]
        assert rows == [{"step": progress.step, "tokens": progress.tokens} | score for score in expected]
    values = [row["value"] for row in read_rows(run) if row["metric"] == "acc_norm"]
    assert read_series(run, "Tasks/local_choice/acc_norm") == values

    assert read_series(run, "Train/Loss") == read_series(without, "Train/Loss")
    for ours, theirs in zip(checkpoints, find_checkpoints(without), strict=True):
        assert read_manifest(ours).progress == read_manifest(theirs).progress  # the chain of samples is in it
        found, unscored = tensors_of(ours), tensors_of(theirs)
        assert [place for place in unscored if not torch.equal(found[place], unscored[place])] == []


def write_config(path: Path, stage: int, dtype: str) -> tuple[Path, list[str]]:
    """In bf16 some parameters stay whole on every rank, and blocks are compiled."""
    write_deepspeed_config(path, stage, micro_batch=2)
    if dtype == "float32":
        return path, []
    config = json.loads(path.read_text()) | {"bf16": {"enabled": True}}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 1000
    path.write_text(json.dumps(config))
    return path, ["--compile", "on"]


def test_a_failure_does_not_end_the_run_and_a_stop_ends_scoring(data_dir: Path, tmp_path: Path) -> None:
    """A failure on one rank only, after the requests and before; then none; then a stop during the requests."""
    write_tasks(tmp_path, 3)
    run, task = tmp_path / "run", tmp_path / "broken.yaml"
    task.write_text(BROKEN.format(data=tmp_path / "data.jsonl"))
    (tmp_path / "broken.py").write_text(FUNCTIONS)
    recipe = write_scored_recipe(tmp_path / "recipe.toml", 12, 12, [str(task)], every=2)
    finished = pretrain(recipe, write_deepspeed_config(tmp_path / "ds.json", 1, micro_batch=2), data_dir, run, 2)
    assert finished.returncode == EXIT_RESTART, finished.stderr
    assert re.findall(r"step (\d).*: scoring on tasks failed, continuing: (.*)", finished.stdout) == [
        ("2", "rank 0: OSError: no judgement"),
        ("4", "rank 1: OSError: no question"),
        ("8", "rank 0: StopRequested: a stop was requested"),
    ]
    assert [(row["step"], row["metric"], row["value"]) for row in read_rows(run)] == [(6, "fine", 1.0)]
    assert [read_manifest(checkpoint).progress.step for checkpoint in find_checkpoints(run)] == [9]
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("tasks", "more", "sentence"),
    [
        (["absent.yaml"], "", "absent.yaml: is missing; expected a task file of lm-eval"),
        (["commonsense"], 'data_dir = "nothing"', "nothing: is not a directory"),
        (["commonsense"], 'data_dir = "."', "dataset Rowan/hellaswag: is not in "),
        (
            ["instruct"],
            "",
            "humaneval runs model-written code; expected `tinyllama-ds evaluate` with",
        ),
        (["local.yaml"], "", "task local_generation generates up to 200 tokens; expected fewer than the 128 positions"),
    ],
)
def test_tasks_that_cannot_be_scored_are_rejected_before_anything_starts(
    tasks: list[str],
    more: str,
    sentence: str,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # both were imported by tests before
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    generation = write_tasks(tmp_path, 3)[-1]
    (tmp_path / "local.yaml").write_text(generation.read_text().replace("max_gen_toks: 12", "max_gen_toks: 200"))
    recipe = write_scored_recipe(tmp_path / "recipe.toml", 6, 6, tasks, every=1, more=more)
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    arguments = ["--recipe", recipe, "--deepspeed-config", config, "--data", data_dir, "--run-dir", tmp_path / "run"]
    assert main(["pretrain", *map(str, arguments), "--num-gpus", "2"]) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert re.fullmatch(rf"tinyllama-ds: recipe 'small': evaluation: .*{re.escape(sentence)}.*\n", said), said
    assert not (tmp_path / "run").exists()
