"""A run on the tokens of a `tokenizer.json`, from shards to text, with a padded embedding."""

import json
from pathlib import Path

import pytest
from forked import pretrain
from launching import SEQUENCE_LENGTH, write_deepspeed_config, write_recipe

from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizers.storage import load_tokenizer

PIECES = 500  # of the 512 rows of the model
PROMPT = "the small llama"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, fast_data_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("fast_run")
    recipe = write_recipe(root / "small.toml", 6, save_every=6)
    with recipe.open("a") as file:
        file.write(f'[samples]\nprompts = ["{PROMPT}"]\nevery_tokens = 1_000_000_000\nnew_tokens = 8\n')
    config = write_deepspeed_config(root / "ds.json", 3, micro_batch=4)
    finished = pretrain(recipe, config, fast_data_dir, root / "run", 2)
    assert finished.returncode == 0, finished.stderr
    return root / "run"


def test_the_run_has_its_tokenizer_and_decodes_its_samples(run: Path, fast_data_dir: Path) -> None:
    tokenizer = load_tokenizer(run)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (PIECES, 0)
    assert tokenizer.sha256 == load_tokenizer(fast_data_dir).sha256
    described = json.loads((run / "run.json").read_text())
    assert tokenizer.sha256 in json.dumps(described)
    (sample,) = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert sample["prompt"] == PROMPT


def test_what_is_exported_continues_a_text_alike(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 0
    texts = []
    for model in (run, tmp_path / "hf"):
        capsys.readouterr()
        assert main(["generate", str(model), PROMPT, "--temperature", "0", "--max-new-tokens", "20", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
    assert texts[0].startswith(PROMPT)


def test_what_a_step_trains_on_is_shown_and_the_audit_agrees(
    run: Path, fast_data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, data = str(run.parent / "small.toml"), str(fast_data_dir)
    assert main(["data", "show", "0", "--recipe", recipe, "--data", data, "--limit", "2"]) == 0
    assert len(capsys.readouterr().out) > SEQUENCE_LENGTH
    assert main(["audit", data, "--recipe", recipe, "--workers", "1"]) == 0
