"""HumanEval through our sandbox: what passes, what does not, and the score of a model."""

import json
from pathlib import Path

import pytest

from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.evaluation.humaneval import humaneval_config
from tinyllama_ds.evaluation.sandbox import open_sandbox
from tinyllama_ds.hf.convert import export
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import build_model

# The first task of the published set, shortened.
PROMPT = 'from typing import List\n\ndef closest(numbers: List[float]) -> float:\n    """Smallest distance."""\n'
SOLUTION = "    ordered = sorted(numbers)\n    return min(b - a for a, b in zip(ordered, ordered[1:]))\n"
TEST = "def check(candidate):\n    assert candidate([1.0, 2.5, 4.5]) == 1.5\n"


@pytest.mark.parametrize(
    ("completion", "passes"),
    [(SOLUTION, 1.0), ("    return 2.0\n", 0.0), ("    return (", 0.0), ("    exit(0)\n", 0.0), ("", 0.0)],
)
def test_a_completion_is_scored_by_the_tests_of_its_task(completion: str, passes: float) -> None:
    score = humaneval_config(open_sandbox().passes)["process_results"]
    assert score({"prompt": PROMPT, "test": TEST, "entry_point": "closest"}, [completion]) == {"pass@1": passes}


def test_a_model_is_scored_from_local_data(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Whatever the model writes ends up inside a string: one task passes then, the other's test is wrong."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = tmp_path / "data" / "openai_humaneval"
    data.mkdir(parents=True)
    rows = [
        {
            "task_id": f"t/{number}",
            "prompt": "def one():\n    return 1\nnoise = r'''",
            "canonical_solution": "",
            "test": f"'''\ndef check(candidate):\n    assert candidate() == {number}\n",
            "entry_point": "one",
        }
        for number in (1, 2)
    ]
    (data / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = LlamaConfig(512, 32, 88, 1, 2, 1, 1200)
    export(build_model(config, "eager", seed=1).state_dict().items(), config, tokenizer, tmp_path / "hf")
    arguments = ["evaluate", str(tmp_path / "hf"), "--tasks", "humaneval", "--data-dir", str(tmp_path / "data")]
    arguments += ["--device", "cpu", "--output", str(tmp_path / "scores")]
    assert main(arguments) == 78
    assert (
        "humaneval runs model-written code; expected `tinyllama-ds evaluate` with --allow-code-execution"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "scores").exists()
    assert main([*arguments, "--allow-code-execution"]) == 0
    (score,) = json.loads((tmp_path / "scores" / "tasks.json").read_text())["scores"]
    assert (score["task"], score["metric"], score["value"], score["documents"]) == ("humaneval", "pass@1", 0.5, 2)
