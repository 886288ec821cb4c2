"""The audit finds every planted fault, and correct data pass."""

import hashlib
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpora import made_up_text, write_jsonl
from recipes import VALID

from tinyllama_ds.cli import main
from tinyllama_ds.data.audit.audit import SUSPICIOUS_RUN, DataAudit, audit_data
from tinyllama_ds.data.audit.page import audit_page, verdict
from tinyllama_ds.data.order import MixtureStage, SampleOrder
from tinyllama_ds.data.prepare import prepare as prepare_module
from tinyllama_ds.data.prepare.coverage import check_coverage
from tinyllama_ds.data.prepare.inputs import Inputs
from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.prepare.sources import source_format
from tinyllama_ds.data.shards import Manifest
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.train_tokenizer import BOS_ID, EOS_ID
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.run.ledger import ROLLED_BACK, Entry, record


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """`raw/` and `data/` of two sources with a validation split and several shards."""
    root = tmp_path_factory.mktemp("honest")
    for number, source in enumerate(("first", "second")):
        for part in range(3):
            texts = [made_up_text(1000 * number + 100 * part + index, 60) for index in range(20)]
            write_jsonl(root / "raw" / source / "train" / f"{part}.jsonl", texts)
        write_jsonl(root / "raw" / source / "validation" / "v.jsonl", [made_up_text(9000 + number, 200)])
        fmt = source_format(source)
        prepare(Preparation(source, root / "raw" / source, fmt, tokenizer.path, root / "data", shard_bytes=1))
    return root


@pytest.fixture
def copy(tmp_path: Path, honest: Path) -> Path:
    return Path(shutil.copytree(honest, tmp_path / "copy"))


def audit(root: Path) -> DataAudit:
    raw = {name: root / "raw" / name for name in ("first", "second")}
    return audit_data(root / "data", raw, samples=5, workers=1)


def rewrite(root: Path, change: Callable[[np.ndarray], np.ndarray], keep_hash: bool = False) -> None:
    """Change the tokens of one shard, and its manifest's hash with them unless that is to tell."""
    prefix = root / "data" / "first" / "train" / "shard_00001"
    tokens = change(np.fromfile(prefix.with_suffix(".bin"), "<u2"))
    tokens.astype("<u2").tofile(prefix.with_suffix(".bin"))
    if not keep_hash:
        digest = hashlib.sha256(prefix.with_suffix(".bin").read_bytes()).hexdigest()
        manifest = json.loads(prefix.with_suffix(".json").read_text())
        manifest |= {"bin_sha256": digest, "smallest_id": int(tokens.min()), "largest_id": int(tokens.max())}
        prefix.with_suffix(".json").write_text(json.dumps(manifest))


def test_correct_data_passes(honest: Path):
    found = audit(honest)
    assert found.problems == []
    assert [warning for warning in found.warnings if "words differ" not in warning] == []
    assert found.compared_with_raw == 6 * 5 + 2
    assert verdict(found).startswith("PASS")
    for shard in found.shards:
        manifest = Manifest.read((honest / "data" / shard.name).with_suffix(".json"))
        assert shard.unigrams.sum() == shard.tokens == manifest.tokens
        assert shard.document_lengths.sum() == manifest.documents == shard.unigrams[EOS_ID]


def test_a_flipped_bit_is_found_by_its_hash(copy: Path):
    def flip(tokens: np.ndarray) -> np.ndarray:
        tokens[10] ^= 1
        return tokens

    rewrite(copy, flip, keep_hash=True)
    assert audit(copy).problems == ["first/train/shard_00001: .bin differs from the hash in its manifest"]


def test_tokens_changed_with_their_hash_are_found_by_the_raw_input(copy: Path):
    """Tokens and hash changed together: only the comparison with the raw text can tell."""

    def lie(tokens: np.ndarray) -> np.ndarray:
        tokens[tokens > 300] = 300
        return tokens

    rewrite(copy, lie)
    problems = audit(copy).problems
    assert len(problems) == 5
    assert all(re.search(r"document \d+ differs from document \d+ of .*1\.jsonl", problem) for problem in problems)


def test_a_lost_document_is_found_by_the_counts_of_the_inputs(copy: Path):
    prefix = copy / "data" / "first" / "train" / "shard_00001"
    manifest = json.loads(prefix.with_suffix(".json").read_text())
    manifest["inputs"][0]["documents"] += 1
    prefix.with_suffix(".json").write_text(json.dumps(manifest))
    assert audit(copy).problems == ["first/train/shard_00001: 20 documents, its inputs gave 21"]


def test_an_unsorted_listing_is_found(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Planted as in TinyLlama's first loader: the files in the order in which the disk happens to list them."""
    for number in range(5):
        write_jsonl(tmp_path / "raw" / f"{number}.jsonl", [made_up_text(number, 50)])
    unsorted = [tmp_path / "raw" / f"{number}.jsonl" for number in (3, 0, 4, 1, 2)]
    monkeypatch.setattr(prepare_module, "find_inputs", lambda directory, fmt: Inputs(directory, {"train": unsorted}))
    prepare(Preparation("a", tmp_path / "raw", source_format("a"), tokenizer.path, tmp_path / "data", shard_bytes=300))
    problems = audit_data(tmp_path / "data", {}, samples=0, workers=1).problems
    assert problems == [
        "a/train: the input 0.jsonl comes after 3.jsonl; expected them sorted, each once",
        "a/train: the input 1.jsonl comes after 4.jsonl; expected them sorted, each once",
    ]


def test_padding_as_in_tinyllamas_bug_83_is_found(copy: Path):
    """The tail of a shard overwritten with BOS, as partly filled chunks were."""

    def fill(tokens: np.ndarray) -> np.ndarray:
        tokens[-SUSPICIOUS_RUN:] = BOS_ID
        return tokens

    rewrite(copy, fill)
    found = audit(copy)
    assert f"first/train/shard_00001: {SUSPICIOUS_RUN} BOS tokens (id 1), which prepare never writes" in found.problems
    assert f"first/train/shard_00001: {SUSPICIOUS_RUN} times the id 1 in a row; is it padding?" in found.warnings
    assert verdict(found).startswith("FAIL")


@pytest.mark.parametrize("token", [512, 60_000])
def test_an_id_beyond_the_vocabulary_is_found(copy: Path, token: int):
    def replace(tokens: np.ndarray) -> np.ndarray:
        tokens[5] = token
        return tokens

    rewrite(copy, replace)
    assert "first/train/shard_00001: 1 ids beyond the vocabulary of 512" in audit(copy).problems


def test_a_broken_index_is_a_problem_not_a_crash(copy: Path):
    path = copy / "data" / "first" / "train" / "shard_00001.idx"
    content = bytearray(path.read_bytes())
    content[34:38] = struct.pack("<i", 5)
    path.write_bytes(content)
    assert any("but its manifest has" in problem for problem in audit(copy).problems)


def test_duplicates_within_and_across_sources_are_counted(tmp_path: Path, tokenizer: Tokenizer):
    same, other = made_up_text(1, 50), made_up_text(2, 50)
    write_jsonl(tmp_path / "raw" / "a" / "train" / "0.jsonl", [same, other, same])
    write_jsonl(tmp_path / "raw" / "a" / "train" / "1.jsonl", [same])
    write_jsonl(tmp_path / "raw" / "a" / "validation" / "0.jsonl", [other])
    write_jsonl(tmp_path / "raw" / "b" / "0.jsonl", [same, made_up_text(3, 50)])
    for source in ("a", "b"):
        fmt = source_format(source)
        job = Preparation(source, tmp_path / "raw" / source, fmt, tokenizer.path, tmp_path / "data", shard_bytes=1)
        prepare(job)
    found = audit_data(tmp_path / "data", {}, samples=0, workers=1)
    assert found.duplicates == {
        "a/train": 2,
        "a/validation": 0,
        "b/train": 0,
        "a/train and a/validation": 1,
        "a/train and b/train": 1,
        "a/validation and b/train": 0,
    }
    assert "a/train and a/validation: 1 documents are exact duplicates of each other" in found.warnings


def test_a_shard_with_a_different_distribution_is_found(tmp_path: Path, tokenizer: Tokenizer):
    for number in range(4):
        write_jsonl(tmp_path / "raw" / f"{number}.jsonl", [made_up_text(number, 500)])
    write_jsonl(tmp_path / "raw" / "9.jsonl", ["北京是中国的首都。" * 30])
    job = Preparation("a", tmp_path / "raw", source_format("a"), tokenizer.path, tmp_path / "data", shard_bytes=1)
    prepare(job)
    found = audit_data(tmp_path / "data", {}, samples=0, workers=1)
    assert max(found.drift, key=lambda name: found.drift[name]) == "a/train/shard_00004"
    assert [warning.split(":")[0] for warning in found.warnings if "unigram distribution" in warning] == [
        "a/train/shard_00004"
    ]


def test_a_wrong_raw_directory_is_rejected_or_reported(honest: Path):
    with pytest.raises(ConfigError, match="holds no source 'third'"):
        audit_data(honest / "data", {"third": honest}, samples=1, workers=1)
    found = audit_data(honest / "data", {"first": honest / "raw" / "second" / "validation"}, samples=1, workers=1)
    assert any("is missing" in problem for problem in found.problems)


# --- the plan ---------------------------------------------------------------------------------------------------------

SIZES = {"a": 500, "b": 130}
STAGES = [
    MixtureStage(960, {"a": 1.0}),
    MixtureStage(480, {"a": 0.5, "b": 0.5}, ramp_samples=100),
]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_a_plan_is_verified(world_size: int):
    coverage = check_coverage(SampleOrder(1, SIZES, STAGES), [24, 48], world_size)
    assert coverage.problems == []
    assert coverage.checked_samples == coverage.total_samples == 1440
    assert coverage.epochs == {"a": (960 + 265) / 500, "b": 215 / 130}
    assert coverage.shares == [{"a": 1.0, "b": 0.0}, {"a": 265 / 480, "b": 215 / 480}]


def shuffled_by_rank(first: int, batch: int, rank: int, world_size: int) -> list[int]:
    """TinyLlama's bug 67: every rank shuffles the same list with a seed of its own, and then takes its stride."""
    return np.random.default_rng(3407 + rank).permutation(np.arange(first, first + batch))[rank::world_size].tolist()


def same_for_all(first: int, batch: int, rank: int, world_size: int) -> range:
    return range(first, first + batch // world_size)


def tail_dropped(first: int, batch: int, rank: int, world_size: int) -> range:
    share = batch // world_size
    return range(first + rank * share, first + (rank + 1) * share - 1)


@pytest.mark.parametrize("assign", [shuffled_by_rank, same_for_all, tail_dropped])
def test_a_wrong_assignment_is_caught(assign: Callable):
    coverage = check_coverage(SampleOrder(1, SIZES, STAGES), [24, 48], 4, assign)
    assert any("no rank trains on" in problem for problem in coverage.problems)


def test_an_order_that_repeats_is_caught():
    class Repeating(SampleOrder):
        def locate(self, positions: np.ndarray):
            return super().locate(positions // 2 * 2)

    coverage = check_coverage(Repeating(1, SIZES, STAGES), [24, 48], 2)
    assert any("are trained on twice in one epoch" in problem for problem in coverage.problems)
    assert any("a: some samples are seen" in problem for problem in coverage.problems)


def test_a_run_of_a_trillion_tokens_is_checked_in_windows():
    order = SampleOrder(1, {"a": 3 * 10**8, "b": 1000}, [MixtureStage(1024 * 500_000, {"a": 0.99, "b": 0.01})])
    coverage = check_coverage(order, [1024], 16)
    assert coverage.problems == []
    assert 10**6 < coverage.checked_samples < 2 * 10**6
    assert [warning.split(":")[0] for warning in coverage.warnings] == ["b"]


def test_samples_that_are_never_read_are_reported():
    coverage = check_coverage(SampleOrder(1, {"a": 1000}, [MixtureStage(650, {"a": 1.0})]), [65], 1)
    assert coverage.warnings == ["a: 35.0% of it is never read"]


# --- the command ------------------------------------------------------------------------------------------------------

RECIPE = VALID.replace("slimpajama = 1", "first = 1, second = 1")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    return path


def test_the_command_prints_a_verdict_and_writes_a_page(
    copy: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    page = tmp_path / "audit.html"
    arguments = ["audit", str(copy / "data"), "--recipe", str(recipe), "--world-size", "2", "--workers", "1"]
    arguments += ["--raw", f"first={copy / 'raw' / 'first'}", "--output", str(page)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("PASS")
    assert "each to exactly one rank" in printed
    assert "stage 1 draws first 50.0000%, second 50.0000%" in printed
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "mathdefault" not in text, "labels of logarithmic axes are text"
    assert not re.search(r'(src|href)="?(http|//|/)', text)
    rewrite(copy, lambda tokens: tokens[::-1])
    assert main(arguments) == 78
    assert capsys.readouterr().out.startswith("FAIL")


def test_the_page_escapes_what_it_shows(honest: Path):
    found = audit(honest)
    found.problems.append("<script>alert(1)</script>")
    assert "<script>" not in audit_page(found, "<script>")


def test_data_show_prints_what_a_step_trains_on(
    honest: Path, recipe: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture
):
    arguments = ["data", "show", "3", "--recipe", str(recipe), "--data", str(honest / "data"), "--json"]
    assert main([*arguments, "--limit", "99"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [sample["position"] for sample in samples] == list(range(30, 40))
    assert {sample["source"] for sample in samples} == {"first", "second"}
    for sample in samples:
        tokens = np.concatenate(
            [np.fromfile(path, "<u2") for path in sorted((honest / "data" / sample["source"] / "train").glob("*.bin"))]
        )
        expected = tokens[sample["sample"] * 32 : sample["sample"] * 32 + 33]
        shown = sample["text"].split("\n--- end of document ---\n")
        assert len(shown) == (expected == EOS_ID).sum() + 1
        assert tokenizer.decode(expected[expected != EOS_ID].tolist()).split() == " ".join(shown).split()
    assert main([*arguments[:2], "99", *arguments[3:]]) == 78


def test_data_show_skips_the_samples_that_a_run_excluded(
    honest: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    record(tmp_path, Entry(ROLLED_BACK, 2, 10, 19, "spike"))
    arguments = ["data", "show", "3", "--recipe", str(recipe), "--data", str(honest / "data"), "--json", "--run-dir"]
    assert main([*arguments, str(tmp_path), "--limit", "99"]) == 0
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [sample["position"] for sample in samples] == list(range(40, 50))
    assert main([*arguments[:2], "4", *arguments[3:-1], "--limit", "99"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == samples, "what the step after it shows without a ledger"
    assert main([*arguments, str(tmp_path / "absent")]) == 78


def test_shown_text_has_no_control_characters():
    from tinyllama_ds.errors import printable

    assert printable("a\x1b[2J\u202eb\n\t中") == "a\\x1b[2J\\u202eb\n\t中"
