"""The commands of docs/models.md as they stand, at toy size, one after another (`--real`)."""

import json
import re
from pathlib import Path

import pytest
from hf_folders import write_hf_folder
from launching import SEQUENCE_LENGTH, STEP_TOKENS, read_series, tinyllama_ds, write_deepspeed_config
from made_up import made_up_text
from test_docs import commands_of

from tinyllama_ds.config.recipe import RECIPE_DIRECTORY
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.model.config import MODEL_SIZES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def make_small(recipe: str) -> str:
    """A recipe with the same keys and weights, its model, sequence and tokens those of a toy."""
    recipe = re.sub(r'model = ".*"', 'model = "test"', recipe)
    recipe = re.sub(r"sequence_length = .*", f"sequence_length = {SEQUENCE_LENGTH}", recipe)
    sizes = {"global_batch_tokens": 1, "ramp_tokens": 2, "tokens": 8, "evaluate_tokens": 8, "save_tokens": 8}  # steps
    for key, steps in sizes.items():
        recipe = re.sub(rf"^{key} = .*", f"{key} = {steps * STEP_TOKENS}", recipe, flags=re.M)
    return recipe


META = {"redpajama_set_name": "RedPajamaC4"}


@pytest.fixture
def workplace(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader of the page stands: the released folder, raw corpora, the recipe of the page."""
    write_hf_folder(tmp_path / "TinyLlama-1.1B-intermediate-step-1431k-3T", MODEL_SIZES["test"], tokenizer)
    for number, (place, field) in enumerate(
        (("SlimPajama-627B/train", "text"), ("SlimPajama-627B/validation", "text"), ("starcoderdata/python", "content"))
    ):
        folder = tmp_path / "raw" / place
        folder.mkdir(parents=True)
        lines = [json.dumps({field: made_up_text(100 * number + index, 300), "meta": META}) for index in range(30)]
        (folder / "a.jsonl").write_text("\n".join(lines))
    recipe = re.search(r"^```toml\n(.*?)^```", PAGE.read_text(), flags=re.M | re.S)[1]
    (tmp_path / "continual.toml").write_text(make_small(recipe))
    python = (RECIPE_DIRECTORY / "tinyllama-python-8k.toml").read_text()
    (tmp_path / "tinyllama-python-8k.toml").write_text(make_small(python))
    write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.real
def test_the_commands_of_the_page_work(workplace: Path) -> None:
    for command in commands_of(PAGE):
        arguments = ["ds.json" if part.startswith("zero3_") else part for part in command[1:]]
        arguments = [f"{part}.toml" if part == "tinyllama-python-8k" else part for part in arguments]
        more = ["--num-gpus", 2] if command[1] == "pretrain" else []
        finished = tinyllama_ds(*arguments, *more)
        assert finished.returncode == 0, f"{command}: {finished.stdout}{finished.stderr}"
        assert command[1] != "generate" or finished.stdout.startswith(command[3])
    losses = read_series(workplace / "runs" / "continual", "Validation/Loss/slimpajama")
    assert losses[-1] < losses[0]
