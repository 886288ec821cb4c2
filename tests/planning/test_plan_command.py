"""`tinyllama-ds plan` as a user starts it: published figures, impossible plans, the search, the outputs."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked import tinyllama_ds
from launching import Finished

from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.prepare.sources import source_format
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.planning.plan import read_inputs, resolve

ROOT = Path(__file__).parents[2]
ZERO3, HPZ, DEMO = (ROOT / "ds_configs" / f"{name}.json" for name in ("zero3", "zero3_hpz", "demo_zero3"))
A100_2X8 = ("--hostfile", ROOT / "hostfiles" / "a100_2x8")
P4D_PRICE = 32.77 / 8  # USD per GPU-hour: p4d.24xlarge on demand in 2023


def plan(*arguments: object, recipe: object = "tinyllama-v1", config: Path = ZERO3) -> Finished:
    return tinyllama_ds("plan", "--recipe", recipe, "--deepspeed-config", config, *arguments)


def planned(*arguments: object, **which: object) -> dict:
    finished = plan(*arguments, "--json", **which)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_tinyllama_v1_on_sixteen_a100() -> None:
    arguments = (*A100_2X8, "--tokens-per-second", 24_000, "--price-per-hour", P4D_PRICE)
    found = planned(*arguments, "--compile", "off")  # as TinyLlama was
    assert found["steps"] == 1_430_512  # pretrain/tinyllama.py: 715,256 x 2
    assert found["days"] == pytest.approx(90.4, rel=0.01)
    assert found["gpu_hours_per_300b_tokens"] == pytest.approx(3_456, rel=0.01)  # the paper's table 2
    assert round(found["gpu_hours_per_300b_tokens"]) == 3_472
    assert found["usd"] == pytest.approx(140_000, rel=0.02)  # "about 140k USD"
    assert found["micro_batch"] * 2048 == 16_384  # the README's 16k tokens per GPU ...
    assert found["memory"]["total"] <= found["memory"]["capacity"] == 40 * 2**30  # ... fit 40 GB


def test_the_published_figure_is_next_to_ours() -> None:
    text = plan(*A100_2X8, "--tokens-per-second", 24_000).stdout
    assert re.search(r"GPU-hours per 300 billion tokens +3,472 \(TinyLlama's paper: 3,456\)", text)


def test_the_code_model_fits_eight_gpus() -> None:
    config = ROOT / "ds_configs" / "zero3_python_8k.json"
    found = planned("--num-gpus", 8, recipe="tinyllama-python-8k", config=config)
    assert found["steps"] == 2_374
    assert found["memory"]["total"] <= found["memory"]["capacity"]


@pytest.mark.parametrize(("name", "hours"), [("tinyllama-32k", 160), ("tinyllama-128k", 258)])
@pytest.mark.parametrize("gpus", [1, 8])
def test_a_context_extension_fits_cards_of_80_gb(name: str, hours: int, gpus: int) -> None:
    """The figures of docs/long-context.md."""
    arguments = ("--gpu", "h100", "--num-gpus", gpus, "--activation-checkpointing", 1)
    found = planned(*arguments, recipe=name, config=ROOT / "ds_configs" / "zero1_long.json")
    assert found["gpu_hours"] == pytest.approx(hours, rel=0.02)
    assert found["memory"]["total"] <= found["memory"]["capacity"]


def test_milestones_of_v1_1() -> None:
    arguments = ("--hostfile", ROOT / "hostfiles" / "a100_16x4", "--gpu", "a100-80g")
    config = ROOT / "ds_configs" / "zero3.json"
    failed = plan(*arguments, recipe="tinyllama-v1.1-math-code", config=config)
    assert failed.returncode == 78  # micro batch 8 does not divide 14 sequences
    assert "sizes that work: 1, 2, 7, 14" in failed.stderr
    found = planned(*arguments, "--search", recipe="tinyllama-v1.1-math-code", config=config)
    milestones = {milestone["name"]: milestone for milestone in found["borders"]}
    ends = [milestones[f"end of {stage}"]["step"] for stage in ("basic", "domain", "cooldown")]
    assert ends == pytest.approx([817_435, 817_435 + 190_735, 817_435 + 190_735 + 20_436], abs=2)
    assert milestones["end of basic"]["tokens"] == pytest.approx(1.5e12, rel=1e-5)
    rates = [milestones[f"end of {stage}"]["learning_rate"] for stage in ("basic", "domain", "cooldown")]
    assert rates == pytest.approx([9.27e-5, 4.50e-5, 4.0e-5], rel=0.01)
    assert milestones["first step of domain"]["mixture"]["slimpajama"] > 0.99  # the ramp starts where it was
    assert milestones["end of the ramp of domain"]["mixture"]["starcoderdata"] == pytest.approx(0.15, abs=0.005)
    assert milestones["end of cooldown"]["mixture"] == pytest.approx(
        {"slimpajama": 0.75, "starcoderdata": 0.15, "proof-pile-2": 0.1}, abs=1e-3
    )
    assert milestones["first step of cooldown"]["batch_tokens"] == 4 * milestones["end of domain"]["batch_tokens"]


def test_needs_neither_torch_nor_deepspeed() -> None:
    program = """
import sys
from tinyllama_ds.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "deepspeed", "transformers", "matplotlib"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""
    command = ["plan", "--recipe", "tinyllama-v1", "--deepspeed-config", str(ZERO3), *map(str, A100_2X8), "--search"]
    finished = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("arguments", "which", "sentence"),
    [
        (("--gpu", "rtx-4090"), {}, r"zero3.json: micro-batch 8 needs .* of the 24.0 GiB .*what fits: zero\d.* micro"),
        (("--gpu-memory", "2GiB", "--peak-tflops", 10), {}, r"nothing fits the 2.0 GiB"),
        (("--num-gpus", 7), {}, r"1024 sequences does not divide over 7 data-parallel ranks; numbers that work: 1, 2"),
        (("--num-gpus", 7, "--search"), {}, r"over 7 data-parallel ranks; smaller numbers that do: 1, 2, 4"),
        (("--gpu", "gtx-970"), {}, r"--gpu 'gtx-970' is unknown; expected a100-40g, "),
        (("--gpu-memory", "much", "--peak-tflops", 1), {}, r"expected a size such as 40GiB"),
        (("--gpu-memory", "40GiB"), {}, r"give both"),
        (("--efficiency", 1.5), {}, r"1 at most"),
        (("--attention", "flash"), {}, r"--attention 'flash' is unknown; expected auto, flash_attention_4, "),
        (("--network", -1), {}, r"--network -1: expected a number above 0"),
        (("--write-config", "x.json"), {}, r"give --search as well"),
        (("--data", "absent"), {}, r"absent: the data directory is missing"),
        ((), {"config": HPZ, "gpus": 4}, r"zero_hpz_partition_size 8 does not divide 4"),
    ],
)  # fmt: skip
def test_impossible_plans_are_rejected_with_what_would_work(arguments: tuple, which: dict, sentence: str) -> None:
    gpus = which.pop("gpus", None)
    finished = plan(*arguments, *(("--num-gpus", gpus) if gpus else ()), **which)
    assert finished.returncode == 78
    assert re.search(sentence, finished.stderr), finished.stderr
    assert finished.stdout == ""


def test_stage_of_zero_tokens_is_rejected(tmp_path: Path) -> None:
    text = (ROOT / "tinyllama_ds" / "recipes" / "tinyllama-v1.toml").read_text()
    recipe = tmp_path / "nothing.toml"
    recipe.write_text(text.replace("tokens = 3_000_000_000_000", "tokens = 0", 1))
    finished = plan(recipe=recipe)
    assert finished.returncode == 78
    assert re.search(r"stages\[0\].tokens is 0; expected 1 or more", finished.stderr)


def small_recipe(tmp_path: Path) -> Path:
    """The demo's recipe for the model size of the tests."""
    text = (ROOT / "tinyllama_ds" / "recipes" / "demo.toml").read_text().replace('model = "demo"', 'model = "test"')
    recipe = tmp_path / "small.toml"
    recipe.write_text(text.replace("sequence_length = 256", "sequence_length = 128"))
    return recipe


def test_sizes_come_from_the_data(data_dir: Path, tmp_path: Path) -> None:
    found = planned("--data", data_dir, "--num-gpus", 2, recipe=small_recipe(tmp_path), config=DEMO)
    manifests = [json.loads(path.read_text()) for path in (data_dir / "slimpajama" / "train").glob("*.json")]
    samples = sum(manifest["tokens"] for manifest in manifests) // 128
    drawn = found["tokens_by_source"]["slimpajama"] // 128
    assert found["epochs"]["slimpajama"] == pytest.approx(drawn / samples, rel=0.01)
    assert any("epochs; beyond 4" in warning for warning in found["warnings"])


def test_a_source_of_less_than_a_sample_is_rejected(data_dir: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    raw, data = tmp_path / "raw" / "train", tmp_path / "data"
    raw.mkdir(parents=True)
    (raw / "part.jsonl").write_text(json.dumps({"text": "a small llama", "redpajama_set_name": "RedPajamaC4"}))
    prepare(Preparation("slimpajama", raw.parent, source_format("slimpajama"), tokenizer.path, data))
    shutil.copytree(data_dir / "starcoderdata", data / "starcoderdata")
    finished = plan("--data", data, "--num-gpus", 2, recipe=small_recipe(tmp_path), config=DEMO)
    assert finished.returncode == 78
    assert re.search(r"slimpajama/train: \d+ tokens are less than one sample of 129 tokens", finished.stderr)


def test_the_winner_of_the_search_loads(tmp_path: Path) -> None:
    """Through our own checks, through DeepSpeed's parser, and as the plan of that JSON, which is equal."""
    from tinyllama_ds.config.deepspeed import split_off_our_sections
    from tinyllama_ds.train.engine import check_with_deepspeed

    winner = tmp_path / "winner.json"
    found = planned(*A100_2X8, "--search", "--write-config", winner)
    best, rates = found["ranking"][0], [row["tokens_per_second_per_gpu"] for row in found["ranking"]]
    assert best["tokens_per_second_per_gpu"] > 0.99 * max(rates)
    assert all(row["memory"] <= found["memory"]["capacity"] for row in found["ranking"])
    resolved = resolve(read_inputs("tinyllama-v1", winner), best["micro_batch"], 16)
    engine_config, _ = split_off_our_sections(resolved)
    on_one_rank = {"train_batch_size": best["micro_batch"] * resolved["gradient_accumulation_steps"]}
    check_with_deepspeed(engine_config | on_one_rank, str(winner))
    again = planned(*A100_2X8, config=winner)
    assert (again["memory"]["total"], again["days"]) == (found["memory"]["total"], found["days"])


def test_reasons_of_the_search_read_like_sentences() -> None:
    text = plan(*A100_2X8, "--search").stdout
    line = r"1\. +zero\w+, micro-batch \d+, [\w ]+: [\d.]+k tokens/s per GPU, [\d.]+ of 40 GiB, \d+% of the step is"
    assert re.search(line, text)


def test_the_page_needs_nothing_else_and_the_picture_is_one(tmp_path: Path) -> None:
    page, picture = tmp_path / "plan.html", tmp_path / "plan.png"
    finished = plan(*A100_2X8, "--search", "--html", page, "--picture", picture)
    assert finished.returncode == 0, finished.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert not re.search(r"(?:src|href)=(?!['\"]?#)|@import|url\((?!#)", text)  # nothing is fetched
    for title in (
        "Ranking",
        "Memory per GPU",
        "Communication per step",
        "Timeline",
        "Values and their owners",
    ):
        assert title in text
    assert text.count("<svg") == 3


def config_with(tmp_path: Path, **changes: object) -> Path:
    raw = json.loads(ZERO3.read_text()) | changes
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return path


def test_warnings_of_a_specialist(tmp_path: Path) -> None:
    def warnings(*arguments: object, **changes: object) -> str:
        return "\n".join(planned(*arguments, config=config_with(tmp_path, **changes))["warnings"])

    assert "learning rate never falls" in warnings(*A100_2X8, scheduler=None)
    schedule = json.loads(ZERO3.read_text())["scheduler"]
    schedule["params"] |= {"cos_min_ratio": 0.9, "warmup_num_steps": 500_000}
    found = warnings(*A100_2X8, scheduler=schedule)
    assert "the learning rate hardly falls, to 0.9 of its peak" in found
    assert "the warmup takes 35% of the run" in found
    constant = {"type": "WarmupLR", "params": {"warmup_num_steps": 64, "warmup_type": "linear"}}
    assert "the learning rate never falls" in warnings(*A100_2X8, scheduler=constant)
    tiny = warnings("--num-gpus", 1024, train_micro_batch_size_per_gpu=1)
    assert "accumulation 1 with micro-batches of 2,048 tokens under ZeRO-3" in tiny
    assert "source 'slimpajama' repeats: 3.1" in warnings(*A100_2X8)
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=4\nb slots=4\nc slots=4\nd slots=4\n")
    assert "after the loss of a host: of 1 to 4 hosts only 1, 2, 4" in warnings("--hostfile", hosts)


def test_warmup_longer_than_its_stage(tmp_path: Path) -> None:
    text = (ROOT / "tinyllama_ds" / "recipes" / "tinyllama-v1.1.toml").read_text()
    recipe = tmp_path / "short.toml"
    recipe.write_text(text.replace("tokens = 1_500_000_000_000", "tokens = 1_000_000_000", 1))
    found = planned("--num-gpus", 8, "--gpu", "h200", "--search", recipe=recipe)
    assert any("longer than stage 'basic'" in warning for warning in found["warnings"])


def test_failures_and_storage_are_those_of_the_literature(tmp_path: Path) -> None:
    """90 days on 16 hosts: 4 to 6 interruptions in a good fleet, 23 in a bad one, Young/Daly 105 minutes for 15 s."""
    from tinyllama_ds.planning.cost import BAD_FLEET, GOOD_FLEET, failures_of

    good, bad = (failures_of(90, 16, 15, 30, rate) for rate in (GOOD_FLEET, BAD_FLEET))
    assert 4 <= good.expected <= 6
    assert round(bad.expected) == 23
    assert good.best_interval_minutes == pytest.approx(105, rel=0.02)
    assert good.goodput >= 0.99
    storage = planned(*A100_2X8)["storage"]
    assert storage["checkpoint"] == pytest.approx(13.2e9, rel=0.01)
    assert storage["tokens"] == pytest.approx(1.9e12, rel=0.01)  # 950 billion tokens in uint16: 1.8 TiB
