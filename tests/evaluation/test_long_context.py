"""The suite `long-context`: losses against transformers' logits, buckets against a count, needles against lm-eval."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import on_ranks, run_module
from hf_folders import write_hf_folder
from made_up import made_up_text
from scipy import stats

from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.long_context.documents import read_long_documents
from tinyllama_ds.evaluation.long_context.needle import DEPTHS, Haystack, Question
from tinyllama_ds.evaluation.long_context.perplexity import (
    bucket_means,
    by_context,
    by_position,
    position_buckets,
    reject_other_heads,
    second_half_mean,
    window_losses,
)
from tinyllama_ds.evaluation.long_context.result import chance_of, wilson_interval
from tinyllama_ds.evaluation.long_context.retrieval import answer
from tinyllama_ds.hf.convert import hf_model, hf_tokenizer, load_hf_folder
from tinyllama_ds.launch.launcher import SCORE
from tinyllama_ds.model.config import MAX_CHUNK_LOGITS, MODEL_SIZES, Llama3Scaling, YarnScaling
from tinyllama_ds.model.llama import build_model

LENGTH = 256
SHAPE = replace(MODEL_SIZES["test"], max_position_embeddings=LENGTH)
SCALED = {
    "theta": replace(SHAPE, rope_theta=80_000.0),
    "llama3": replace(SHAPE, rope_scaling=Llama3Scaling(4.0, 1.0, 4.0, 64)),
    "yarn": replace(SHAPE, rope_scaling=YarnScaling(4.0, 64)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A small random model whose predictions differ from token to token."""
    path = write_hf_folder(tmp_path_factory.mktemp("model") / "hf", SHAPE, tokenizer)
    hf_tokenizer(tokenizer, LENGTH).save_pretrained(path)
    return path


def reference_losses(model: Any, ids: torch.Tensor) -> np.ndarray:
    """By transformers' own logits of the whole document."""
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").numpy()


@pytest.mark.parametrize("rope", SCALED)
def test_losses_by_position_are_those_of_transformers_and_of_our_model(
    rope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_CHUNK_LOGITS, "cpu", 100 * SHAPE.vocab_size)  # in three chunks
    shape = SCALED[rope]
    ours = build_model(shape, "eager", seed=1)
    theirs = hf_model(ours.state_dict(), shape)
    ids = torch.randint(0, shape.vocab_size, (LENGTH,), generator=torch.Generator().manual_seed(2))
    found = window_losses(theirs, ids, LENGTH).numpy()
    np.testing.assert_allclose(found, reference_losses(theirs, ids), atol=1e-5, rtol=0)
    with torch.no_grad():
        of_ours = ours(ids[None, :-1], ids[None, 1:], reduction="none")[0]
    np.testing.assert_allclose(found, of_ours.numpy(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("total", "window"), [(32, 8), (17, 16), (23, 10), (16, 32)])
def test_windows_score_every_token_once_with_half_a_window_of_context(total: int, window: int, folder: Path) -> None:
    """Each loss is that of a text that begins at most a window before the token and, but for the first tokens of the
    document, at least half a window before it."""
    model, _ = load_hf_folder(folder)
    ids = torch.randint(0, SHAPE.vocab_size, (total,), generator=torch.Generator().manual_seed(total))
    found = window_losses(model, ids, window).numpy()
    for target in range(1, total):
        nearest = max(0, target - window // 2)
        starts = range(max(0, target - window + 1), nearest + 1)
        possible = [reference_losses(model, ids[start : target + 1])[-1] for start in starts]
        assert np.abs(found[target - 1] - possible).min() < 1e-5, target


@pytest.mark.parametrize("length", [32, 33, 100, 256, 2048])
def test_buckets_have_every_position_once(length: int) -> None:
    buckets = position_buckets(length)
    counted = [position for first, end in buckets for position in range(first, end)]
    assert counted == list(range(1, length))
    losses = np.arange(1, length, dtype=np.float64)  # the loss at position p is p
    for (first, end), mean in zip(buckets, bucket_means(losses, length), strict=True):
        assert mean == pytest.approx((first + end - 1) / 2)
        assert end <= max(32, 2 * first)


def test_means_and_standard_errors_are_over_documents() -> None:
    rng = np.random.default_rng(0)
    losses = rng.random((5, 63))
    rows = by_position(np.array([bucket_means(document, 64) for document in losses]), 64)
    assert [(row["first"], row["end"], row["tokens"]) for row in rows] == [(1, 32, 155), (32, 64, 160)]
    by_hand = [document[31:].mean() for document in losses]
    assert rows[1]["value"] == pytest.approx(losses[:, 31:].mean())
    assert rows[1]["stderr"] == pytest.approx(stats.sem(by_hand))
    shorter = losses + rng.random((5, 1))
    halves = np.array(
        [[second_half_mean(one), second_half_mean(other)] for one, other in zip(shorter, losses, strict=True)]
    )
    first, second = by_context(halves, (32, 64), 64)
    assert (first["tokens"], first["difference"]["value"]) == (160, 0)
    paired = (losses - shorter)[:, 31:].mean(axis=1)
    assert second["difference"]["value"] == pytest.approx(paired.mean())
    assert second["difference"]["stderr"] == pytest.approx(stats.sem(paired))
    assert by_position(halves[:1, :1], 32)[0]["stderr"] is None


def test_intervals_and_chance_are_those_of_scipy() -> None:
    for right, questions in ((0, 10), (3, 10), (10, 10), (120, 440)):
        expected = stats.binomtest(right, questions, 0.2, alternative="greater")
        interval = stats.binomtest(right, questions).proportion_ci(method="wilson")
        assert wilson_interval(right, questions) == pytest.approx((interval.low, interval.high), abs=1e-12)
        assert chance_of(right, questions, 5) == pytest.approx(expected.pvalue, rel=1e-9)


def test_long_documents_are_whole_from_their_start(data_dir: Path, tokenizer: Tokenizer) -> None:
    texts = [
        row.get("text") or row["content"]
        for part in data_dir.parent.glob("raw/*/validation/part.jsonl")
        for row in map(json.loads, part.read_text().splitlines())
    ]
    whole = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    length = sorted(map(len, whole))[3]
    documents = read_long_documents(data_dir, length, 100, tokenizer.vocab_size)
    assert len(whole) == len(documents) + 3 == 12
    assert sorted(document.ids.tolist() for document in documents) == sorted(
        ids[:length] for ids in whole if len(ids) >= length
    )
    assert {document.source for document in documents} == {"slimpajama", "starcoderdata"}
    assert len(read_long_documents(data_dir, length, 3, tokenizer.vocab_size)) == 3
    with pytest.raises(ConfigError, match=r"its longest held-out document has [\d,]+ tokens; expected 50,000"):
        read_long_documents(data_dir, 50_000, 100, tokenizer.vocab_size)


def test_a_needle_is_at_its_depth_and_the_text_fits(tokenizer: Tokenizer) -> None:
    texts = [made_up_text(number, 300) for number in range(5)]
    haystack = Haystack(texts, lambda text: len(tokenizer.encode(text)))
    for length in (256, 1500):
        for depth in DEPTHS:
            question = haystack.question(length, depth, 3)
            assert question == haystack.question(length, depth, 3)
            used = len(tokenizer.encode(f"{question.question} {question.choices[question.answer]}"))
            assert 0.85 * length < used <= length
            needle = f"is {question.choices[question.answer]}."
            before, after = question.question.split(needle)
            hay = len(before) + len(after)
            assert len(before) / hay == pytest.approx(depth / 100, abs=60 / length + 0.15 * (length == 256))
            assert all(choice not in before + after for choice in question.choices)
    with pytest.raises(ConfigError, match="length 32 is too short for a needle"):
        haystack.question(32, 0, 0)


@pytest.fixture(scope="module")
def measured(folder: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    output = tmp_path_factory.mktemp("measured")
    assert main(["evaluate", *arguments_of(folder, data_dir, output), "--write-tasks", str(output / "tasks")]) == 0
    return output


def arguments_of(folder: Path, data: Path, output: Path) -> list[str]:
    lengths = ["--lengths", "128", str(LENGTH), "--limit", "2"]
    where = ["--device", "cpu", "--output", str(output), "--data", str(data)]
    return [str(folder), "--suite", "long-context", *lengths, *where]


def test_the_command_writes_what_the_model_does(measured: Path, folder: Path, data_dir: Path) -> None:
    """Against transformers' logits of the same documents, and plain sums."""
    found = json.loads((measured / "long-context.json").read_text())["long_context"]
    model, tokenizer = load_hf_folder(folder)
    documents = read_long_documents(data_dir, LENGTH, 2, SHAPE.vocab_size)
    losses = np.stack([reference_losses(model, torch.from_numpy(document.ids)) for document in documents])
    for row in found["positions"]:
        assert row["value"] == pytest.approx(losses[:, row["first"] - 1 : row["end"] - 1].mean(), abs=1e-5)
    assert found["contexts"][1]["value"] == pytest.approx(losses[:, LENGTH // 2 - 1 :].mean(), abs=1e-5)
    assert [row["context"] for row in found["contexts"]] == [128, LENGTH]
    needle = found["needle"]
    assert len(needle["cells"]) == 2 * len(DEPTHS)
    assert needle["all"]["questions"] == 2 * 2 * len(DEPTHS)
    assert sum(cell["right"] for cell in needle["cells"]) == needle["all"]["right"]
    text = (measured / "long-context.md").read_text()
    for part in ("Perplexity by position", "by context", "Needle in a haystack", "Chance is 20%"):
        assert part in text
    assert (measured / "long-context.png").read_bytes().startswith(b"\x89PNG")


def test_lm_eval_reads_the_task_files_and_its_own_model_scores_the_same(measured: Path, folder: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    tasks = [str(measured / "tasks" / f"needle_{length}.yaml") for length in (128, LENGTH)]
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=tasks,
        device="cpu",
        batch_size=8,
        task_manager=TaskManager(include_defaults=False),
    )
    assert found is not None
    ours = json.loads((measured / "long-context.json").read_text())["long_context"]["needle"]["cells"]
    model, tokenizer = load_hf_folder(folder)
    for length in (128, LENGTH):
        task = f"needle_{length}"
        cells = [cell for cell in ours if cell["length"] == length]
        right, asked = (sum(cell[key] for cell in cells) for key in ("right", "questions"))
        assert found["results"][task]["acc,none"] == pytest.approx(right / asked)
        sample = found["samples"][task][-1]
        question = Question(**sample["doc"])
        theirs = [float(response[0][0]) for response in sample["resps"]]
        assert answer(model, tokenizer, question).log_likelihoods == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (("--lengths", "512"), "--lengths 512: is beyond the model's 256 positions (max_position_embeddings)"),
        (("--document-tokens", "60000"), "its longest held-out document has"),
        (("--document-tokens", "64"), "--document-tokens 64: is less than the longest of --lengths, 256"),
        (("--data", "nowhere"), "nowhere: holds no validation split; expected a data directory made by prepare"),
        (
            ("--suite", "long-contexts"),
            "suite 'long-contexts' is unknown; choose commonsense, instruct, chinese, long-",
        ),
        (("--suite", "commonsense"), "--data: is for --suite long-context"),
    ],
)
def test_wrong_options_are_rejected(
    changes: tuple[str, str], sentence: str, folder: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["evaluate", *arguments_of(folder, data_dir, tmp_path / "scores"), *changes]) == 78
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tinyllama-ds: ")]
    assert len(said) == 1
    assert sentence in said[0]
    assert not (tmp_path / "scores").exists()


def test_data_of_a_different_tokenizer_is_rejected(
    folder: Path, fast_data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["evaluate", *arguments_of(folder, fast_data_dir, tmp_path)]) == 78
    assert "is not the tokenizer of the model; expected data prepared with it" in capsys.readouterr().err


def test_a_model_that_scales_its_logits_is_rejected() -> None:
    import transformers

    config = transformers.GraniteConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, logits_scaling=3.0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="GraniteForCausalLM: its logits are more than hidden states times the LM"):
        reject_other_heads(transformers.GraniteForCausalLM(config))


def test_two_ranks_measure_what_one_does(measured: Path, folder: Path, data_dir: Path, tmp_path: Path) -> None:
    finished = on_ranks(run_module, SCORE, *arguments_of(folder, data_dir, tmp_path), ranks=2)
    assert finished.returncode == 0, finished.stderr
    one, two = (json.loads((path / "long-context.json").read_text())["long_context"] for path in (measured, tmp_path))
    assert one["needle"] == two["needle"]
    assert [row["value"] for row in one["positions"]] == pytest.approx([row["value"] for row in two["positions"]])
    assert [row["value"] for row in one["contexts"]] == pytest.approx([row["value"] for row in two["contexts"]])
