"""`--strict-skips`: a test that is skipped fails the call, unless the file expects it.

A skip looks like a pass; where a package could not be installed, whole files are skipped.
"""

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Expected:
    """Tests by a pattern of their names, a part of what they say when they skip, and why CI cannot run them."""

    tests: str
    says: str
    because: str

    def fits(self, name: str, said: str) -> bool:
        return fnmatchcase(name, self.tests) and self.says in said


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips", type=Path, metavar="FILE", help="fail where a test is skipped that is not in FILE"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The workers of xdist report to their controller, which decides."""
    path = config.getoption("--strict-skips")
    if path is not None and not hasattr(config, "workerinput"):
        entries = tomllib.loads(path.read_text())["skip"]
        config.pluginmanager.register(StrictSkips(path, [Expected(**entry) for entry in entries]))


class StrictSkips:
    """Collects what was skipped, and decides at the end."""

    def __init__(self, file: Path, expected: list[Expected]) -> None:
        self._file, self._expected = file, expected
        self._unexpected: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._look_at(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._look_at(report)

    def _look_at(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(expected.fits(report.nodeid, said) for expected in self._expected):
            self._unexpected[report.nodeid] = said.removeprefix("Skipped: ")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._unexpected and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._unexpected:
            return
        terminalreporter.section("skipped, and not expected to be", red=True)
        for name, said in self._unexpected.items():
            terminalreporter.line(f"{name}: {said}")
        terminalreporter.line(f"install what they need, or add them to {self._file} with the reason why CI lacks it")
