"""`tinyllama-ds bench`: real measurements of a small grid, a table, JSON, a picture and advice."""

import json
from pathlib import Path

from launching import tinyllama_ds, write_deepspeed_config

from tinyllama_ds.benchmark.grid import advice, cause, grid, table


def test_a_grid_is_measured_and_a_failing_setting_is_a_row(tmp_path: Path) -> None:
    config = write_deepspeed_config(tmp_path / "zero3.json", 3, micro_batch=1)
    finished = tinyllama_ds(
        "bench", "--model", "test", "--sequence-length", 64, "--deepspeed-config", config, "--micro-batch", 2,
        "--attention", "auto", "nonsense", "--compile", "off", "--steps", 2, "--output", tmp_path / "out", "--json",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    good, bad = json.loads(finished.stdout)["rows"]
    assert good["attention"] == "blocked"
    assert good["ranks"] == 2
    tokens = 2 * 4 * 2 * 64  # micro-batch, accumulation, ranks, sequence length
    assert abs(good["tokens_per_second"] * good["seconds"] / tokens - 1) < 1e-9
    phases = [good[f"seconds_{name}"] for name in ("data", "forward", "backward", "step")]
    assert all(seconds > 0 for seconds in phases)
    assert sum(phases) <= good["seconds"] * 1.05
    assert good["seconds_communication"] > 0
    assert 0 < good["measured_mfu"] < 1
    assert "attention backend 'nonsense' is unknown" in bad["error"]
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == [good, bad]
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def row(rate: float, memory: float, micro_batch: int) -> dict:
    setting = grid([Path("ds_configs/zero3.json")], [micro_batch], ["sdpa"], [True])[0]
    return setting | {"tokens_per_second": rate, "peak_gib": memory, "mfu": 0.5, "measured_mfu": 0.5}


def test_the_recommendation_is_the_fastest_unless_as_fast_with_less_memory() -> None:
    assert "recommended: zero3, micro-batch 8, sdpa, compiled" in advice([row(100, 10, 8), row(90, 1, 4)])
    assert "recommended: zero3, micro-batch 4" in advice([row(100, 10, 8), row(99, 5, 4)])
    assert advice([{"error": "out of memory"}]) == "no setting ran"


def test_table_has_a_line_per_setting() -> None:
    lines = table([row(100, 10, 8), row(1, 1, 1) | {"error": "out of memory"}]).splitlines()
    assert len(lines) == 3
    assert lines[2].endswith("out of memory")


def test_the_cause_is_named_and_not_its_consequences_on_other_ranks() -> None:
    reset = "torch.distributed.DistNetworkError: Connection reset by peer\n"
    assert (
        cause("tinyllama-ds: attention backend 'x' is unknown\n" + reset)
        == "tinyllama-ds: attention backend 'x' is unknown"
    )
    assert cause("RuntimeError: no kernel\n" + reset) == "RuntimeError: no kernel"
    assert cause(reset) == reset.strip()
