"""The flags of `scripts/test.sh`: what they choose, and when a skip is a failure."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from tiers import FLAGS, flag_of

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[1]
ROOT = Path(__file__).parents[1]
UNIT = """
import pytest
from launching import write_recipe

def test_unit(tmp_path):
    write_recipe(tmp_path / "recipe.toml", 1, 1)

@pytest.mark.real
def test_real(): pass
@pytest.mark.gpu
def test_gpu(): pass
"""
STARTING = ["import subprocess", "import forked", "from forked import on_ranks", "from launching import pretrain"]
NEEDED = "import pytest\n\n\ndef test_package(): pytest.skip('no such package')\n"
EXPECTED = """
[[skip]]
tests = "test_expected.py*"
says = "no such package"
because = "it cannot be had"
"""


@pytest.fixture
def made(pytester: pytest.Pytester) -> pytest.Pytester:
    """An empty folder of tests with the flags of these."""
    pytester.makeconftest("pytest_plugins = ['tiers', 'skips']")
    Path(pytester.path, "expected.toml").write_text(EXPECTED)
    return pytester


def run(made: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return made.runpytest_inprocess("-p", "no:randomly", "-p", "no:cacheprovider", *arguments)


def collected(made: pytest.Pytester, *flags: str) -> set[str]:
    lines = run(made, "--collect-only", "-q", *flags).outlines
    return {line.partition("::test_")[2] for line in lines if "::" in line}


def test_quick_is_what_starts_no_process(made: pytest.Pytester) -> None:
    made.makepyfile(test_suite=UNIT)
    for number, line in enumerate(STARTING):
        made.makepyfile(**{f"test_{number}": f"{line}\ndef test_{number}(): pass\n"})
    everywhere = {"unit", *map(str, range(len(STARTING)))}
    assert collected(made, "--quick") == {"unit"}
    assert collected(made) == everywhere
    assert collected(made, "--real") == everywhere | {"real"}
    assert collected(made, "--gpu") == {"gpu"}


def test_quick_and_a_flag_that_adds_tests_are_rejected(made: pytest.Pytester) -> None:
    result = run(made, "--quick", "--hosts")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--quick leaves out what --hosts adds*"])


@pytest.mark.parametrize(
    ("file", "text", "code"),
    [
        ("test_expected", NEEDED, 0),
        ("test_expected", NEEDED.replace("no such", "another"), 1),
        ("test_other", NEEDED, 1),
        ("test_other", "import pytest\npytest.importorskip('no_such_package')\n", 1),
        ("test_other", "import pytest\n@pytest.mark.xfail\ndef test_bug(): assert False\n", 0),
    ],
    ids=["expected", "another reason", "another test", "a whole file", "an expected failure"],
)
def test_a_skip_that_nobody_expects_is_a_failure(file: str, text: str, code: int, made: pytest.Pytester) -> None:
    made.makepyfile(**{file: text, "test_passes": "def test_it(): pass"})
    assert run(made).ret == 0
    result = run(made, "--strict-skips", "expected.toml")
    assert result.ret == code
    said = [f"{file}.py*: *", "install what they need, or add them to expected.toml *"]
    result.stdout.fnmatch_lines(said) if code else result.stdout.no_fnmatch_line(said[1])


def test_workers_report_their_skips(made: pytest.Pytester) -> None:
    made.makepyfile(test_other=NEEDED)
    result = run(made, "--strict-skips", "expected.toml", "--numprocesses", "1")
    assert result.ret == 1
    result.stdout.fnmatch_lines("test_other.py::test_package: no such package")


def test_the_hooks_are_the_static_checks() -> None:
    script = (ROOT / "scripts" / "test.sh").read_text()
    checks = script.partition('cd "$root"\n')[2].partition("exec pytest")[0]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"] for hook in repository["hooks"]]
    assert hooks == [f".venv/bin/{line}" for line in checks.splitlines() if not line.startswith("#")]


def test_every_tier_is_documented() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert set(re.findall(r"^\| `(--[\w-]+)`", page, flags=re.M)) == {"--quick", *map(flag_of, FLAGS)}


def test_ci_names_what_an_outage_of_the_mirror_leaves_out(tmp_path: Path) -> None:
    """On a machine with none of the programs, whose apt installs nothing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "sort"):
        (programs / name).symlink_to(Path("/usr/bin", name))
    for name, line in (("id", "echo 0"), ("apt-get", "exit 100")):
        (programs / name).write_text(f"#!/bin/bash\n{line}\n")
        (programs / name).chmod(0o755)
    for name in (".ci/run", "scripts/test.sh"):
        (tmp_path / name).parent.mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "scripts" / "test.sh").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "scripts" / "test.sh").chmod(0o755)
    command = ["/bin/bash", tmp_path / ".ci" / "run", "--hosts"]
    finished = subprocess.run(command, env={"PATH": str(programs)}, capture_output=True, text=True, check=True)
    assert finished.stdout == "--strict-skips tests/expected_skips.toml --hosts\n"
    missing = "chromium iproute2 munge openmpi-bin openssh-client openssh-server pdsh slurm-wlm"
    assert f"these Debian packages are not installed, and could not be: {missing}." in finished.stderr
