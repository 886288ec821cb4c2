"""Which rank is slow, and in which phase."""

import json
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from forked import on_ranks
from launching import write_deepspeed_config

from tinyllama_ds.config.run_plan import Step
from tinyllama_ds.health.stragglers import SLOW, slowdown_ratios
from tinyllama_ds.train.batches import Batch

DELAY = 0.5  # seconds, far beyond what the little work takes on a busy machine
SLOW_RANK, RANKS, LENGTH = 1, 2, 8


def test_a_rank_is_compared_with_the_median_of_the_others() -> None:
    assert slowdown_ratios([1.0, 1.0, 3.0, 1.0]) == pytest.approx([1.0, 1.0, 3.0, 1.0])
    assert slowdown_ratios([1.0, 2.0]) == pytest.approx([0.5, 2.0]), "of two ranks, with the other one"


def train_beside_a_slow_rank(config: str, folder: Path) -> None:
    """Rank 1 sleeps in one phase after another. Writes the seconds of each and the reports on ranks. Collective."""
    from tinyllama_ds.distributed.world import read_world
    from tinyllama_ds.health.stragglers import StragglerDetector
    from tinyllama_ds.model.config import model_config
    from tinyllama_ds.model.llama import build_model
    from tinyllama_ds.train.engine import start_process_group, wrap
    from tinyllama_ds.train.phase_clock import PhaseClock
    from tinyllama_ds.train.step import train_step

    world = read_world()
    start_process_group(world)
    model = model_config("test")
    engine = wrap(build_model(model, "sdpa", seed=1), json.loads(config), 1.0)
    block = engine.module.model.layers[0]
    slow_phase = ""

    def sleep_in(phase: str) -> None:
        if (world.rank, phase) == (SLOW_RANK, slow_phase):
            time.sleep(DELAY)

    def batches() -> Iterator[Batch]:
        while True:
            sleep_in("data")
            yield Batch(torch.ones(1, LENGTH + 1, dtype=torch.int64))

    block.mlp.register_forward_pre_hook(lambda *_: sleep_in("forward"))
    block.register_full_backward_pre_hook(lambda *_: sleep_in("backward"))
    samples, numbers, clock = batches(), count(), PhaseClock(world.device)

    def step() -> dict[str, float]:
        train_step(engine, Step(next(numbers), "only", 0, RANKS, 0, RANKS * LENGTH), samples, 1, world, clock)
        return clock.read()

    step()  # the optimizer's state, and what ZeRO-3 records
    rows = []
    for slow_phase in ("data", "forward", "backward"):
        stragglers = StragglerDetector(engine.module.model.layers, world)
        for _ in range(3):
            seconds = step()
            figures, sentences = stragglers.compare(seconds["data"])
            told = {"rank": world.rank, "slow": slow_phase, "seconds": seconds}
            rows.append(told | {"ranks": figures, "said": sentences})
    (folder / f"{world.rank}.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("pace")
    config = json.loads(write_deepspeed_config(folder / "ds.json", 3, 1).read_text())
    keep = {key: config[key] for key in ("train_micro_batch_size_per_gpu", "optimizer", "zero_optimization")}
    finished = on_ranks(train_beside_a_slow_rank, json.dumps(keep), folder, ranks=RANKS)
    assert finished.returncode == 0, finished.stderr
    return [row for rank in range(RANKS) for row in json.loads((folder / f"{rank}.json").read_text())]


@pytest.mark.parametrize("phase", ["data", "forward", "backward"])
def test_a_phase_takes_as_long_as_the_rank_was_in_it(phase: str, rows: list[dict]) -> None:
    """The delay of a rank in one phase is not counted in its other phases."""
    mine = [row["seconds"] for row in rows if (row["rank"], row["slow"]) == (SLOW_RANK, phase)]
    assert len(mine) == 3
    for seconds in mine:
        assert seconds[phase] >= DELAY
        assert max(value for name, value in seconds.items() if name != phase) < DELAY


@pytest.mark.parametrize("phase", ["data", "forward"])
def test_a_slow_rank_is_named_and_those_that_wait_for_it_are_not(phase: str, rows: list[dict]) -> None:
    """Under ZeRO-3 the other rank waits for the gather of the next block."""
    for rank in range(RANKS):
        told = [row for row in rows if (row["rank"], row["slow"]) == (rank, phase)]
        for row in told:
            figures = row["ranks"]
            assert figures["Ranks/Slowest"] == SLOW_RANK
            assert figures["Ranks/Max"] >= DELAY
            assert figures["Ranks/Max"] > SLOW * figures["Ranks/Min"]
        assert [len(row["said"]) for row in told] == [0, 0, 1], "after three logged steps in a row"
        assert told[-1]["said"][0].startswith(f"straggler: rank {SLOW_RANK} (")


def test_waiting_in_a_collective_is_not_measured(rows: list[dict]) -> None:
    """A delay in the backward is not measured, on either rank."""
    assert max(row["ranks"]["Ranks/Max"] for row in rows if row["slow"] == "backward") < DELAY
