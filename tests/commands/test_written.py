"""No command begins its work for an output that cannot be written, and a full disk is one sentence."""

import json
import resource
from pathlib import Path

import pytest
from forked import on_ranks

from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED

CONFIG = str(Path(__file__).parents[2] / "ds_configs" / "zero1.json")
PLAN = ["plan", "--recipe", "tinyllama-v1", "--deepspeed-config", CONFIG]
PREPARE = ["--source", "mine", "--tokenizer", "tokenizer.model"]
# Other arguments are wrong as well: the output is checked first.
FILES = {
    "train-tokenizer": ["train-tokenizer", "--input", "absent", "--output"],
    "audit": ["audit", "absent", "--output"],
    "export, GGUF": ["export", "--gguf", "f16", "absent"],
    "report": ["report", "absent", "--output"],
    "report, picture": ["report", "absent", "--picture"],
    "plan, page": [*PLAN, "--html"],
    "plan, picture": [*PLAN, "--picture"],
    "plan, config": [*PLAN, "--search", "--write-config"],
}
FOLDERS = {
    "demo-data": ["demo-data"],
    "prepare": ["prepare", "--input", "absent", *PREPARE, "--output"],
    "import-megatron": ["import-megatron", "absent.idx", *PREPARE, "--output"],
    "import-litpkds": ["import-litpkds", "absent.bin", *PREPARE, "--output"],
    "export": ["export", "absent"],
    "import": ["import", "absent"],
    "prefer": ["prefer", "--preferences", "absent", "--deepspeed-config", CONFIG, "absent"],
    "evaluate": ["evaluate", "absent", "--suite", "commonsense", "--output"],
    "evaluate, tasks": ["evaluate", "absent", "--suite", "long-context", "--write-tasks"],
    "bench": ["bench", "--deepspeed-config", "absent.json", "--output"],
}


def rejected(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    [line] = capsys.readouterr().err.splitlines()
    assert code == EXIT_CONFIG, line
    assert line.startswith("tinyllama-ds: ")
    return line


@pytest.mark.parametrize("case", FILES)
def test_a_file_is_rejected_before_the_work(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "x.png").mkdir()
    for name, reason in (("no/x.png", "/no is missing"), ("file/x.png", "is not a directory"), ("x.png", "directory")):
        line = rejected([*FILES[case], str(tmp_path / name)], capsys)
        assert str(tmp_path / name) in line
        assert reason in line


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_rejected_before_the_work(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "is not a directory" in rejected([*FOLDERS[case], str(tmp_path / "file" / "x")], capsys)


def test_a_picture_of_an_unknown_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not the name of a picture" in rejected(["report", "run", "--picture", str(tmp_path / "r.xyz")], capsys)


def test_plan_writes_pictures_in_the_format_of_their_name(tmp_path: Path) -> None:
    picture, page = tmp_path / "p.svg", tmp_path / "p.html"
    assert main([*PLAN, "--picture", str(picture), "--html", str(page)]) == EXIT_FINISHED
    assert "<svg" in picture.read_text()
    assert "<svg" in page.read_text()


def test_nothing_is_left_of_a_rejected_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out" / "tokenizer.model"
    output.parent.mkdir()
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text(json.dumps({"text": "a few words"}) + "\n")
    for raw in ("raw", "absent"):
        arguments = ["train-tokenizer", "--input", str(tmp_path / raw), "--vocab-size", "5000"]
        rejected([*arguments, "--output", str(output)], capsys)
        assert not list(output.parent.iterdir())


def with_full_disk(*arguments: str) -> None:
    """A command that can write 2 KiB into a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    raise SystemExit(main(list(arguments)))


def test_a_full_disk_is_one_sentence(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    text = " ".join(tokenizer.pieces[3:])
    (tmp_path / "raw" / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    output = tmp_path / "out" / "tokenizer.model"
    output.parent.mkdir()
    arguments = ["train-tokenizer", "--input", tmp_path / "raw", "--vocab-size", "300", "--output", output]
    finished = on_ranks(with_full_disk, *map(str, arguments), ranks=1)
    assert finished.returncode == EXIT_CONFIG, finished.stderr
    assert finished.stderr.splitlines()[-1] == f"tinyllama-ds: {output}: cannot be written: File too large"
    assert not list(output.parent.iterdir())


def test_the_verdict_is_printed_without_its_page(data_dir: Path, tmp_path: Path) -> None:
    """A data directory may be mounted read-only, and the page lies in it by default."""
    finished = on_ranks(audit_without_page, str(data_dir), ranks=1)
    assert finished.returncode == EXIT_FINISHED, finished.stderr
    assert "audit.html: cannot be written: File too large" in finished.stderr
    assert finished.stdout.startswith("PASS")
    assert not (data_dir / "audit.html").exists()


def audit_without_page(data: str) -> None:
    with_full_disk("audit", data, "--workers", "1")


def test_standard_output_can_be_closed_or_full(tmp_path: Path) -> None:
    finished = on_ranks(print_to_full_device, ranks=1)
    assert finished.returncode == EXIT_CONFIG
    assert finished.stderr.splitlines() == ["tinyllama-ds: output: No space left on device"]


def print_to_full_device() -> None:
    import os

    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    raise SystemExit(main(PLAN))


def test_names_of_figures_hold_no_formula(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    from tinyllama_ds.outputs import write_figure

    figure = Figure()
    figure.suptitle("run$_$")
    write_figure(figure, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
