"""Training on conversations: the loss of the answers over the whole global batch, however it is cut up and packed.

And the page about it, command by command.
"""

import io
import json
import shutil
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from chats import conversations, prepare_chat, write_chat_recipe, write_records
from forked import on_ranks, plain_curves, pretrain, run_module, tinyllama_ds
from launching import BATCH, read_series, write_deepspeed_config
from test_docs import commands_of

from tinyllama_ds.checkpoint.format import find_checkpoints, read_manifest
from tinyllama_ds.checkpoint.initial_weights import fill_model, open_initial_weights
from tinyllama_ds.checkpoint.reader import stream_weights
from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.launch.launcher import PRETRAIN
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import build_model

STEPS = 8
TOLERANCE = 1e-5  # relative, fp32
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def chat_data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    root = tmp_path_factory.mktemp("chat")
    records = [{"messages": messages} for messages in conversations(200)]
    write_records(root / "raw" / "train" / "a.jsonl", records[:100])
    write_records(root / "raw" / "train" / "b.jsonl", records[100:190])
    write_records(root / "raw" / "validation" / "c.jsonl", records[190:])
    prepare_chat(root / "raw", tokenizer.path, root / "data")
    return root / "data"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_recipe(tmp_path_factory.mktemp("recipe") / "chat.toml", STEPS, save_every=STEPS // 2)


@pytest.fixture(scope="module")
def reference(recipe: Path, chat_data: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of every step, each conversation alone in a plain PyTorch loop."""
    return plain_curves("plain_chat_loop.py", recipe, chat_data, STEPS)


@pytest.fixture(scope="module")
def finished_run(recipe: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 3 on two ranks, four micro batches of one sample each."""
    root = tmp_path_factory.mktemp("finished")
    config = write_deepspeed_config(root / "ds.json", 3, micro_batch=1)
    finished = pretrain(recipe, config, chat_data, root / "run", 2)
    assert finished.returncode == 0, finished.stderr
    return root / "run"


def assert_curve_is(reference: dict[str, list[float]], run_dir: Path) -> None:
    assert read_series(run_dir, "Train/Loss") == pytest.approx(reference["loss"], rel=TOLERANCE)
    assert read_series(run_dir, "Train/GradNorm") == pytest.approx(reference["grad_norm"], rel=1e-4)


def test_stage_3_on_two_ranks_is_conversations_alone_in_plain_pytorch(reference: dict, finished_run: Path) -> None:
    assert_curve_is(reference, finished_run)
    validation = read_series(finished_run, "Validation/Loss/chat")
    assert validation[-1] < validation[0]


def test_so_is_stage_0_after_a_stop_with_another_micro_batch(
    recipe: Path, reference: dict, chat_data: Path, finished_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(find_checkpoints(tmp_path / "run")[-1])
    config = write_deepspeed_config(tmp_path / "ds.json", 0, micro_batch=BATCH // 4)
    finished = pretrain(recipe, config, chat_data, tmp_path / "run", 2)
    assert finished.returncode == 0, finished.stderr
    assert f"resumed at step {STEPS // 2}" in finished.stdout
    assert_curve_is(reference, tmp_path / "run")
    chains = {read_manifest(find_checkpoints(place)[-1]).progress.chain for place in (finished_run, tmp_path / "run")}
    assert len(chains) == 1


def test_conversations_need_the_document_mask(chat_data: Path, tmp_path: Path) -> None:
    recipe = write_chat_recipe(tmp_path / "chat.toml", STEPS, document_mask=False)
    config = write_deepspeed_config(tmp_path / "ds.json", 0, micro_batch=2)
    where = ("--data", chat_data, "--run-dir", tmp_path / "run", "--num-gpus", 2)
    finished = tinyllama_ds("pretrain", "--recipe", recipe, "--deepspeed-config", config, *where)
    assert finished.returncode == 78
    assert "the source 'chat' holds conversations, which must not see the others of their row" in finished.stderr
    assert not (tmp_path / "run").exists()


def test_the_page_about_it_works_from_its_first_command_to_its_last(
    finished_run: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """At toy size; the run above stands for the quickstart's. Preferences have a test of their own (test_prefer.py)."""
    monkeypatch.chdir(tmp_path)
    recipe = write_chat_recipe(tmp_path / "toy.toml", steps=30)
    config = write_deepspeed_config(tmp_path / "toy.json", 3, micro_batch=2)
    shutil.copytree(finished_run, tmp_path / "demo" / "run")
    shutil.copyfile(tokenizer.path, tmp_path / "demo" / "tokenizer.model")
    toy = {"demo-chat": str(recipe), "demo_zero3": str(config), "256": "96"}
    monkeypatch.setattr("sys.stdin", io.StringIO("What does os.getcwd do?\nWhere is it defined?\n"))
    for command in takewhile(lambda command: command[1] != "prefer", commands_of(DOCS / "chat.md")):
        arguments = [toy.get(argument, argument) for argument in command[1:]]
        if arguments[0] == "pretrain":
            finished = on_ranks(run_module, PRETRAIN, *arguments[1:], ranks=2)
            assert finished.returncode == 0, finished.stderr
        else:
            assert main(arguments) == 0, arguments
    answers = capsys.readouterr().out.splitlines()[-2:]
    assert all(answers)
    losses = read_series(tmp_path / "demo" / "chat", "Validation/Loss/chat")
    assert losses[-1] < losses[0] - 0.1
    described = json.loads((tmp_path / "demo" / "chat" / "run.json").read_text())["init_from"]
    assert described["path"].endswith(f"demo/run/checkpoints/step_{STEPS:08d}")
    assert (tmp_path / "demo" / "chat-hf" / "chat_template.jinja").is_file()


def test_weights_are_taken_over_bit_for_bit(finished_run: Path, tokenizer: Tokenizer) -> None:
    config = MODEL_SIZES["test"]
    model = build_model(config, "eager", seed=2)
    fill_model(model, open_initial_weights(finished_run, config, tokenizer))
    _, weights = stream_weights(find_checkpoints(finished_run)[-1])
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights)
    with pytest.raises(ConfigError, match="its model has vocab_size 512; the recipe's has 2048"):
        open_initial_weights(finished_run, MODEL_SIZES["demo"], tokenizer)
