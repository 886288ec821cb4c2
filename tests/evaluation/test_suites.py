"""The three published suites from a folder without a network: every task loads, is scored, and stands in the table."""

import json
from pathlib import Path

import pytest
from published_data import BBH_TASKS, MMLU_SUBJECTS, write_published_data

from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizer import Tokenizer
from tinyllama_ds.evaluation.suites import SUITES
from tinyllama_ds.hf.convert import export
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import build_model


@pytest.fixture(scope="module")
def folders(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model with room for HumanEval's 1,024 tokens, and the data of all suites."""
    root = tmp_path_factory.mktemp("suites")
    config = LlamaConfig(512, 32, 88, 1, 2, 1, 1200)
    export(build_model(config, "eager", seed=1).state_dict().items(), config, tokenizer, root / "hf")
    write_published_data(root / "data")
    return root / "hf", root / "data"


@pytest.mark.parametrize("suite", ["commonsense", "chinese", pytest.param("instruct", marks=pytest.mark.all_faults)])
def test_a_suite_from_a_folder(
    suite: str, folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, data = folders
    arguments = ["evaluate", model, "--suite", suite, "--data-dir", data, "--output", tmp_path, "--device", "cpu"]
    assert main([*map(str, arguments), "--allow-code-execution"]) == 0
    found = json.loads((tmp_path / f"{suite}.json").read_text())
    assert [score["benchmark"] for score in found["percent"]] == [benchmark.title for benchmark in SUITES[suite]]
    for score, benchmark in zip(found["percent"], SUITES[suite], strict=True):
        assert score["shots"] == benchmark.shots, benchmark
        assert 0 <= score["value"] <= 100
        assert score["documents"] == 2 * {"MMLU": MMLU_SUBJECTS, "BBH": BBH_TASKS}.get(benchmark.title, 1)
    text = (tmp_path / f"{suite}.md").read_text()
    assert text.count("**this model**") == 1
    assert (tmp_path / f"{suite}.png").is_file()
    if suite == "instruct":
        assert found["percent"][2]["value"] == 50.0  # of HumanEval's two programs the second is right
