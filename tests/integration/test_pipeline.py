"""The whole pipeline by its commands: raw text, tokenizer, shards, ZeRO-3 on two ranks, export, text, report."""

import json
from collections.abc import Callable
from pathlib import Path

import launching
import pytest
import transformers
from forked import tinyllama_ds
from launching import STEP_TOKENS, Finished, read_series, write_deepspeed_config, write_recipe
from made_up import made_up_text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS = 8


def succeed(*arguments: object, start: Callable[..., Finished] = tinyllama_ds) -> str:
    finished = start(*arguments)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


META = {"redpajama_set_name": "RedPajamaC4"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw text in two formats, everything made from it by the commands, and a finished run."""
    root = tmp_path_factory.mktemp("workspace")
    for number, (source, field) in enumerate((("slimpajama", "text"), ("starcoderdata", "content"))):
        for split, documents in (("train", 40), ("validation", 8)):
            folder = root / "raw" / source / split
            folder.mkdir(parents=True)
            texts = [made_up_text(1000 * number + 50 * len(split) + index, 200) for index in range(documents)]
            (folder / "a.jsonl").write_text("\n".join(json.dumps({field: text, "meta": META}) for text in texts))
    model = root / "tokenizer.model"
    raws = [root / "raw" / source for source in ("slimpajama", "starcoderdata")]
    succeed("train-tokenizer", "--input", *raws, "--vocab-size", 512, "--output", model)
    for raw in raws:
        succeed("prepare", "--source", raw.name, "--input", raw, "--tokenizer", model, "--output", root / "data")
    recipe = write_recipe(root / "small.toml", STEPS, save_every=STEPS, evaluate_every=4)
    samples = f'[samples]\nprompts = ["the small llama"]\nevery_tokens = {4 * STEP_TOKENS}\nnew_tokens = 12\n'
    recipe.write_text(recipe.read_text() + samples)
    csv = {"enabled": True, "output_path": "auto", "job_name": "auto"}
    config = write_deepspeed_config(
        root / "ds.json", 3, micro_batch=2, bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"},
        tensorboard={"enabled": True}, csv_monitor=csv,
    )  # fmt: skip
    data = ["--data", root / "data", "--run-dir", root / "run"]
    succeed(
        "pretrain",
        "--recipe",
        recipe,
        "--deepspeed-config",
        config,
        *data,
        "--num-gpus",
        2,
        start=launching.tinyllama_ds,
    )
    return root


def test_figures_are_complete_and_the_same_everywhere(workspace: Path) -> None:
    run = workspace / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "Train/Loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    for name in ("LearningRate", "GradNorm", "Loss"):
        assert all(row[f"Train/{name}"] > 0 for row in trained)
    for name in ("data", "forward", "backward", "step"):
        assert all(row[f"Seconds/{name}"] > 0 for row in trained)
    assert all(0 < row["Speed/MFU"] < 1 and row["Memory/PeakGiB"] > 0 for row in trained)
    assert trained[-1]["tokens"] == trained[-1]["Tokens/slimpajama"] + trained[-1]["Tokens/starcoderdata"]
    assert trained[-1]["Tokens/slimpajama"] == pytest.approx(0.7 * trained[-1]["tokens"], abs=32)
    assert (
        len(read_series(run, "Validation/Loss/starcoderdata")) == 3
    )  # before the first step, in the middle, at the end

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("Train/Loss")]
    assert losses == [(row["step"], pytest.approx(row["Train/Loss"], rel=1e-6)) for row in trained]
    assert "run/text_summary" in events.Tags()["tensors"]
    events = EventAccumulator(str(run / "tensorboard" / "over_tokens")).Reload()
    over_tokens = [event.step for event in events.Scalars("OverTokens/Train/Loss")]
    assert over_tokens == [row["tokens"] for row in trained]
    csv_loss = (run / "csv" / "Train_Loss.csv").read_text().splitlines()
    assert len(csv_loss) == STEPS + 1  # and its header


def test_run_directory_describes_itself(workspace: Path) -> None:
    description = json.loads((workspace / "run" / "run.json").read_text())
    assert description["deepspeed_config"]["gradient_accumulation_steps"] == 2
    assert description["deepspeed_config"]["scheduler"]["params"]["total_num_steps"] == STEPS
    assert description["versions"].keys() >= {"torch", "deepspeed", "python"}
    assert description["data"]["train"]["slimpajama"]["documents"] == 40
    assert (workspace / "run" / "tokenizer.model").read_bytes() == (workspace / "tokenizer.model").read_bytes()
    assert json.loads((workspace / "run" / "status.json").read_text())["state"] == "finished"


def test_export_loads_in_transformers_and_speaks_as_the_checkpoint_does(workspace: Path) -> None:
    out = workspace / "hf"
    result = json.loads(succeed("export", workspace / "run", out, "--json"))
    assert result["largest_logit_difference"] < 1e-4
    assert {path.name for path in out.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.num_parameters() == 158_016

    greedy = ["the small llama", "--temperature", 0, "--max-new-tokens", 12, "--json"]
    texts = [json.loads(succeed("generate", place, *greedy))["text"] for place in (workspace / "run", out)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("the small llama")
    samples = [json.loads(line) for line in (workspace / "run" / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [4, STEPS]
    continuation = texts[0].removeprefix("the small llama").strip()
    assert samples[-1]["text"].strip() == continuation, "what training saw is what transformers says"
    again = tinyllama_ds("export", workspace / "run", out)
    assert again.returncode == 78
    assert "already exists" in again.stderr


def test_report_writes_a_page_and_a_picture(workspace: Path) -> None:
    summary = json.loads(succeed("report", workspace / "run", "--json"))
    assert (summary["step"], summary["state"], summary["starts"]) == (STEPS, "finished", 1)
    assert 0 < summary["goodput"] < 1
    page = Path(summary["page"]).read_text()
    assert f"Finished: all {STEPS} steps, {summary['tokens']:,} tokens" in page
    assert page.count("<svg") == 10
    assert "the small llama" in page
    picture = Path(summary["picture"]).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_prepare_again_does_nothing(workspace: Path) -> None:
    shards = sorted((workspace / "data").rglob("*.bin"))
    before = [path.stat().st_mtime_ns for path in shards]
    table = json.loads(
        succeed(
            "prepare", "--source", "slimpajama", "--input", workspace / "raw" / "slimpajama",
            "--tokenizer", workspace / "tokenizer.model", "--output", workspace / "data", "--json",
        )
    )  # fmt: skip
    assert [path.stat().st_mtime_ns for path in shards] == before
    assert table["train"]["documents"] == 40
