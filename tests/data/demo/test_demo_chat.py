"""The demo conversations, from a small made-up library."""

import json
from pathlib import Path

from tinyllama_ds.data.demo.chat import make_demo_chat
from tinyllama_ds.data.prepare.conversations import ChatFormat
from tinyllama_ds.data.prepare.inputs import find_inputs
from tinyllama_ds.data.prepare.reading import read_records
from tinyllama_ds.data.prepare.sources import Record


def write_library(root: Path) -> Path:
    for number in range(120):
        package = root / f"package{number % 7}"
        package.mkdir(parents=True, exist_ok=True)
        (package / f"module{number}.py").write_text(
            f'class Thing:\n    """A thing of module {number}.\n\n    More of it."""\n\n'
            f'    def run(self):\n        """Run\n        the thing. Twice."""\n\n'
            f'    def _hidden(self):\n        """Not for the public, number {number}."""\n\n'
            'def bare():\n    pass\n\n'
            'async def wait():\n    """Wait for the llama to come back:"""\n'
        )  # fmt: skip
    (root / "test").mkdir()
    (root / "test" / "module1.py").write_text('def check():\n    """Check that nothing of this is used."""\n')
    (root / "broken.py").write_text("def broken(:\n")
    return root


def records_of(root: Path, split: str) -> list[Record]:
    fmt = ChatFormat()
    return [record for path in find_inputs(root / "chat", fmt).splits[split] for record in read_records(path, fmt)]


def test_questions_about_everything_public_are_answered_by_its_first_sentence(tmp_path: Path):
    made = make_demo_chat(tmp_path, write_library(tmp_path / "library"))
    splits = {split: records_of(tmp_path, split) for split in ("train", "validation")}
    assert made == {f"{split} conversations": len(records) for split, records in splits.items()}
    records = splits["train"] + splits["validation"]
    assert len(records) == 3 * 120
    assert not any(record.fault or record.rejected or record.shortened for record in records)
    answers = {record.messages[1].content for record in records}
    assert {"A thing of module 3.", "Run the thing.", "Wait for the llama to come back."} <= answers
    assert len({record.messages[0].content for record in records}) == 3 * 120
    followed = [record.messages[2:] for record in records if len(record.messages) == 4]
    assert 100 < len(followed) < 260
    assert all(question.content == "Where is it defined?" for question, _ in followed)


def test_all_forms_are_written_and_a_module_is_held_out_as_a_whole(tmp_path: Path):
    make_demo_chat(tmp_path, write_library(tmp_path / "library"))
    names = sorted(str(path.relative_to(tmp_path / "chat")) for path in (tmp_path / "chat").rglob("*.*"))
    assert names == ["train/guanaco.jsonl", "train/messages.parquet", "validation/messages.jsonl"]
    first = json.loads((tmp_path / "chat" / "train" / "guanaco.jsonl").read_text().splitlines()[0])
    assert first["text"].startswith("### Human: ")
    modules = [
        {record.messages[0].content.split("package")[1].split(".")[1] for record in records_of(tmp_path, split)}
        for split in ("train", "validation")
    ]
    assert modules[1]
    assert not modules[0] & modules[1]


def test_what_is_there_is_left_alone(tmp_path: Path):
    library = write_library(tmp_path / "library")
    assert make_demo_chat(tmp_path, library)
    before = {path: path.read_bytes() for path in (tmp_path / "chat").rglob("*.*")}
    assert make_demo_chat(tmp_path, library) == {}
    assert {path: path.read_bytes() for path in (tmp_path / "chat").rglob("*.*")} == before
