"""Commands of the toolkit as rank 0 of one runs them on a GPU: on the device of `fake_cuda`, in a process of their own.

That process imports PyTorch and DeepSpeed once and runs one command after the other.
"""

import contextlib
import gc
import json
import os
import runpy
import subprocess
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_cuda import MEMORY_BYTES, FakeCuda, Wait

COMMANDS_OF_A_PROCESS = 30  # DeepSpeed holds on to every engine, and so to its memory
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    output: str
    waits: Counter  # of the host for the GPU: `fake_cuda.Wait`
    pinned_bytes: int  # of host memory that was pinned by address


class OneGpu:
    """The process. A command that ends it by itself is followed by a new one."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "one_gpu.log"
        self._process: subprocess.Popen | None = None
        self._commands = 0

    def script(
        self, name: str, *arguments: object, dry_run: bool = True, memory_bytes: int | None = None, **environment: str
    ) -> Ran:
        """`scripts/<name>.py`, which a launcher would start on a rank; with or without the dry-run batch."""
        request = {"script": name, "arguments": list(map(str, arguments)), "environment": environment}
        return self._run(request | {"dry_run": dry_run, "memory_bytes": memory_bytes})

    def pretrain(self, recipe: Path, config: Path, data: Path, run_dir: Path, *more: str, **others: Any) -> Ran:
        """`scripts/pretrain.py`, not compiled, and with PyTorch's attention unless another is asked for."""
        attention = [] if "--attention" in more else ["--attention", "sdpa"]
        return self.script(
            "pretrain", "--recipe", recipe, "--deepspeed-config", config, "--data", data, "--run-dir", run_dir,
            "--compile", "off", *attention, *more, **others,
        )  # fmt: skip

    def command(self, *arguments: object) -> Ran:
        """`tinyllama-ds ...`, of the commands that start no ranks."""
        request = {"script": None, "arguments": list(map(str, arguments)), "environment": {}}
        return self._run(request | {"dry_run": True, "memory_bytes": None})

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _run(self, request: dict[str, Any]) -> Ran:
        self._commands += 1
        if self._commands % COMMANDS_OF_A_PROCESS == 0:
            self.end()
        if self._process is None:
            environment = os.environ | {"DS_ACCELERATOR": "cuda", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    [sys.executable, __file__], cwd=ROOT, env=environment, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        before = self._log.stat().st_size
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        output = self._log.read_bytes()[before:].decode()
        if not line:
            code = self._process.wait()
            self.end()
            return Ran(code, output, Counter(), 0)
        answer = json.loads(line)
        waits = Counter({Wait(*wait): count for wait, count in answer["waits"]})
        return Ran(answer["code"], output, waits, answer["pinned_bytes"])


class _Left(Exception):
    """In place of the end of the process."""

    def __init__(self, code: int) -> None:
        self.code = code


def _leave(code: int) -> None:
    raise _Left(code)


def _serve() -> None:
    """Answer every line of standard input; what commands print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    from tinyllama_ds.training import engine, measure, metrics, pretrain

    engine.leave = _leave  # type: ignore[assignment]
    torch.distributed.destroy_process_group = lambda *_: None  # DeepSpeed keeps its groups for good
    dry_run_batch = pretrain.dry_run_batch
    # A fake device has no speed, and nothing for PyTorch's profiler.
    metrics.measured_peak = measure.measured_peak = lambda *_: 1e12  # type: ignore[assignment]
    measure._profile_step = lambda *_: {"kinds": {"collectives": {"seconds": 0.0}}}  # type: ignore[assignment]
    with FakeCuda() as gpu:
        for line in sys.stdin:
            gpu.waits.clear()
            request = json.loads(line)
            gpu.memory_bytes = request["memory_bytes"] or MEMORY_BYTES
            pretrain.dry_run_batch = dry_run_batch if request["dry_run"] else lambda *_: "left out"  # type: ignore
            code = _run_here(request)
            waits = list(Counter(map(tuple, gpu.waits)).items())
            answer = {"code": code, "waits": waits, "pinned_bytes": sum(gpu.registered.values())}
            gpu.registered.clear()
            gc.enable()  # training takes it over
            gc.unfreeze()
            gc.collect()
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _run_here(request: dict[str, Any]) -> int:
    from tinyllama_ds.cli import main
    from tinyllama_ds.training import faults

    faults._ordered.cache_clear()
    before, outputs = dict(os.environ), [os.dup(number) for number in (1, 2)]
    os.environ.update(request["environment"])
    try:
        if request["script"] is None:
            return main(request["arguments"])
        script = ROOT / "scripts" / f"{request['script']}.py"
        sys.argv = [str(script), *request["arguments"]]
        runpy.run_path(str(script), run_name="__main__")
    except _Left as left:
        return left.code
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        for number, output in zip((1, 2), outputs, strict=True):
            os.dup2(output, number)  # a run sends them through a program that also writes its log
            os.close(output)
        os.environ.clear()
        os.environ.update(before)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        _serve()
