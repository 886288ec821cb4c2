"""What must never be in this repository's code, and where its documents send people."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE = [path for folder in ("tinyllama_ds", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "ds_configs").glob("*.md"), *CODE,
         *(ROOT / "scripts").glob("*.sh")]  # fmt: skip

NEVER = {
    "trust_remote_code": r"trust_remote_code\s*=\s*True",
    "pickled arrays": r"allow_pickle\s*=\s*True",
    "a shell": r"shell\s*=\s*True|os\.system\(|os\.popen\(",
    "evaluated text": r"(?<![\w.])(eval|exec)\(",
    "unsafe YAML": r"yaml\.(unsafe_)?load\(",
}


@pytest.mark.parametrize("what", NEVER)
def test_code_never_holds(what: str) -> None:
    assert len(CODE) > 50
    assert [str(path) for path in CODE if re.search(NEVER[what], path.read_text())] == []


def test_only_the_importer_of_checkpoints_unpickles() -> None:
    """Weights of others in `.bin` files are read by PyTorch's restricted loader (`hf/import_model.py`)."""
    package = ROOT / "tinyllama_ds"
    found = [path for path in package.rglob("*.py") if re.search(r"weights_only=False|import pickle", path.read_text())]
    assert found == [package / "checkpoint" / "import_deepspeed.py"]


def test_tensorboard_is_only_ever_started_on_this_machine() -> None:
    """Its default host is localhost; nothing here asks for another."""
    commands = [line for path in TEXTS for line in path.read_text().splitlines() if re.search(r"tensorboard --", line)]
    assert len(commands) >= 2
    assert [line for line in commands if re.search(r"bind_all|--host(?! localhost)", line)] == []
    assert [str(path) for path in TEXTS if re.search(r"bind_all|0\.0\.0\.0", path.read_text())] == []
