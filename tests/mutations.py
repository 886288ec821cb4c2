"""Has each guarantee in README's table a test that fails when it is broken? Break one line at a time, and look.

usage: python tests/mutations.py [--only TEXT] [--jobs N]

Each mutation of `mutations.toml` is made in a copy of this checkout, and the test that it names is run there. It is
caught if that test fails with it, and passes without: an error while tests are collected or set up, a test that is
skipped and one that hangs do not count. Prints a table in Markdown; the exit code is 1 if a mutation is not caught.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import psutil

ROOT = Path(__file__).parents[1]
TABLE = Path("tests", "mutations.toml")
HEADING = "## Guarantees and the tests that verify them\n"
MESSAGE = 160  # characters of why a test has failed
TIMEOUT = 1500  # seconds of one call of pytest; the rehearsal of v1.1 in small is the longest


@dataclass(frozen=True)
class Mutation:
    """One line that breaks a guarantee, and the test that has to fail."""

    promise: str  # what a row of README's table begins with
    file: str
    old: str  # occurs once in the file
    new: str
    test: str  # file::function
    flags: tuple[str, ...] = ()  # of pytest, for a test that is not run by default

    @property
    def test_file(self) -> str:
        return self.test.partition("::")[0]

    def apply(self, tree: Path) -> None:
        """Change the line in a copy of the checkout."""
        path = tree / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{path} has {text.count(self.old)} times {self.old!r}; expected it once")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


@dataclass(frozen=True)
class Ran:
    """What one call of pytest did: its exit code, None where it hung, and the tests by their outcome."""

    code: int | None
    seconds: float
    tests: dict[str, str]  # function[parameters] to "passed", "failure", "error" or "skipped"
    message: str  # of the first that did not pass

    def having(self, outcome: str) -> list[str]:
        return [test for test, its_outcome in self.tests.items() if its_outcome == outcome]

    def __str__(self) -> str:
        if self.code is None:
            return f"hangs for {TIMEOUT} s"
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(self.tests.values()).items()))
        return f"exit code {self.code} of pytest, {counts or 'no test'}"


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation."""

    mutation: Mutation
    seconds: float
    failed: str = ""  # the test that failed with it
    escape: str = ""  # why it is not caught

    @property
    def verdict(self) -> str:
        return f"NOT CAUGHT: {self.escape}" if self.escape else "caught"


def read_mutations(path: Path) -> list[Mutation]:
    """The table of mutations."""
    entries = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    return [Mutation(**entry | {"flags": tuple(entry.get("flags", ()))}) for entry in entries]


def read_promises(readme: str) -> dict[str, str]:
    """The rows of README's table: what is promised, and the cell that names tests."""
    table = readme.split(HEADING)[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return dict(rows[2:])


def copy_checkout(root: Path, tree: Path) -> None:
    """What git knows or would add; no links, through which a test could write into the checkout."""
    listed = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (root / name).is_file() and not (root / name).is_symlink():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)


def check_all(root: Path, mutations: Sequence[Mutation], jobs: int) -> list[Outcome]:
    """Break and look; then look whether what failed passes in a copy that is whole. So many tests at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(partial(break_and_look, root), mutations))
        calls: dict[tuple[str, tuple[str, ...]], set[str]] = defaultdict(set)
        for outcome in outcomes:
            if outcome.failed:
                calls[outcome.mutation.test_file, outcome.mutation.flags].add(outcome.failed)
        passing = set().union(*pool.map(partial(passing_tests, root), calls, calls.values()))
    return [
        outcome if outcome.escape or (outcome.mutation.test_file, outcome.failed) in passing
        else replace(outcome, escape=f"{outcome.failed} does not pass without it either")
        for outcome in outcomes
    ]  # fmt: skip


def break_and_look(root: Path, mutation: Mutation) -> Outcome:
    """Run the test of a mutation up to its first failure."""
    ran = run_in_copy(root, mutation, ["--exitfirst", *mutation.flags, mutation.test])
    failed = ran.having("failure")
    if ran.code == 1 and failed and not ran.having("error"):
        outcome = Outcome(mutation, ran.seconds, failed=failed[0])
    else:
        outcome = Outcome(mutation, ran.seconds, escape=str(ran))
    said = ran.message.partition("\n")[0][:MESSAGE]
    print(f"{outcome.verdict} in {ran.seconds:.0f} s: {mutation.promise} ({mutation.test}): {said}", file=sys.stderr)
    return outcome


def passing_tests(root: Path, call: tuple[str, tuple[str, ...]], tests: Iterable[str]) -> set[tuple[str, str]]:
    """Which tests of a file pass in a copy that is whole."""
    file, flags = call
    ran = run_in_copy(root, None, [*flags, *(f"{file}::{test}" for test in sorted(tests))])
    return {(file, test) for test in ran.having("passed")}


def run_in_copy(root: Path, mutation: Mutation | None, arguments: Sequence[str]) -> Ran:
    """pytest in a copy of the checkout, with a mutation or whole. Nothing that it starts outlives this call."""
    with tempfile.TemporaryDirectory(prefix="tinyllama-ds-mutation-", ignore_cleanup_errors=True) as folder:
        tree, report = Path(folder, "tree"), Path(folder, "report.xml")
        copy_checkout(root, tree)
        if mutation is not None:
            mutation.apply(tree)
        environment = os.environ | {"PYTHONPATH": str(tree)}
        require_import_from(tree, environment)
        command = [sys.executable, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", "-p", "no:randomly"]
        command += [f"--junitxml={report}", f"--basetemp={folder}/tests", *arguments]
        started = time.monotonic()
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill_all_that_import_from(tree)
            process.wait()
        return Ran(code, time.monotonic() - started, *read_report(report))


def require_import_from(tree: Path, environment: dict[str, str]) -> None:
    """The package may be installed from the checkout: what is imported must be the copy."""
    program = "import tinyllama_ds; print(tinyllama_ds.__file__)"
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tree.parent, env=environment, capture_output=True, text=True, check=False
    )
    if finished.returncode == 0 and not Path(finished.stdout.strip()).is_relative_to(tree):
        raise RuntimeError(f"{finished.stdout.strip()} is imported, and not the copy in {tree}")


def kill_all_that_import_from(tree: Path) -> None:
    """A test that fails may leave processes, in sessions and namespaces of their own."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(tree) in process.environ().get("PYTHONPATH", ""):
                process.kill()


def read_report(path: Path) -> tuple[dict[str, str], str]:
    """Outcome of every test in pytest's JUnit file and the first message; nothing where the file was not written."""
    if not path.exists():
        return {}, ""
    cases = list(ElementTree.parse(path).iter("testcase"))
    messages = [case[0].attrib.get("message", "") for case in cases if len(case)]
    return {case.attrib["name"]: case[0].tag if len(case) else "passed" for case in cases}, "".join(messages[:1])


def markdown(outcomes: Iterable[Outcome], promises: Iterable[str]) -> str:
    """The table, in the order of README's."""
    rows = ["| promise | broken by | test | seconds | |", "| --- | --- | --- | --- | --- |"]
    for promise in promises:
        for outcome in outcomes:
            mutation = outcome.mutation
            if promise.startswith(mutation.promise):
                new = f"`{mutation.new.strip()}`" if mutation.new.strip() else "nothing"
                change = f"`{mutation.file}`: `{mutation.old.strip()}` → {new}".replace("|", "\\|")
                test = f"`{mutation.test_file}::{outcome.failed or mutation.test.partition('::')[2]}`"
                rows.append(f"| {promise} | {change} | {test} | {outcome.seconds:.0f} | {outcome.verdict} |")
    return "\n".join(rows)


def main(arguments: Sequence[str], root: Path = ROOT) -> int:
    """Check the mutations of a checkout; 1 where one is not caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="mutations whose promise, file or test has this in it"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="tests at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    chosen = [
        mutation
        for mutation in read_mutations(root / TABLE)
        if any(options.only in text for text in (mutation.promise, mutation.file, mutation.test))
    ]
    outcomes = check_all(root, chosen, options.jobs)
    print(markdown(outcomes, read_promises((root / "README.md").read_text(encoding="utf-8"))))
    return int(not outcomes or any(outcome.escape for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
