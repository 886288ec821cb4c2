"""The dry-run batch: every part of training once before step 1, so that errors show in the first minute.

One micro batch goes forward and backward, one is validated, the probe is taken, one prompt is sampled and one scored if
the recipe does so, and the state is copied to host memory as for a save. Weights and optimizer are
only read, and the gradient is dropped, so training is the same bit for bit as without (OLMo-core does the same).
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from tinyllama_ds.data.order import rank_positions
from tinyllama_ds.distributed.collectives import sum_over_ranks
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.errors import ConfigError, NumericsError, OutOfMemory
from tinyllama_ds.evaluation.validation import sample_losses
from tinyllama_ds.hardware.gpus import GIB
from tinyllama_ds.health.probe import take_probe
from tinyllama_ds.run.resolve import Run
from tinyllama_ds.train.batches import read_batch
from tinyllama_ds.train.callbacks.evaluation import continue_prompts
from tinyllama_ds.train.compile import summarize_exception
from tinyllama_ds.train.gradients import drop_gradients
from tinyllama_ds.train.scoring import score_one_prompt
from tinyllama_ds.train.step import forward
from tinyllama_ds.train.trainer import Trainer
from tinyllama_ds.train.utilization import memory_bytes, peak_memory

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class MemoryEstimate:
    """The estimate of `plan` for the memory of one GPU."""

    bytes: int
    alternatives: str  # what needs less, in words

    def __str__(self) -> str:
        return f"plan estimates {self.bytes / GIB:.1f} GiB"


# (run, ranks, whether blocks are compiled, bytes that the GPU has) to an estimate
EstimateMemory = Callable[[Run, int, bool, int], MemoryEstimate]


class DryRunFailed(RuntimeError):
    """In which part, and why: a crash, which may pass at the next start."""


def dry_run_batch(trainer: Trainer, estimate_memory: EstimateMemory) -> str:
    """Collective. Returns a line for the log: seconds, and peak memory of a GPU, else of this process.

    Raises `OutOfMemory` where memory does not suffice, `NumericsError` where the probe is not finite,
    and `DryRunFailed` for any other failure; each names the part.
    """
    started, device, estimate = perf_counter(), trainer.world.device, None
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        estimate = estimate_memory(trainer.run, trainer.world.size, trainer.engine.module.is_compiled, total)
    for name, part in _parts(trainer):
        with _named(name, trainer.run, trainer.world, estimate):
            part()
    compared = f" ({estimate})" if estimate else " of host memory"
    seconds, peak = perf_counter() - started, memory_bytes(device) / GIB
    return f"dry-run batch passed in {seconds:.1f} s: peak {peak:.2f} GiB{compared}"


def _parts(trainer: Trainer) -> Iterator[tuple[str, Callable[[], object]]]:
    """Name and action of each part, in the order in which training executes them."""
    engine, run, world = trainer.engine, trainer.run, trainer.world
    step = run.plan.step(trainer.start.step)
    share = rank_positions(step.first_position, step.batch, world.rank, world.size)
    batch = read_batch(run, np.array(share[: run.micro_batch]), world.device)
    losses: list[torch.Tensor] = []
    engine.set_gradient_accumulation_boundary(True)
    yield "forward", lambda: losses.append(forward(engine, batch.model_inputs(world.device))[0])
    yield "backward", lambda: _backward(engine, losses.pop())
    if run.evaluation.validation:
        one_batch = replace(run.evaluation.validation[0], samples=run.micro_batch * world.size)
        yield "validation", lambda: sample_losses([one_batch], engine, sum_over_ranks, world, run.micro_batch)
    yield "probe", lambda: take_probe(engine, run, world)
    if run.evaluation.prompts:
        yield "sampling", lambda: continue_prompts(trainer, new_tokens=1)
    if run.evaluation.tasks is not None:
        yield "scoring", lambda: score_one_prompt(engine, run, world)
    yield "snapshot", lambda: trainer.saver.copy_state(engine, trainer.start)


def _backward(engine: "DeepSpeedEngine", loss: torch.Tensor) -> None:
    """As in the last micro-batch of a step, with the reduction of gradients, which are dropped then."""
    engine.backward(loss, scale_wrt_gas=False)
    drop_gradients(engine)


@contextmanager
def _named(part: str, run: Run, world: DistributedInfo, estimate: MemoryEstimate | None) -> Iterator[None]:
    """Errors inside name the part; waits for the device, which reports errors late."""
    try:
        yield
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(_out_of_memory(part, run, world, estimate)) from error
    except (NumericsError, ConfigError):
        raise
    except Exception as error:
        raise DryRunFailed(f"the dry-run batch failed in its {part}: {summarize_exception(error)}") from error


def _out_of_memory(part: str, run: Run, world: DistributedInfo, estimate: MemoryEstimate | None) -> str:
    beside = f"; {estimate}, and would use {estimate.alternatives}" if estimate else ""
    return (
        f"rank {world.rank} on {socket.gethostname()} ran out of memory in the {part} of the dry-run batch, with micro"
        f" batch {run.micro_batch} and {peak_memory(world.device)} at the peak{beside}"
    )
