"""`prefer`: DPO by TRL on ranks, its result imported, and its margins computed again by our decoder."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
import torch
from launching import write_deepspeed_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tinyllama_ds.cli import main
from tinyllama_ds.commands.trained import prefer as command
from tinyllama_ds.data.chat import Message, conversation_ids
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.hf.convert import ExportOptions, export
from tinyllama_ds.hf.model_folder import open_model_folder, verify_model_folder, write_model_folder
from tinyllama_ds.launch.launcher import PREFER, Placement
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import LlamaForCausalLM, assign_weights, build_model
from tinyllama_ds.preference.pairs import read_pairs

CONFIG = MODEL_SIZES["test"]
ADAM = {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0,
                                    "torch_adam": True}}  # fmt: skip
BETA = 0.2


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "hf"
    model = build_model(CONFIG, "eager", 1)
    export(model.state_dict().items(), CONFIG, tokenizer, folder, ExportOptions(is_chat_model=True))
    return folder


def write_pairs(path: Path, count: int, seed: int) -> Path:
    """Of answers that use different words."""
    chance = random.Random(seed)

    def said(role: str, *words: str) -> dict:
        return {"role": role, "content": " ".join(chance.choices(words, k=chance.randint(2, 6)))}

    lines = []
    for _ in range(count):
        question = said("user", "a", "model", "reads", "writes")
        chosen, rejected = said("assistant", "token", "shard"), said("assistant", "loss", "rate")
        lines.append(json.dumps({"chosen": [question, chosen], "rejected": [question, rejected]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def on_forked_ranks(options: object, placement: Placement) -> int:
    """As the launcher starts them."""
    words = command.words_of(command.add_tuning_arguments, command.with_absolute_paths(options))
    finished = forked.on_ranks(forked.run_module, PREFER, *words, ranks=placement.world_size)
    sys.stderr.write(finished.stderr)
    return finished.returncode


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.setattr(command, "_run_ranks", on_forked_ranks)
    return


def log_probability(model: LlamaForCausalLM, tokenizer: Tokenizer, messages: list[dict]) -> float:
    """Of an answer and its EOS."""
    ids, mask = conversation_ids(tokenizer, [Message(**message) for message in messages])
    tokens, answers = torch.tensor([ids]), torch.tensor(mask[1:]).bool()
    answers[: len(conversation_ids(tokenizer, [Message(**message) for message in messages[:-1]])[0]) - 1] = False
    with torch.no_grad():
        log_probabilities = model(tokens[:, :-1]).log_softmax(dim=-1)[0]
    return log_probabilities.gather(1, tokens[0, 1:, None])[answers].sum().item()


def margins(tuned: LlamaForCausalLM, start: LlamaForCausalLM, tokenizer: Tokenizer, path: Path) -> list[float]:
    """DPO's rewards of the chosen answers less those of the rejected ones."""

    def reward(pair: dict, key: str) -> float:
        messages = pair["prompt"] + pair[key]
        return BETA * (log_probability(tuned, tokenizer, messages) - log_probability(start, tokenizer, messages))

    return [reward(pair, "chosen") - reward(pair, "rejected") for pair in read_pairs(path)]


def test_two_ranks_under_zero_3(chat_folder: Path, tokenizer: Tokenizer, tmp_path: Path, forked_ranks: None) -> None:
    """The imported model has, by our own decoder and template, the margins that TRL reports for validation."""
    output, validation = tmp_path / "tuned", write_pairs(tmp_path / "validation.jsonl", 8, 2)
    config = write_deepspeed_config(tmp_path / "ds.json", stage=3, micro_batch=2, optimizer=ADAM)
    arguments = ["--preferences", write_pairs(tmp_path / "train.jsonl", 32, 1), "--validation", validation]
    arguments += ["--deepspeed-config", config, "--batch-size", 8, "--learning-rate", 3e-3, "--beta", BETA]
    assert main(["prefer", *map(str, [chat_folder, output, *arguments, "--epochs", 2, "--num-gpus", 2])]) == 0

    report = json.loads((output / "preferences.json").read_text())
    assert report["history"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert report["summary"]["last steps"]["margin"] > 0.5
    folder = open_model_folder(output / "model")
    verify_model_folder(folder)
    assert folder.tokenizer.sha256 == tokenizer.sha256
    with torch.device("meta"):
        tuned = LlamaForCausalLM(CONFIG)
    assign_weights(tuned, dict(folder.tensors()))
    found = margins(tuned, build_model(CONFIG, "eager", 1), tokenizer, validation)
    assert sum(found) / len(found) == pytest.approx(report["summary"]["validation"]["margin"], rel=2e-3)
    assert sum(margin > 0 for margin in found) / len(found) == report["summary"]["validation"]["accuracy"]

    assert (output / "hf" / "chat_template.jinja").read_text() == (chat_folder / "chat_template.jinja").read_text()
    [events] = (output / "tensorboard").glob("events*")
    logged = EventAccumulator(str(events))
    logged.Reload()
    assert {"train/rewards/margins", "train/rewards/accuracies", "eval/rewards/margins"} <= set(
        logged.Tags()["scalars"]
    )
    assert sorted(path.name for path in output.iterdir()) == [
        "hf", "model", "preferences.json", "preferences.png", "tensorboard"
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"tuned", "ds.json", "train.jsonl", "validation.jsonl"}


def rejected(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["prefer", *map(str, arguments)]) == EXIT_CONFIG
    return capsys.readouterr().err


def test_wrong_input(
    chat_folder: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    pairs = write_pairs(tmp_path / "train.jsonl", 4, 1)
    config = write_deepspeed_config(tmp_path / "ds.json", stage=2, micro_batch=2, optimizer=ADAM)
    rest = ["--preferences", pairs, "--deepspeed-config", config, "--num-gpus", 2]
    output = tmp_path / "tuned"
    message = rejected(capsys, chat_folder, output, *rest, "--batch-size", 7)
    assert "--batch-size 7: expected a multiple of the 2 ranks" in message
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    assert "has no chat template" in rejected(capsys, tmp_path / "base", output, *rest)
    model = tmp_path / "model"
    model.mkdir()
    write_model_folder(model, build_model(CONFIG, "eager", 1).state_dict().items(), CONFIG, tokenizer)
    assert "model: was not trained on conversations" in rejected(capsys, model, output, *rest)
    assert "already exists" in rejected(capsys, chat_folder, tmp_path / "base", *rest)
    assert not output.exists()
    assert not list(tmp_path.glob(".*"))


def test_without_trl(
    chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    config = write_deepspeed_config(tmp_path / "ds.json", stage=2, micro_batch=2, optimizer=ADAM)
    rest = ["--preferences", tmp_path / "p.jsonl", "--deepspeed-config", config]
    assert "pip install 'tinyllama_ds[prefer]'" in rejected(capsys, chat_folder, tmp_path / "tuned", *rest)
