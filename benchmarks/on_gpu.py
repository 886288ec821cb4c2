"""Tests and measures everything on one GPU within a given time; ON_GPU.md says how to call it and how to read it.

Parts run one after the other in order of value, each a process with its own share of the time. They store their figures
as they go (`DIR/parts/PART.json`, its output in `PART.log`), so a part that is cut or crashes keeps what it had and the
others go on. At the end, or at a SIGTERM, come one table and `DIR/on_gpu.json`.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpu_parts.figures import read_figures
from gpu_parts.processes import Interrupted, adopt_orphans, kill_children, raise_on_signals, run
from gpu_parts.shares import PARTS, Share, limit
from tinyllama_ds.commands.arguments import SECONDS, Parser, output_folder

ROOT = Path(__file__).parents[1]
TABLE_LINES = 60  # a remote call may bring back the end of the output only
RESERVE = 3.0  # seconds of the budget for the table, and for processes to die
EXIT_CONFIG = 78  # as the toolkit's own


@dataclass
class Outcome:
    """A part in `on_gpu.json`."""

    status: str = "skipped: not reached"
    seconds: float = 0.0
    limit: float = 0.0
    figures: dict = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def is_failed(self) -> bool:
        return self.status.startswith("failed")


class OnGpu:
    """One call of the script."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._began = time.monotonic()
        self._options = options
        self._parts = options.out / "parts"
        self._work = work
        self._environment = environment(options.rehearse, work, options.flash_attn)
        self._without_flash_attn = environment(options.rehearse, work, None)
        self._machine: dict = {}
        self._chosen = [part for part in PARTS if not options.parts or part.name in options.parts]
        self.outcomes = {part.name: Outcome() for part in self._chosen}

    def reject_without_gpu(self) -> str | None:
        """Look at the machine; returns what is wrong with it."""
        command = [sys.executable, "-m", "gpu_parts.machine", "--describe"]
        seen = subprocess.run(command, capture_output=True, text=True, env=self._environment, check=False)
        if seen.returncode:
            return f"a package is missing: {seen.stderr.strip().splitlines()[-1]}"
        self._machine = json.loads(seen.stdout.splitlines()[-1])
        if self._machine["device"] == "cpu" and not self._options.rehearse:
            return "PyTorch sees no GPU; expected one, or --rehearse"
        return None

    def run_parts(self) -> None:
        """One after the other, as long as there is time."""
        for number, part in enumerate(self._chosen):
            outcome = self.outcomes[part.name]
            left = self._options.budget - RESERVE - (time.monotonic() - self._began)
            outcome.limit = limit([self._wanted(later) for later in self._chosen[number:]], left)
            if outcome.limit < part.least:
                outcome.status = (
                    f"skipped: {max(0.0, outcome.limit):.0f} s were left for it, of {part.least:.0f} at least"
                )
            else:
                self._run(part, outcome)
            self.write()

    def _wanted(self, part: Share) -> float:
        return part.rehearsed if self._options.rehearse else part.on_gpu

    def _run(self, part: Share, outcome: Outcome) -> None:
        print(f"\n== {part.name}, {outcome.limit:.0f} s at most", flush=True)
        log = self._parts / f"{part.name}.log"
        command = [sys.executable, "-m", *part.module.split(), "--out", str(self._parts), "--work", str(self._work)]
        command += ["--rehearse"] if self._options.rehearse else []
        told: dict[str, str] = {}

        def look() -> None:
            for name, line in read_figures(self._parts / f"{part.name}.json")["lines"].items():
                if told.get(name) != line:
                    told[name] = line
                    print(line, flush=True)

        started = time.monotonic()
        outcome.status = "cut by a signal"
        try:
            variables = self._environment if part.has_head_size_64 else self._without_flash_attn
            end = run(command, variables, log, outcome.limit, look)
            outcome.status = status_of(end.code, end.seconds, log)
            look()
        finally:
            outcome.seconds = time.monotonic() - started
            stored = read_figures(self._parts / f"{part.name}.json")
            outcome.figures, outcome.lines = stored["figures"], list(stored["lines"].values())
        print(f"-- {part.name}: {outcome.status}, {outcome.seconds:.0f} s", flush=True)

    def write(self) -> None:
        """`on_gpu.json`, complete at any time."""
        content = {
            "command": shlex.join(sys.argv),
            "machine": self._machine,
            "rehearsed": self._options.rehearse,
            "budget_seconds": self._options.budget,
            "seconds": round(time.monotonic() - self._began, 1),
            "parts": {name: asdict(outcome) for name, outcome in self.outcomes.items()},
        }
        partial = self._options.out / "on_gpu.json.partial"
        partial.write_text(json.dumps(content, indent=1) + "\n")
        partial.replace(self._options.out / "on_gpu.json")

    def table(self) -> str:
        """All there is, in `TABLE_LINES` lines."""
        known = ("gpu", "driver", "cuda", "python", "torch", "triton", "deepspeed", "transformers", "flash-attn")
        machine = ", ".join(f"{key} {self._machine[key]}" for key in known if key in self._machine)
        kind = "rehearsed on a CPU with a tiny model" if self._options.rehearse else "on a GPU"
        took = time.monotonic() - self._began
        head = [f"{kind}, {took:.0f} s of {self._options.budget:.0f}; {self._options.out / 'on_gpu.json'}", machine]
        return "\n".join([*head, *shorten(self.outcomes, TABLE_LINES - len(head))])


def environment(rehearse: bool, work: Path, flash_attn: Path | None) -> dict[str, str]:
    """That of the parts: our modules first, one place for what is compiled, no GPU where a CPU is to do it."""
    given = [str(flash_attn.absolute())] if flash_attn else []
    paths = [str(ROOT), str(ROOT / "benchmarks"), *given, *filter(None, [os.environ.get("PYTHONPATH")])]
    found = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    found.setdefault("TORCHINDUCTOR_CACHE_DIR", str(work / "inductor"))
    found.setdefault("TRITON_CACHE_DIR", str(work / "triton"))
    on_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    on_cpu["TORCH_COMPILE_DISABLE"] = "1"  # PyTorch's own switch: on a CPU compiling takes longer than all the rest
    return found | (on_cpu if rehearse else {})


def status_of(code: int | None, seconds: float, log: Path) -> str:
    """In words, with the first error of a failed part."""
    if code is None:
        return f"cut at {seconds:.0f} s"
    return "done" if code == 0 else f"failed: {error_line(log.read_text(errors='replace'), code)}"


def error_line(text: str, code: int) -> str:
    """The line that names an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("Error: ")] or [line for line in lines if "Error" in line][-1:]
    return (telling or lines[-1:] or [f"exit code {code}"])[0].removeprefix("Error: ").removeprefix("FAIL ")[:100]


def shorten(outcomes: dict[str, Outcome], most: int) -> Iterator[str]:
    """A heading and lines for every part, the longest parts cut until all fit."""
    shown = {name: len(outcome.lines) for name, outcome in outcomes.items()}
    # A part that is cut has one line more to mark the cut.
    while sum(1 + count + (count < len(outcomes[name].lines)) for name, count in shown.items()) > most:
        shown[max(shown, key=lambda name: shown[name])] -= 1
    for name, outcome in outcomes.items():
        yield f"== {name}: {outcome.status}" + (f" ({outcome.seconds:.0f} s)" if outcome.seconds else "")
        yield from (f"   {line}" for line in outcome.lines[: shown[name]])
        if shown[name] < len(outcome.lines):
            yield f"   and {len(outcome.lines) - shown[name]} lines more in on_gpu.json"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=SECONDS, default=540, metavar="SECONDS", help="for all (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="on this machine's CPU, with a tiny model")
    parser.add_argument("--out", type=output_folder, default=Path("on_gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--flash-attn", type=Path, metavar="SITE", help="directory with a flash_attn that knows head size 64 alone"
    )
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only these of {', '.join(names)}")
    options = parser.parse_args()
    unknown = set(options.parts) - set(names)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; expected some of {', '.join(names)}")
    return options


def main() -> int:
    """Run the chosen parts and print the table; returns the exit code: 1 where a part failed."""
    options = parse()
    (options.out / "parts").mkdir(parents=True, exist_ok=True)
    for stale in (options.out / "parts").iterdir():
        if stale.suffix in (".json", ".log", ".partial"):
            stale.unlink()
    options.out = options.out.absolute()
    adopt_orphans()
    raise_on_signals()
    with tempfile.TemporaryDirectory(prefix="on_gpu-", ignore_cleanup_errors=True) as work:
        call, code = OnGpu(options, Path(work)), 0
        try:
            problem = call.reject_without_gpu()
            if problem is not None:
                print(f"on_gpu: {problem}", file=sys.stderr)
                return EXIT_CONFIG
            call.run_parts()
        except Interrupted as signal:
            print(f"\n{signal}", flush=True)
            code = 130
        finally:
            kill_children()
            call.write()
        table = call.table()
        (options.out / "on_gpu.txt").write_text(f"{table}\n")
        print(f"\n{table}", flush=True)
    return code or int(any(outcome.is_failed for outcome in call.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
