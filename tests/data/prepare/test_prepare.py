"""Preparation: nothing lost, the same bytes for any number of workers and after any crash."""

import json
import os
import signal
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import stopping
import zstandard
from corpora import made_up_text, write_jsonl
from launching import TIMEOUT, wait_until
from megatron import read_mmididx

from tinyllama_ds.cli import main
from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.prepare.reading import read_texts
from tinyllama_ds.data.prepare.sources import SourceFormat, source_format
from tinyllama_ds.data.shards import Manifest
from tinyllama_ds.data.stream import TokenStream
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.train_tokenizer import EOS_ID, train_tokenizer
from tinyllama_ds.errors import EXIT_CONFIG, ConfigError

PLAIN = SourceFormat()
FILES = 6


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "raw"
    for number in range(FILES):
        texts = [made_up_text(100 * number + index, 40) for index in range(30)]
        write_jsonl(root / "train" / f"part{number}.jsonl", texts)
    write_jsonl(root / "validation" / "part.jsonl", [made_up_text(9999, 100)])
    return root


def run(corpus: Path, tokenizer: Tokenizer, output: Path, workers: int = 1, **changes) -> list[Manifest]:
    job = Preparation("source", corpus, PLAIN, tokenizer.path, output, shard_bytes=10_000)
    return prepare(replace(job, **changes), workers)


def contents(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_the_documents_come_out_as_they_went_in(tmp_path: Path, corpus: Path, tokenizer: Tokenizer):
    manifests = run(corpus, tokenizer, tmp_path / "out")
    assert {manifest.split for manifest in manifests} == {"train", "validation"}
    assert len([manifest for manifest in manifests if manifest.split == "train"]) > 1
    for split in ("train", "validation"):
        expected = [text for path in sorted((corpus / split).iterdir()) for text in read_texts(path, PLAIN)]
        prefixes = sorted(path.with_suffix("") for path in (tmp_path / "out" / "source" / split).glob("*.bin"))
        documents = [document for prefix in prefixes for document in read_mmididx(prefix)]
        assert [document[-1] for document in documents] == [EOS_ID] * len(expected)
        assert [tokenizer.decode(document[:-1]) for document in documents] == expected


def test_the_manifests_account_for_every_record(tmp_path: Path, corpus: Path, tokenizer: Tokenizer):
    with (corpus / "train" / "part0.jsonl").open("a") as file:
        file.write(json.dumps({"text": ""}) + "\n" + json.dumps({"text": "x", "meta": None}) + "\n")
    manifests = run(corpus, tokenizer, tmp_path / "out")
    inputs = [entry for manifest in manifests for entry in manifest.inputs]
    assert sum(entry.records for entry in inputs) == FILES * 30 + 1 + 2
    for entry in inputs:
        assert entry.records == entry.documents + sum(entry.rejected.values()) + len(entry.faults)
    assert inputs[0].rejected == {"empty text": 1}
    for manifest in manifests:
        assert manifest.documents == sum(entry.documents for entry in manifest.inputs)


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path, corpus: Path, tokenizer: Tokenizer):
    for workers in (1, 3):
        run(corpus, tokenizer, tmp_path / str(workers), workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_second_start_does_nothing_again(tmp_path: Path, corpus: Path, tokenizer: Tokenizer):
    output = tmp_path / "out"
    first = run(corpus, tokenizer, output)
    times = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert run(corpus, tokenizer, output, workers=3) == first
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == times


def test_a_lost_shard_is_made_again(tmp_path: Path, corpus: Path, tokenizer: Tokenizer):
    output = tmp_path / "out"
    run(corpus, tokenizer, output)
    before = contents(output)
    (output / "source" / "train" / "shard_00001.bin").unlink()
    (output / "source" / "train" / "shard_00000.json").unlink()
    run(corpus, tokenizer, output)
    assert contents(output) == before


def test_shards_of_other_inputs_are_rejected_and_left_alone(tmp_path: Path, corpus: Path, tokenizer: Tokenizer):
    output = tmp_path / "out"
    run(corpus, tokenizer, output)
    before = contents(output)
    write_jsonl(corpus / "train" / "part0.jsonl", ["changed"])
    with pytest.raises(ConfigError, match="was made from other inputs"):
        run(corpus, tokenizer, output)
    assert contents(output) == before


def test_another_tokenizer_is_rejected(tmp_path: Path, corpus: Path, tokenizer: Tokenizer):
    run(corpus, tokenizer, tmp_path / "out")
    other = train_tokenizer([made_up_text(1, 3000)], 400, tmp_path / "other.model")
    with pytest.raises(ConfigError, match="one data directory holds tokens of one tokenizer"):
        run(corpus, other, tmp_path / "out")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_bad_record_fails_the_run_with_file_and_line(tmp_path: Path, corpus: Path, tokenizer: Tokenizer):
    with (corpus / "train" / "part3.jsonl").open("a") as file:
        file.write('{"text": \n')
    for workers in (1, 3):
        with pytest.raises(ConfigError, match=r"part3\.jsonl:31: not a line of JSON"):
            run(corpus, tokenizer, tmp_path / "out", workers)
    leftovers = [path for path in (tmp_path / "out").rglob("*") if "partial" in path.name]
    assert leftovers == []


def test_allowed_bad_records_are_counted_and_listed(tmp_path: Path, corpus: Path, tokenizer: Tokenizer):
    for number in (0, 3):
        with (corpus / "train" / f"part{number}.jsonl").open("a") as file:
            file.write('{"text": \n{"texts": "wrong field"}\n{"text": "good"}\n')
    with pytest.raises(ConfigError, match=r"\(bad record 4; 3 were allowed\)"):
        run(corpus, tokenizer, tmp_path / "out", max_bad_records=3)
    manifests = run(corpus, tokenizer, tmp_path / "out", max_bad_records=4)
    inputs = [entry for manifest in manifests for entry in manifest.inputs]
    faults = [fault for entry in inputs for fault in entry.faults]
    assert [fault.split("/")[-1].split(": ")[0] for fault in faults] == [
        "part0.jsonl:31",
        "part0.jsonl:32",
        "part3.jsonl:31",
        "part3.jsonl:32",
    ]
    assert sum(entry.records for entry in inputs) == FILES * 30 + 1 + 6
    assert all(entry.records == entry.documents + len(entry.faults) for entry in inputs)


def test_a_truncated_file_keeps_the_documents_before_the_cut(tmp_path: Path, tokenizer: Tokenizer):
    texts = [made_up_text(seed, 2000) for seed in range(40)]
    content = zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.jsonl.zst").write_bytes(content[: len(content) // 2])
    (manifest,) = run(tmp_path / "raw", tokenizer, tmp_path / "out", max_bad_records=2)
    (entry,) = manifest.inputs
    assert 0 < entry.documents < len(texts)
    assert entry.records == entry.documents + len(entry.faults)
    assert "damaged or cut short" in entry.faults[-1]


def test_a_line_of_megabytes_is_one_document(tmp_path: Path, tokenizer: Tokenizer):
    write_jsonl(tmp_path / "raw" / "x.jsonl", ["before", "loss rate " * 1_600_000, "after"])
    (manifest,) = run(tmp_path / "raw", tokenizer, tmp_path / "out")
    assert manifest.documents == 3
    assert manifest.inputs[0].text_bytes == 16_000_000 + len("beforeafter")


def test_a_machine_without_torch_prepares(tmp_path: Path, corpus: Path, tokenizer: Tokenizer):
    """Neither the command nor its workers ask for torch, transformers or deepspeed."""
    for name in ("torch", "transformers", "deepspeed"):
        (tmp_path / "absent" / name).mkdir(parents=True)
        (tmp_path / "absent" / name / "__init__.py").write_text(f"raise ImportError('{name} is absent')")
    path = os.pathsep.join([str(tmp_path / "absent"), *sys.path])
    command = [sys.executable, "-m", "tinyllama_ds.cli", *cli_arguments(corpus, tokenizer, tmp_path / "out", 2)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"source/train: {FILES} files" in done.stdout


def test_rejected_records_are_not_kept_in_memory(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.jsonl").write_text('{"text": ""}\n' * 200_000 + '{"text": "x"}\n')
    tracemalloc.start()
    (manifest,) = run(tmp_path / "raw", tokenizer, tmp_path / "out", encoder="sentencepiece")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert manifest.inputs[0].rejected == {"empty text": 200_000}
    assert peak < 8_000_000


def test_a_corpus_of_nothing_is_rejected(tmp_path: Path, tokenizer: Tokenizer):
    write_jsonl(tmp_path / "raw" / "x.jsonl", ["", ""])
    with pytest.raises(ConfigError, match="every record of it was rejected"):
        run(tmp_path / "raw", tokenizer, tmp_path / "out")


def test_a_source_of_long_documents_has_a_name_of_its_own(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
):
    texts = [made_up_text(number, 1 + number % 30) for number in range(120)]
    sizes = [len(tokenizer.encode(text)) + 1 for text in texts]
    limit = sorted(sizes)[80]
    write_jsonl(tmp_path / "raw" / "x.jsonl", texts, field="content")
    paths = ["--tokenizer", str(tokenizer.path), "--output", str(tmp_path / "data"), "--workers", "1"]
    paths += ["--source", "starcoderdata", "--input", str(tmp_path / "raw")]
    assert main(["prepare", *paths, "--name", "long", "--min-tokens", str(limit)]) == 0
    assert f"rejected: {sum(size < limit for size in sizes)} fewer than {limit} tokens" in capsys.readouterr().out
    expected = [text for text, size in zip(texts, sizes, strict=True) if size >= limit]
    prefix = tmp_path / "data" / "long" / "train" / "shard_00000"
    assert [tokenizer.decode(document[:-1]) for document in read_mmididx(prefix)] == expected
    manifest = Manifest.read(prefix.with_suffix(".json"))
    assert manifest.inputs[0].text_bytes == sum(len(text.encode()) for text in expected)
    assert main(["prepare", *paths, "--name", "long", "--min-tokens", str(limit)]) == 0, "nothing to do"
    assert main(["prepare", *paths, "--name", "long", "--min-tokens", "9"]) == EXIT_CONFIG, "made of other documents"
    assert main(["prepare", *paths]) == 0
    assert "min_tokens" not in Manifest.read(tmp_path / "data/starcoderdata/train/shard_00000.json").source_format
    raw = [f"--raw={name}={tmp_path / 'raw'}" for name in ("long", "starcoderdata")]
    assert main(["audit", str(tmp_path / "data"), *raw, "--workers", "1"]) == 0
    assert main(["prepare", *paths, "--chat", "--min-tokens", "9"]) == EXIT_CONFIG


def test_files_of_a_rejected_subset_among_others_are_no_error(tmp_path: Path, tokenizer: Tokenizer):
    for number, subset in enumerate(("RedPajamaGithub", "RedPajamaC4")):
        line = json.dumps({"text": f"text {number}", "meta": {"redpajama_set_name": subset}})
        (tmp_path / "raw").mkdir(exist_ok=True)
        (tmp_path / "raw" / f"{number}.jsonl").write_text(line)
    fmt = source_format("slimpajama")
    job = Preparation("slimpajama", tmp_path / "raw", fmt, tokenizer.path, tmp_path / "out", shard_bytes=1)
    manifests = prepare(job)
    assert [manifest.documents for manifest in manifests] == [0, 1]
    assert manifests[0].inputs[0].rejected == {"subset RedPajamaGithub": 1}
    assert TokenStream(tmp_path / "out" / "slimpajama" / "train").tokens == manifests[1].tokens


def cli_arguments(corpus: Path, tokenizer: Tokenizer, output: Path, workers: int) -> list[str]:
    return [
        "prepare",
        *("--source", "source", "--input", str(corpus), "--tokenizer", str(tokenizer.path)),
        *("--output", str(output), "--workers", str(workers)),
    ]


def test_a_full_disk_is_an_error_that_leaves_no_shard(tmp_path: Path, corpus: Path, tokenizer: Tokenizer):
    """A limit on the size of files stands for the disk; OSError is what a full one raises too."""
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "from tinyllama_ds.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, *cli_arguments(corpus, tokenizer, tmp_path / "out", 1)]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 78
    assert "File too large" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "out" / "source" / "train").iterdir()) == []


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve shards that take a moment each."""
    root = tmp_path_factory.mktemp("large")
    for number in range(12):
        write_jsonl(root / f"{number:02d}.jsonl", [made_up_text(1000 * number + index, 400) for index in range(120)])
    return root


@pytest.fixture(scope="module")
def clean_output(tmp_path_factory: pytest.TempPathFactory, large_corpus: Path, tokenizer: Tokenizer) -> Path:
    output = tmp_path_factory.mktemp("clean")
    assert start(large_corpus, tokenizer, output, 1).wait(TIMEOUT) == 0
    assert len(list(output.rglob("*.json"))) == 12
    return output


def start(
    corpus: Path, tokenizer: Tokenizer, output: Path, workers: int, stop_from: int | None = None
) -> subprocess.Popen:
    """A preparation that goes to its end, or whose workers stop inside of shards (`stopping.py`)."""
    arguments = ["source", corpus, tokenizer.path, output, workers]
    command = [sys.executable, Path(stopping.__file__), *arguments]
    environment = {} if stop_from is None else {stopping.STOP_VARIABLE: str(stop_from)}
    return subprocess.Popen(list(map(str, command)), env=os.environ | environment, stderr=subprocess.DEVNULL)


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Those that are not multiprocessing's resource tracker."""
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):
            found += [child] if any("spawn_main" in part for part in child.cmdline()) else []
    return found


def are_stopped(processes: list[psutil.Process]) -> bool:
    return all(process.status() == psutil.STATUS_STOPPED for process in processes)


@pytest.mark.parametrize(("victim", "committed"), [("parent", 0), ("worker", 4), ("parent", 9)])
def test_a_kill_at_any_point_costs_nothing_but_time(
    tmp_path: Path, large_corpus: Path, clean_output: Path, tokenizer: Tokenizer, victim: str, committed: int
):
    output = tmp_path / "out"
    process = start(large_corpus, tokenizer, output, 2, stop_from=committed)
    wait_until(lambda: len(workers := workers_of(process)) == 2 and are_stopped(workers), "two workers that stop")
    assert len(list(output.rglob("*.json"))) == committed
    assert len(list(output.rglob(".*.bin.*.partial"))) == 2
    first, second = workers_of(process)
    os.kill(process.pid if victim == "parent" else first.pid, signal.SIGKILL)
    for worker in (first, second):
        with suppress(psutil.NoSuchProcess):
            worker.resume()  # to see for itself that it is alone
    assert process.wait(TIMEOUT) != 0
    assert psutil.wait_procs([first, second], timeout=TIMEOUT)[1] == []
    assert start(large_corpus, tokenizer, output, 1 if committed == 4 else 3).wait(TIMEOUT) == 0
    assert contents(output) == contents(clean_output)


def test_finished_shards_are_not_made_again_after_a_kill(
    tmp_path: Path, large_corpus: Path, clean_output: Path, tokenizer: Tokenizer
):
    output = tmp_path / "out"
    process = start(large_corpus, tokenizer, output, 1, stop_from=3)
    wait_until(lambda: are_stopped([psutil.Process(process.pid)]), "a process that stops")
    process.kill()
    process.wait(TIMEOUT)
    finished = {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}
    assert len(finished) == 3
    assert start(large_corpus, tokenizer, output, 1).wait(TIMEOUT) == 0
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in output.rglob("*.json")}.items()
    assert contents(output) == contents(clean_output)


def test_the_command_asks_for_a_restart_when_a_worker_was_killed(
    tmp_path: Path, large_corpus: Path, tokenizer: Tokenizer
):
    """So much to do that it is at work whenever the kill comes."""
    (tmp_path / "raw").mkdir()
    for number in range(100):
        for file in large_corpus.iterdir():
            (tmp_path / "raw" / f"{number}_{file.name}").symlink_to(file)
    command = [sys.executable, "-m", "tinyllama_ds.cli"]
    command += cli_arguments(tmp_path / "raw", tokenizer, tmp_path / "out", 2)
    command += ["--encoder", "sentencepiece", "--shard-bytes", "100000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list((tmp_path / "out").rglob(".*.bin.*.partial")), "a shard that is being written")
    workers_of(process)[0].kill()
    assert "a worker was killed" in process.communicate(timeout=TIMEOUT)[1].splitlines()[-1]
    assert process.returncode == 75
