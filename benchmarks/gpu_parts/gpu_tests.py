"""`pytest --gpu`: what passed, failed and was skipped, counted while it runs.

Rehearsed without a GPU, all of them are collected, and one that a CPU can do is run with its marker taken away.
"""

import re
import subprocess
import sys
from collections import Counter

from gpu_parts.common import ROOT, Part, part_of_arguments

WORKERS = 8
ONE_FOR_CPUS = "tests/integration/test_gpu.py::test_curve_equals_plain_pytorch_on_the_cpu[3-eager]"
_RESULT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_TEST = re.compile(r"tests/\S+")
_END = re.compile(r"=+ (FAILURES|ERRORS|warnings summary|short test summary info) =+")  # what follows repeats it
_SHOWN = 5  # failures named in the table
_COLLECTED = re.compile(r"(\d+)(?:/\d+)? tests? collected")


def result_of(line: str) -> tuple[str, str] | None:
    """(PASSED and so on, test) of a line of `pytest -v`, with workers or without; None for any other line."""
    result, test = _RESULT.search(line), _TEST.search(line)
    return (result[1], test[0]) if result and test else None


def run_tests(part: Part, *arguments: str) -> int:
    """Run pytest; every result is stored as soon as it is known."""
    counts: Counter[str] = Counter()
    failed: list[str] = []
    command = [sys.executable, "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if _END.match(line):
                break
            found = result_of(line)
            if found is not None:
                counts[found[0].lower()] += 1
                if found[0] in ("FAILED", "ERROR"):
                    failed.append(found[1])
                said = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
                part.figures.put("counts", dict(counts), said)
        print(process.stdout.read(), flush=True)
    part.figures.put("failed", failed)
    for number, test in enumerate(failed[:_SHOWN]):
        part.figures.put(f"failed.{number}", test, f"FAIL {test}"[:130])
    if len(failed) > _SHOWN:
        part.figures.put("failed.more", len(failed) - _SHOWN, f"FAIL {len(failed) - _SHOWN} more")
    return process.returncode


def collect(part: Part) -> None:
    """How many there are, without running any."""
    command = [sys.executable, "-m", "pytest", "--gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(finished.stdout[-2000:], finished.stderr, flush=True)
    found = _COLLECTED.search(finished.stdout)
    number = int(found[1]) if found else 0
    text = f"{number} tests for a GPU collected; rehearsed on the CPU: {ONE_FOR_CPUS.split('::')[1]}"
    part.figures.check("collected", number > 0 and finished.returncode == 0, text)


def main(part: Part) -> int:
    """All on a GPU; on a CPU one of them."""
    if part.rehearse:
        collect(part)
        code = run_tests(part, "-p", "gpu_parts.without_gpu", ONE_FOR_CPUS)
    else:
        code = run_tests(part, "--gpu", "-n", str(WORKERS))
    return part.figures.end() or code


if __name__ == "__main__":
    sys.exit(main(part_of_arguments("tests")))
