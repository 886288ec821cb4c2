"""Another tokenizer in the place of a run's, or of its data's: nothing reads on with it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import pretrain
from launching import write_deepspeed_config, write_recipe
from local_tasks import write_tasks
from made_up import made_up_text

from tinyllama_ds.checkpoint.initial_weights import open_initial_weights
from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.train_tokenizer import train_tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.config import MODEL_SIZES

COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "export": lambda run, out: ["export", run, out / "hf"],
    "generate": lambda run, out: ["generate", run, "the small"],
    "chat": lambda run, out: ["chat", run],
    "evaluate": lambda run, out: ["evaluate", run, "--task-file", write_tasks(out, 3)[0], "--device", "cpu"],
}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("other") / "small.model"
    return train_tokenizer([made_up_text(seed, 2000) for seed in range(5)], 400, path).path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, other: Path) -> Path:
    """A run whose tokenizer has been replaced."""
    root = tmp_path_factory.mktemp("run")
    recipe = write_recipe(root / "small.toml", 6, save_every=6)
    finished = pretrain(recipe, write_deepspeed_config(root / "ds.json", 0, micro_batch=8), data_dir, root / "run", 1)
    assert finished.returncode == 0, finished.stderr
    shutil.copyfile(other, root / "run" / "tokenizer.model")
    return root / "run"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_runs_tokenizer_is_the_one_it_was_trained_with(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(list(map(str, COMMANDS[command](run, tmp_path)))) == 78
    assert f"tinyllama-ds: {run}/tokenizer.model: is not the tokenizer of this run" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_weights_come_with_their_tokenizer(run: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=f"{run}/tokenizer.model: is not the tokenizer of this run"):
        open_initial_weights(run, MODEL_SIZES["test"], tokenizer)


def test_the_data_and_its_tokenizer_belong_together(
    run: Path, data_dir: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For `pretrain`, `data show` and `audit`."""
    data, recipe = tmp_path / "data", run.parent / "small.toml"
    shutil.copytree(data_dir, data)
    shutil.copyfile(other, data / "tokenizer.model")
    finished = pretrain(recipe, run.parent / "ds.json", data, tmp_path / "run", 1)
    assert finished.returncode == 78
    assert f"was made with a different tokenizer than {data}/tokenizer.model" in finished.stderr
    assert main(["data", "show", "0", "--recipe", str(recipe), "--data", str(data)]) == 78
    assert f"was made with a different tokenizer than {data}/tokenizer.model" in capsys.readouterr().err
    assert main(["audit", str(data), "--workers", "1"]) == 78
    assert "slimpajama/train/shard_00000: was made with a different tokenizer" in capsys.readouterr().out
