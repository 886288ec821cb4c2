"""Scores equal those of lm-eval's own `hf` model on the exported folder: a checkpoint's too, on one rank and on two."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import on_ranks, pretrain, run_module
from launching import STEP_TOKENS, run, write_deepspeed_config, write_recipe
from local_tasks import write_tasks

from tinyllama_ds.cli import main
from tinyllama_ds.launch.launcher import SCORE

DOCUMENTS = 17  # not a multiple of two ranks or of the batch


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_tasks(tmp_path_factory.mktemp("tasks"), DOCUMENTS)


@pytest.fixture(scope="module")
def run_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    recipe = write_recipe(folder / "recipe.toml", steps=20, save_every=20)
    config = write_deepspeed_config(folder / "ds.json", stage=3, micro_batch=8)
    finished = pretrain(recipe, config, data_dir, folder / "run", 1)
    assert finished.returncode == 0, finished.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    assert main(["export", str(run_dir), str(run_dir.parent / "hf")]) == 0
    return run_dir.parent / "hf"


@pytest.fixture(scope="module")
def reference(exported: Path, tasks: list[Path]) -> dict[str, Any]:
    """lm-eval's results for the exported folder, started as in its documentation."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(exported), "dtype": "float32"},
        tasks=[str(path) for path in tasks],
        device="cpu",
        batch_size=4,
        log_samples=False,
        task_manager=TaskManager(include_defaults=False),  # its own 14,000 take half a minute to read
    )
    assert found is not None
    return found["results"]


def evaluate(model: Path, tasks: list[Path], output: Path, ranks: int) -> dict[str, Any]:
    arguments = [model, "--task-file", *tasks, "--batch-size", 4, "--output", output, "--device", "cpu"]
    finished = on_ranks(run_module, SCORE, *arguments, ranks=ranks)
    assert finished.returncode == 0, finished.stderr
    return json.loads((output / "tasks.json").read_text())


def test_a_checkpoint_scores_what_lm_evals_own_model_gives_for_the_exported_folder(
    run_dir: Path, tasks: list[Path], reference: dict, tmp_path: Path
) -> None:
    found = evaluate(run_dir, tasks, tmp_path, ranks=1)
    assert reference["local_generation"]["digest,none"] > 0
    assert found["lm_eval"].keys() == reference.keys() == {"local_choice", "local_perplexity", "local_generation"}
    for task, metrics in reference.items():
        assert found["lm_eval"][task] == json.loads(json.dumps(metrics)), task
    assert found["tokens"] == 20 * STEP_TOKENS
    assert {"lm-eval", "transformers", "torch", "datasets"} <= found["versions"].keys()
    by_key = {(score["task"], score["metric"]): score for score in found["scores"]}
    choice = by_key["local_choice", "acc_norm"]
    assert (choice["documents"], choice["shots"], choice["version"]) == (DOCUMENTS, 2, "1.0")
    assert 0 < choice["value"] < 1
    assert choice["stderr"] > 0
    assert "local_choice" in (tmp_path / "tasks.md").read_text()
    assert (tmp_path / "tasks.png").read_bytes().startswith(b"\x89PNG")


def test_two_ranks_give_the_score_of_one(run_dir: Path, tasks: list[Path], reference: dict, tmp_path: Path) -> None:
    found = evaluate(run_dir, tasks, tmp_path, ranks=2)
    assert found["settings"]["ranks"] == 2
    for task, metrics in reference.items():
        for key, value in metrics.items():
            if key.startswith(("acc", "digest")):
                assert found["lm_eval"][task][key] == value, (task, key)
            elif isinstance(value, float):  # its last bits depend on what else is in a batch
                assert found["lm_eval"][task][key] == pytest.approx(value, rel=1e-5), (task, key)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, which the sandbox is made with")
def test_an_error_of_one_rank_is_printed_although_rank_0_is_late(exported: Path, tmp_path: Path) -> None:
    """Rank 0 alone opens the sandbox, which is slow here, while the other rank waits for its result."""
    (tmp_path / "unshare").write_text(f'#!/bin/sh\nsleep 1\nexec {shutil.which("unshare")} "$@"\n')
    (tmp_path / "unshare").chmod(0o755)
    command = [sys.executable, "-m", "tinyllama_ds.cli", "evaluate", exported, "--num-gpus", 2, "--device", "cpu"]
    command += ["--task-file", "humaneval", tmp_path / "absent.yaml", "--allow-code-execution"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    finished = run([*map(str, command), "--output", str(tmp_path / "scores")], PATH=path)
    assert finished.returncode == 78, finished.stderr
    said = [line for line in finished.stderr.splitlines() if line.startswith("tinyllama-ds: ")]
    assert len(said) == 1, finished.stderr
    assert "absent.yaml: is missing; expected a task file of lm-eval" in said[0]
    assert not (tmp_path / "scores").exists()


@pytest.mark.all_faults
def test_the_exported_folder_under_torchrun(exported: Path, tasks: list[Path], reference: dict, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", SCORE]
    arguments = [exported, "--task-file", tasks[0], "--output", tmp_path, "--device", "cpu", "--batch-size", 4]
    finished = run([*command, *map(str, arguments)])
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "tasks.json").read_text())["lm_eval"]["local_choice"]
    for key in ("acc,none", "acc_norm,none", "acc_stderr,none"):
        assert found[key] == reference["local_choice"][key]


@pytest.mark.all_faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_task_that_needs_the_network_is_rejected_without_one(ranks: int, exported: Path, tmp_path: Path) -> None:
    """One sentence, from one rank, exit code 78, and nothing is written."""
    command = [sys.executable, "-m", "tinyllama_ds.cli", "evaluate", str(exported), "--suite", "commonsense"]
    command += ["--num-gpus", str(ranks), "--device", "cpu", "--output", str(tmp_path / "scores")]
    finished = run(command, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="")
    assert finished.returncode == 78, finished.stderr
    said = [line for line in finished.stderr.splitlines() if line.startswith("tinyllama-ds: ")]
    assert len(said) == 1
    assert "dataset Rowan/hellaswag: is not in Hugging Face's cache, and the hub is unreachable" in said[0]
    assert not (tmp_path / "scores").exists()
