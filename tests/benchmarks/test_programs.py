"""Every program of `benchmarks/` runs, at a tiny size: what it calls of the package is as it is now.

Those that start ranks of their own are called where the same measurement is wanted: `tests/planning/test_measured.py`
runs `plan_memory.py`, `network_plan.py bytes` and with them `plan_probe.py`; `test_on_gpu.py` runs `on_gpu.py`.
"""

import json
import os
from pathlib import Path

import hosts
import pytest
from forked import on_ranks, run_script
from launching import Finished

from contenders import CONTENDERS, SIZES
from tinyllama_ds.data.tokenizers.abstract import Tokenizer

FOLDER = Path(__file__).parents[2] / "benchmarks"
REASON = hosts.why_not()
MODULES = {"contenders", "installed", "plan_launching", "plan_probe"}  # of the other programs
PLAIN = "plain loop, compiled, sdpa"
ELSEWHERE = {"plan_memory": "test_measured.py", "on_gpu": "test_on_gpu.py"}


def benchmark(name: str, *arguments: object, ranks: int = 1, **more: str) -> Finished:
    """A program as a user starts it, without compiling, which takes longer here than all the rest."""
    more |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}
    finished = on_ranks(run_script, FOLDER / f"{name}.py", *arguments, ranks=ranks, **more)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def test_every_program_is_here_or_elsewhere() -> None:
    text = Path(__file__).read_text()
    names = {path.stem for path in FOLDER.glob("*.py")} - MODULES
    assert {name for name in names if f'benchmark("{name}"' not in text} == set(ELSEWHERE)
    for name, test in ELSEWHERE.items():
        [path] = FOLDER.parent.glob(f"tests/*/{test}")
        assert name in path.read_text()


def test_attention_on_a_cpu() -> None:
    lines = benchmark("attention_cpu", "--lengths", 128, 512, "--repeats", 1).stdout.splitlines()
    rows = [line.split() for line in lines[1:]]
    assert [row[:2] for row in rows] == [[kind, size] for kind in ("bfloat16", "float32") for size in ("128", "512")]
    assert all(float(figure) > 0 for row in rows for figure in row[2:])


def test_saves(tmp_path: Path) -> None:
    """The ranks are started here; the program does that with torchrun."""
    import checkpoint_stall

    output, run_dir = tmp_path / "stall.json", tmp_path / "run"
    arguments = ("--model", "test", "--stage", 3, "--json", output, "--directory", run_dir)
    benchmark("checkpoint_stall", *arguments, ranks=checkpoint_stall.RANKS)
    seconds = json.loads(output.read_text())
    assert {"stall", "first", "save", "whole", "dcp", "step", "step_while_writing"} <= seconds.keys()
    assert all(value > 0 for values in seconds.values() for value in values)
    assert "whole" in checkpoint_stall.table({"ZeRO-3, now": seconds})


def test_learning_rates_over_widths(data_dir: Path, tmp_path: Path) -> None:
    runs, output, picture = (tmp_path / name for name in ("runs.jsonl", "mup.json", "mup.png"))
    arguments = ("--widths", 32, 64, "--base", 32, "--exponents", -8, -7, -6, "--steps", 2)
    benchmark("mup_transfer", data_dir, "--runs", runs, *arguments, "--json", output, "--picture", picture)
    rows = json.loads(output.read_text())["rows"]
    assert [(row["mup"], row["width"]) for row in rows] == [(False, 32), (False, 64), (True, 32), (True, 64)]
    assert rows[0]["losses"] == rows[2]["losses"], "at its base muP is the standard model"
    assert rows[1]["losses"] != rows[3]["losses"]
    assert len(runs.read_text().splitlines()) == 9
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_order_of_data(tmp_path: Path) -> None:
    output = tmp_path / "order.json"
    benchmark("data_order", "--rounds", 1, "--shards", 2, "--shard-tokens", 200_000, "--json", output)
    figures = json.loads(output.read_text())
    assert len(figures) == 7
    assert all(figure > 0 for figure in figures.values())


def test_preparing_data(tokenizer: Tokenizer, tmp_path: Path) -> None:
    output = tmp_path / "prepare.json"
    benchmark("data_prepare", "--tokenizer", tokenizer.path, "--megabytes", 0.2, "--rounds", 1, "--json", output)
    found = json.loads(output.read_text())
    tokens = {name: runs[0]["tokens"] for name, runs in found["runs"].items()}
    assert len(tokens) == 8
    assert set(tokens.values()) == {tokens["ours, own library"]}, "all contenders make the same tokens"
    rates = found["million_tokens_per_second"]
    assert rates.keys() == tokens.keys()
    # `net` takes off a start that was measured apart, which on a busy machine can be the longer one.
    assert all(rate["wall"] > 0 < rate["per_core"] for rate in rates.values())


@pytest.mark.hosts
@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_bytes_between_hosts(tmp_path: Path) -> None:
    output = tmp_path / "traffic.json"
    benchmark("host_traffic", "--layouts", "zero3_hpz", "--steps", 6, "--json", output)
    [row] = json.loads(output.read_text())["rows"]
    assert row["times_the_weights"] > 1


def test_hooks_of_blocks() -> None:
    lines = benchmark("layer_overhead", "--files", "zero1", "zero3", "--rounds", 1, "--micro-batches", 3).stdout
    found = {line.split()[0]: float(line.split()[1]) for line in lines.splitlines() if "us a block" in line}
    assert list(found) == ["plain", "zero1", "zero3"]
    assert min(found.values()) > 0


@pytest.mark.hosts
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for network namespaces")
def test_seconds_of_the_plan(tmp_path: Path) -> None:
    output = tmp_path / "time.json"
    benchmark("network_plan", "time", "--layouts", "zero1", "--mbit", 50, "--json", output)
    [row] = json.loads(output.read_text())
    assert row["measured"] > 0 < row["planned"]


def test_scaling(tmp_path: Path) -> None:
    output, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    benchmark("scaling_plan", "--gpus", 8, 64, "--json", output, "--picture", picture)
    rows = json.loads(output.read_text())
    assert {(row["gpus"], row["gbit"]) for row in rows} == {(gpus, gbit) for gpus in (8, 64) for gbit in (25, 100, 400)}
    assert all(0 < row["efficiency"] <= 1 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_swiglu() -> None:
    sizes = ("--hidden-size", 64, "--intermediate-size", 128, "--tokens", 32, "--rounds", 1)
    rows = [line.split() for line in benchmark("swiglu", *sizes).stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["eager", "compiled"], "Liger and xFormers want a GPU"
    assert all(float(figure.replace(",", "")) > 0 for row in rows for figure in row[1:])


def test_peers(tmp_path: Path) -> None:
    """One contender, to the table; the others below."""
    output = tmp_path / "peers.json"
    benchmark("training_peers", "--size", "tiny", "--rounds", 1, "--only", PLAIN, "--json", output)
    found = json.loads(output.read_text())
    assert list(found["results"]) == [PLAIN]
    assert found["results"][PLAIN]["rates"][0] > 0


LITGPT = "plain loop, litgpt's model, compiled"


def test_a_contender_that_is_not_installed_is_said_at_the_start(tmp_path: Path) -> None:
    """litgpt in a form that does not import; the other one is measured."""
    (tmp_path / "litgpt.py").write_text("raise ImportError('no such thing')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    output = tmp_path / "peers.json"
    arguments = ["--size", "tiny", "--rounds", 1, "--only", LITGPT, PLAIN, "--json", output]
    finished = benchmark("training_peers", *arguments, PYTHONPATH=path)
    assert f"{LITGPT}: skipped, litgpt is not installed" in finished.stderr
    assert list(json.loads(output.read_text())["results"]) == [PLAIN]


def test_a_contender_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import training_peers

    monkeypatch.setattr(training_peers, "Contender", OneThatMayFail)
    results = training_peers.measure(["cold", "well", "later"], "tiny", 2)
    assert list(results) == ["well"]
    assert len(results["well"].rates) == 2
    assert "cold ended with code 1; skipped" in capsys.readouterr().out


class OneThatMayFail:
    """In the place of processes: `cold` never gets warm, `later` ends in its second round."""

    size = SIZES["tiny"]

    def __init__(self, name: str, size_name: str) -> None:
        self.name, self.rounds = name, 0

    def wait_until_warm(self) -> None:
        if self.name == "cold":
            raise RuntimeError("cold ended with code 1")

    def run(self, steps: int) -> tuple[float, int]:
        self.rounds += 1
        if self.name == "later" and self.rounds == 2:
            raise RuntimeError("later ended with code 1")
        return 1.0, 1

    def end(self) -> None:
        pass


def train_one_step(name: str) -> None:
    """Of a contender, on one rank."""
    CONTENDERS[name].build(SIZES["tiny"])()
    print(f"{name} has made a step", flush=True)
    os._exit(0)  # gloo's threads can abort at the interpreter's end


VARIANTS = {"ours, ZeRO-1", "ours, ZeRO-3, sdpa", "ours, ZeRO-3, weights released"}  # of one that is tried


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.all_faults] if name in VARIANTS else [])
        for name in sorted(CONTENDERS.keys() - {PLAIN})
    ],
)
def test_contenders(name: str) -> None:
    if "litgpt" in name:
        pytest.importorskip("litgpt")
    finished = on_ranks(train_one_step, name, ranks=1, CUDA_VISIBLE_DEVICES="", TORCH_COMPILE_DISABLE="1")
    assert f"{name} has made a step" in finished.stdout, finished.stderr
