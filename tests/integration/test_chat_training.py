"""Training on conversations: the loss of the answers over the whole global batch, however it is cut up and packed."""

import json
import sys
from pathlib import Path

import pytest
from chats import conversations, prepare_chat, write_chat_recipe, write_records
from launching import BATCH, pretrain, read_series, run, write_deepspeed_config

from tinyllama_ds.data.tokenizer import Tokenizer

STEPS = 8
TOLERANCE = 1e-5  # relative, fp32


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
    return write_chat_recipe(tmp_path_factory.mktemp("recipe") / "chat.toml", STEPS)


@pytest.fixture(scope="module")
def reference(recipe: Path, chat_data: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of every step, each conversation alone in a plain PyTorch loop."""
    script = Path(__file__).with_name("plain_chat_loop.py")
    finished = run([sys.executable, str(script), str(recipe), str(chat_data), str(STEPS)])
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.parametrize(("stage", "ranks", "accumulation"), [(0, 1, 4), (0, 2, 2), (3, 2, 4), (3, 2, 1), (1, 2, 4)])
def test_curve_equals_conversations_alone_in_plain_pytorch(
    stage: int, ranks: int, accumulation: int, recipe: Path, reference: dict, chat_data: Path, tmp_path: Path
) -> None:
    config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch=BATCH // ranks // accumulation)
    finished = pretrain(recipe, config, chat_data, tmp_path / "run", ranks)
    assert finished.returncode == 0, finished.stderr
    assert read_series(tmp_path / "run", "Train/Loss") == pytest.approx(reference["loss"], rel=TOLERANCE)
    assert read_series(tmp_path / "run", "Train/GradNorm") == pytest.approx(reference["grad_norm"], rel=1e-4)
    validation = read_series(tmp_path / "run", "Validation/Loss/chat")
    assert len(validation) == 2
    assert validation[1] < validation[0]
