"""A student's training on cached predictions is that with its teacher at hand, over stages and ranks."""

import json
import shutil
from pathlib import Path

import pytest
from chats import conversations, prepare_chat, write_chat_recipe, write_records
from forked import on_ranks, pretrain, run_script
from hf_folders import write_hf_folder
from launching import BATCH, SEQUENCE_LENGTH, read_series, write_deepspeed_config, write_recipe

from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.hf.teacher import Teaching, teach
from tinyllama_ds.model.config import MODEL_SIZES

STEPS, K = 6, 16
TABLE = "\n[teacher]\nweight = {weight}\ntemperature = 2\n"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return write_hf_folder(tmp_path_factory.mktemp("teacher") / "hf", MODEL_SIZES["test"], tokenizer)


@pytest.fixture(scope="module")
def taught_data(tmp_path_factory: pytest.TempPathFactory, data_dir: Path, teacher: Path) -> Path:
    data = tmp_path_factory.mktemp("taught") / "data"
    shutil.copytree(data_dir, data)
    for source in ("slimpajama", "starcoderdata"):
        teach(Teaching(teacher, data, source, SEQUENCE_LENGTH, document_mask=False, teacher_top_k=K), workers=1)
    return data


def recipe_of(path: Path, weight: float = 0.7) -> Path:
    write_recipe(path, STEPS, save_every=STEPS)
    path.write_text(path.read_text() + TABLE.format(weight=weight))
    return path


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, taught_data: Path) -> Path:
    """Stage 3 on two ranks, with accumulation."""
    root = tmp_path_factory.mktemp("finished")
    config = write_deepspeed_config(root / "ds.json", 3, micro_batch=1)
    finished = pretrain(recipe_of(root / "small.toml"), config, taught_data, root / "run", 2)
    assert finished.returncode == 0, finished.stderr
    assert "(KL " in finished.stderr
    return root / "run"


def test_the_losses_are_those_with_an_online_teacher(
    finished_run: Path, taught_data: Path, teacher: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("plain_distillation_loop.py")
    recipe = recipe_of(tmp_path / "small.toml")
    finished = on_ranks(run_script, script, recipe, taught_data, STEPS, teacher, K, ranks=1)
    assert finished.returncode == 0, finished.stderr
    curves, parts = map(json.loads, finished.stdout.splitlines())
    assert read_series(finished_run, "Train/Loss") == pytest.approx(parts["cross_entropy"], rel=1e-3)
    assert read_series(finished_run, "Train/Distillation") == pytest.approx(parts["divergence"], rel=1e-3)
    assert read_series(finished_run, "Train/GradNorm") == pytest.approx(curves["grad_norm"], rel=1e-3)
    assert parts["divergence"][-1] < parts["divergence"][0]


@pytest.mark.parametrize(
    ("stage", "ranks", "micro_batch", "shared"),
    [(0, 1, BATCH, 1), (1, 2, 2, 1), (2, 1, 4, 1), pytest.param(3, 2, 4, 2, marks=pytest.mark.all_faults)],
)
def test_stages_and_ranks_have_the_same_curves(
    stage: int, ranks: int, micro_batch: int, shared: int, finished_run: Path, taught_data: Path, tmp_path: Path
) -> None:
    """Also of ranks that share sequences."""
    recipe, config = (
        recipe_of(tmp_path / "small.toml"),
        write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch),
    )
    sharing = ("--sequence-parallel", str(shared))
    finished = pretrain(recipe, config, taught_data, tmp_path / "run", ranks, *sharing)
    assert finished.returncode == 0, finished.stderr
    for name in ("Train/Loss", "Train/Distillation"):
        found, expected = (read_series(run_dir, name) for run_dir in (tmp_path / "run", finished_run))
        assert len(expected) == STEPS
        assert found == pytest.approx(expected, rel=1e-5)


def test_another_table_or_other_predictions_are_another_run(
    finished_run: Path, taught_data: Path, teacher: Path, tmp_path: Path
) -> None:
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=1)
    finished = pretrain(recipe_of(tmp_path / "other.toml", 0.5), config, taught_data, finished_run, 1)
    assert finished.returncode == EXIT_CONFIG
    assert "recipe.teacher.weight is 0.7 there and 0.5 now" in finished.stderr
    shutil.copytree(taught_data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "slimpajama" / "train" / "teacher")
    recipe = recipe_of(tmp_path / "small.toml")
    finished = pretrain(recipe, config, tmp_path / "data", finished_run, 1)
    assert finished.returncode == EXIT_CONFIG
    assert "slimpajama/train/teacher: holds no predictions of a teacher" in finished.stderr
    teach(Teaching(teacher, tmp_path / "data", "slimpajama", SEQUENCE_LENGTH, False, teacher_top_k=4), workers=1)
    finished = pretrain(recipe, config, tmp_path / "data", finished_run, 1)
    assert finished.returncode == EXIT_CONFIG
    assert "have a different top_k than" in finished.stderr
    teach(Teaching(teacher, taught_data, "slimpajama", SEQUENCE_LENGTH, False, teacher_top_k=K), workers=1)


def test_conversations_are_distilled_within_their_document_and_on_answers(
    teacher: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Stage 3 on two ranks and stage 0 on one agree, though the number of answer tokens of a micro-batch varies."""
    write_records(tmp_path / "raw" / "train" / "a.jsonl", [{"messages": one} for one in conversations(60)])
    prepare_chat(tmp_path / "raw", tokenizer.path, tmp_path / "data")
    recipe = write_chat_recipe(tmp_path / "chat.toml", STEPS)
    recipe.write_text(recipe.read_text() + TABLE.format(weight=1.0))
    length = next(int(line.split()[2]) for line in recipe.read_text().splitlines() if line.startswith("sequence_le"))
    teach(Teaching(teacher, tmp_path / "data", "chat", length, document_mask=True, teacher_top_k=K), workers=1)
    curves = []
    for stage, ranks, micro_batch in ((3, 2, 1), (0, 1, BATCH)):
        config = write_deepspeed_config(tmp_path / "ds.json", stage, micro_batch)
        finished = pretrain(recipe, config, tmp_path / "data", tmp_path / f"run{stage}", ranks)
        assert finished.returncode == 0, finished.stderr
        curves.append(read_series(tmp_path / f"run{stage}", "Train/Distillation"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] < curves[0][0]
