"""The commands with a draft: `generate --target`, `chat --target` and `draft-bench`, and what they reject."""

import io
import json
from dataclasses import replace
from pathlib import Path

import fast_folders
import pytest
from drafts import SHAPE

from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import EXIT_CONFIG
from tinyllama_ds.hf.convert import ExportOptions, export
from tinyllama_ds.hf.import_model import import_hf_folder
from tinyllama_ds.model.llama import build_model
from tinyllama_ds.speculative.report import figure_of, report_text


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A chat model as `target`; its first layer as `draft`, a model folder; and `other` with a different tokenizer."""
    root = tmp_path_factory.mktemp("models")
    weights = {name: 3 * tensor for name, tensor in build_model(SHAPE, "eager", seed=1).state_dict().items()}
    weights["lm_head.weight"][3:259] = 0  # no bytes, which are whole characters only together
    export(weights.items(), SHAPE, tokenizer, root / "target", ExportOptions(is_chat_model=True))
    first = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    shape = replace(SHAPE, num_hidden_layers=1)
    export(first.items(), shape, tokenizer, root / "draft_hf")
    import_hf_folder(root / "draft_hf", root / "draft")
    other = load_tokenizer(fast_folders.smollm2(root / "other_tokenizer", 500))
    export(weights.items(), SHAPE, other, root / "other")
    (root / "prompts.txt").write_text("the small llama\n\nthe loss of a batch = 3\n")
    return root


def test_greedy_text_and_its_speed(root: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["the small llama", "--max-new-tokens", "8", "--temperature", "0"]
    assert main(["generate", str(root / "target"), *arguments]) == 0
    alone = capsys.readouterr()
    with_draft = ["generate", str(root / "draft"), *arguments, "--target", str(root / "target"), "--draft-length", "2"]
    assert main(with_draft) == 0
    found = capsys.readouterr()
    assert found.out == alone.out
    (line,) = found.err.splitlines()
    assert " of 2 drafted tokens accepted per round, " in line
    assert " tokens/s; the target alone: " in line
    assert main([*with_draft, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == alone.out.removesuffix("\n")
    assert result["tokens"] == 8
    assert result["speedup"] == pytest.approx(result["tokens_per_second"] / result["tokens_per_second_alone"])


def test_a_draft_speeds_up_a_chat_model(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    texts = []
    for model, target in ((root / "target", []), (root / "draft", ["--target", str(root / "target")])):
        monkeypatch.setattr("sys.stdin", io.StringIO("the loss\nthe rate\n"))
        assert main(["chat", str(model), "--max-new-tokens", "8", *target]) == 0
        texts.append(capsys.readouterr())
    assert texts[0].out == texts[1].out
    assert len(texts[1].err.splitlines()) == 3  # one for each answer, and one at the end
    assert "the last question, 8 tokens at most: " in texts[1].err
    assert main(["chat", str(root / "target"), "--target", str(root / "draft_hf")]) == EXIT_CONFIG
    assert f"{root}/draft_hf: was not trained on conversations" in capsys.readouterr().err


def test_all_figures_are_measured(root: Path, capsys: pytest.CaptureFixture) -> None:
    drafts = [str(root / "draft"), str(root / "target")]
    arguments = ["--target", str(root / "target"), "--drafts", *drafts, "--prompts", str(root / "prompts.txt")]
    more = ["--max-new-tokens", "9", "--draft-lengths", "3", "1", "--output", str(root / "bench")]
    assert main(["draft-bench", *arguments, *more, "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result == json.loads((root / "bench" / "draft_bench.json").read_text())
    assert (root / "bench" / "draft_bench.png").read_bytes().startswith(b"\x89PNG")
    assert (result["prompts"], result["tokens"], result["threads"], result["dtype"]) == (2, 18, 1, "float32")
    small, copy = result["drafts"]
    assert [row["draft_length"] for row in small["draft_lengths"]] == [1, 3]
    assert small["parameters"] < copy["parameters"] == result["parameters"]
    assert all(row["same_as_target"] == 2 for draft in (small, copy) for row in draft["draft_lengths"])
    assert all(row["acceptance"] == 1 for row in copy["draft_lengths"])
    assert copy["acceptance_by_position"] == [1, 1, 1]
    assert min(copy["cost_ratio"], small["cost_ratio"]) > 0
    for draft in (small, copy):
        best = max(draft["draft_lengths"], key=lambda row: row["speedup"])
        assert (draft["best_draft_length"], draft["speedup"]) == (best["draft_length"], best["speedup"])
    check_report(result, root)


def check_report(result: dict, root: Path) -> None:
    text = report_text(result)
    assert f"{root}/draft " in text
    assert "best: " in text
    for speedup, ending in ((1.25, " x the target alone"), (0.4, "and it is 1.00")):
        for draft in result["drafts"]:
            draft["speedup"] = speedup
            for row in draft["draft_lengths"]:
                row |= {"speedup": speedup, "round_cost": 1.5, "acceptance": 1.0}
        assert report_text(result).endswith(ending)
    for draft in result["drafts"]:
        for row in draft["draft_lengths"]:
            row |= {"round_cost": 9.0, "acceptance_to_break_even": None}
    assert report_text(result).endswith("a round of this length takes too long for 1.2 x with any acceptance")
    positions, lengths = figure_of(result).axes
    assert len(positions.lines) == 2
    assert len(lengths.lines) == 5  # two of each draft, and the target alone


def test_sampled_texts_are_not_compared(root: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--target", str(root / "target"), "--drafts", str(root / "draft")]
    more = ["--prompts", str(root / "prompts.txt"), "--max-new-tokens", "4", "--draft-lengths", "2"]
    assert main(["draft-bench", *arguments, *more, "--temperature", "1", "--output", str(root / "sampled")]) == 0
    assert "sampled" in capsys.readouterr().out
    (draft,) = json.loads((root / "sampled" / "draft_bench.json").read_text())["drafts"]
    assert draft["draft_lengths"][0]["same_as_target"] is None


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "prompts: the file of prompts is missing"),
        (b"", "prompts: has no prompts; expected one a line"),
        (b" \n\n", "prompts: has no prompts; expected one a line"),
        (b"the loss\n\xff\n", "prompts:2: byte 0xff is not UTF-8; expected the file of prompts in UTF-8"),
        (b"the\n" + b"loss " * 200, "prompts:2: the prompt has 201 tokens; expected fewer than the 128 positions of"),
    ],
)
def test_wrong_prompts_are_rejected(
    content: bytes | None, sentence: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if content is not None:
        (tmp_path / "prompts").write_bytes(content)
    arguments = ["--target", str(root / "target"), "--drafts", str(root / "draft")]
    prompts = ["--prompts", str(tmp_path / "prompts"), "--output", str(tmp_path / "bench")]
    assert main(["draft-bench", *arguments, *prompts]) == EXIT_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert not (tmp_path / "bench").exists()


def test_wrong_models_are_rejected(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text("{")
    cases = (
        (root / "draft", tmp_path, f"{tmp_path}: transformers cannot load it: "),
        (root / "draft", tmp_path / "missing", f"{tmp_path}/missing"),
        (root / "other", root / "target", f"{root}/other: id 0 is '<|endoftext|>' in its tokenizer and '<unk>' in"),
    )
    for draft, target, sentence in cases:
        assert main(["generate", str(draft), "the", "--target", str(target)]) == EXIT_CONFIG
        (line,) = capsys.readouterr().err.splitlines()
        assert sentence in line
    for option in (["--draft-length", "3"], ["--universal-assisted-decoding"]):
        assert main(["generate", str(root / "target"), "the", *option]) == EXIT_CONFIG
        assert f"{option[0]} is for speculative decoding; expected --target" in capsys.readouterr().err
    universal = ["--universal-assisted-decoding", "--max-new-tokens", "4", "--temperature", "0"]
    assert main(["generate", str(root / "other"), "the", "--target", str(root / "target"), *universal]) == 0
