"""Which tasks load, from which data, and what is rejected in one sentence before a model is touched."""

import json
import socket
from pathlib import Path

import pytest
from local_tasks import write_tasks

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation import tasks
from tinyllama_ds.evaluation.tasks import load_named

datasets = pytest.importorskip("datasets")  # of the extra `eval`; collecting goes on without it
PIQA = [{"goal": f"goal {n}", "sol1": "one way", "sol2": "another", "label": n % 2} for n in range(6)]
WAYS = ("jsonl", "parquet", "save_to_disk", "config")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a compute node: an empty cache and no hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("way", WAYS)
def test_a_published_task_reads_local_data(way: str, tmp_path: Path) -> None:
    """Files by split with the owner and without, what datasets saves, and a folder for each config."""
    folder = tmp_path / "data" / ("piqa" if way == "jsonl" else "baber/piqa")
    folder.mkdir(parents=True)
    data = datasets.Dataset.from_list(PIQA)
    if way == "save_to_disk":
        datasets.DatasetDict(train=data, validation=data).save_to_disk(folder)
    else:
        for split in ("train", "validation"):
            if way == "parquet":
                data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
            else:
                (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, PIQA)))
    loaded = load_named(["piqa"], tmp_path / "data")
    task = loaded["tasks"]["piqa"]
    assert [document["goal"] for document in task.validation_docs()] == [row["goal"] for row in PIQA]
    assert task.config.num_fewshot == 0


def test_a_task_takes_the_folder_of_its_config(tmp_path: Path) -> None:
    for config in ("ARC-Easy", "ARC-Challenge"):
        folder = tmp_path / "allenai/ai2_arc" / config
        folder.mkdir(parents=True)
        row = {"id": config, "question": config, "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
        for split in ("train", "validation", "test"):
            (folder / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    loaded = load_named(["arc_challenge", "arc_easy"], tmp_path)
    assert {name: task.test_docs()[0]["question"] for name, task in loaded["tasks"].items()} == {
        "arc_challenge": "ARC-Challenge",
        "arc_easy": "ARC-Easy",
    }


def test_a_task_without_its_data_is_rejected_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a connection: where a hub does not answer, datasets alone would retry for minutes."""
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: asked.append(where))
    monkeypatch.setattr(socket.socket, "connect", lambda _, where: asked.append(where))
    with pytest.raises(
        ConfigError, match=r"dataset Rowan/hellaswag: is not in Hugging Face's cache, and the hub is unreach"
    ):
        load_named(["commonsense"], None)
    (tmp_path / "local").mkdir()
    with pytest.raises(ConfigError, match=r"dataset baber/piqa: is not in .*local or Hugging Face's cache"):
        load_named(["piqa"], tmp_path / "local")
    assert asked == []


def test_what_cannot_be_scored_is_rejected(tmp_path: Path) -> None:
    choice, *_ = write_tasks(tmp_path, 3)
    samples = tmp_path / "samples.yaml"
    samples.write_text(choice.with_name("generation.yaml").read_text().replace("do_sample: false", "do_sample: true"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [")
    unsafe = tmp_path / "unsafe.yaml"
    unsafe.write_text(choice.read_text() + "unsafe_code: true\n")
    for name, sentence in (
        (str(tmp_path / "absent.yaml"), "absent.yaml: is missing"),
        (str(broken), "task .*broken.yaml cannot be loaded: ParserError"),
        (str(samples), "task local_generation samples"),
        (str(unsafe), "task local_choice runs model-written code without a sandbox"),
        ("humaneval", "expected `tinyllama-ds evaluate` with --allow-code-execution"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            load_named([name], None)
    with pytest.raises(ConfigError, match="task local_choice has 3 documents for examples; expected 4, one per shot"):
        load_named([str(choice)], None, shots=4)
    data = tmp_path / "data.jsonl"
    data.write_text('{"other": 1}\n')
    with pytest.raises(ConfigError, match=r"task .*choice.yaml cannot be loaded: "):
        load_named([str(choice)], None)
    data.unlink()
    with pytest.raises(ConfigError, match=r"dataset json: .*data.jsonl"):
        load_named([str(choice)], None)


def test_an_absent_lm_eval_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"scoring on tasks needs lm_eval, which is not installed; pip install tinyllama_ds\[eval\]"
    ):
        tasks.require_lm_eval()


def test_an_unreachable_hub_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    tasks.set_offline_if_hub_unreachable()
    assert tasks.os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere", "--suite", "commonsense"), "nowhere: is missing; expected a checkpoint"),
        ((".", "--suite", "common"), "suite 'common' is unknown; choose commonsense, instruct, chinese"),
        ((".", "--suite", "instruct", "--shots", "3"), "--shots is for --tasks and --task-file"),
    ],
)
def test_wrong_options_are_rejected(arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture) -> None:
    from tinyllama_ds.cli import main

    assert main(["evaluate", *arguments, "--device", "cpu"]) == 78
    assert sentence in capsys.readouterr().err
