"""Commands of the toolkit as rank 0 of one runs them on a GPU: on the device of `fake_cuda`, each in a fork."""

import contextlib
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from fake_cuda import MEMORY_BYTES, FakeCuda, Wait
from forked import on_ranks, run_command, run_module


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    output: str
    waits: Counter  # of the host for the GPU: `fake_cuda.Wait`
    pinned_bytes: int  # of host memory that was pinned by address


def script(
    name: str, *arguments: object, dry_run: bool = True, memory_bytes: int = MEMORY_BYTES, **environment: str
) -> Ran:
    """`tinyllama_ds.rank.<name>`, which a launcher would start; with or without the dry-run batch."""
    return _run(run_module, (f"tinyllama_ds.rank.{name}", *arguments), dry_run, memory_bytes, environment)


def pretrain(recipe: Path, config: Path, data: Path, run_dir: Path, *more: str, **others: Any) -> Ran:
    """`tinyllama_ds.rank.pretrain`, not compiled, and with PyTorch's attention unless another is asked for."""
    attention = [] if "--attention" in more else ["--attention", "sdpa"]
    return script(
        "pretrain", "--recipe", recipe, "--deepspeed-config", config, "--data", data, "--run-dir", run_dir,
        "--compile", "off", *attention, *more, **others,
    )  # fmt: skip


def command(*arguments: object) -> Ran:
    """`tinyllama-ds ...`, of the commands that start no ranks."""
    return _run(run_command, arguments, True, MEMORY_BYTES, {})


def _run(how: Any, arguments: tuple, dry_run: bool, memory_bytes: int, environment: dict[str, str]) -> Ran:
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder, "seen.json")
        more = environment | {"DS_ACCELERATOR": "cuda"}
        finished = on_ranks(_on_gpu, how, arguments, dry_run, memory_bytes, seen, ranks=1, **more)
        found = json.loads(seen.read_text()) if seen.exists() else {"waits": [], "pinned_bytes": 0}
    waits = Counter({Wait(*wait): count for wait, count in found["waits"]})
    return Ran(finished.returncode, finished.stdout + finished.stderr, waits, found["pinned_bytes"])


class _Left(BaseException):
    """In place of the end of the process."""

    def __init__(self, code: int) -> None:
        self.code = code


def _leave(code: int) -> None:
    raise _Left(code)


def _on_gpu(how: Any, arguments: tuple, dry_run: bool, memory_bytes: int, seen: Path) -> None:
    """In the fork: call `how` with its arguments, write what was seen, and end with the code."""
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    from tinyllama_ds.benchmark import measure
    from tinyllama_ds.train import engine, pretrain, utilization

    # A fake device has no speed, and nothing for PyTorch's profiler.
    kinds = {"kinds": {"collectives": {"seconds": 0.0}}}
    code = 0
    with FakeCuda() as gpu, contextlib.ExitStack() as patches:
        set_accelerator(CUDA_Accelerator())
        gpu.memory_bytes = memory_bytes
        patches.enter_context(mock.patch.object(engine, "hard_exit", _leave))
        patches.enter_context(mock.patch.object(utilization, "measured_peak", return_value=1e12))
        patches.enter_context(mock.patch.object(measure, "_profile_step", return_value=kinds))
        if not dry_run:
            patches.enter_context(mock.patch.object(pretrain, "dry_run_batch", return_value="left out"))
        try:
            how(*arguments)
        except _Left as left:
            code = left.code
        except SystemExit as end:
            code = int(end.code or 0)
        waits = list(Counter(map(tuple, gpu.waits)).items())
    seen.write_text(json.dumps({"waits": waits, "pinned_bytes": sum(gpu.registered.values())}))
    engine.hard_exit(code)
