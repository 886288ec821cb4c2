"""Every guarantee of README's table has a mutation that breaks it, and the program that makes them tells the truth.

Whether the mutations are caught is found by `python tests/mutations.py`, which takes longer than all tests.
"""

import ast
import subprocess
import tomllib
from pathlib import Path

import mutations
import pytest
from mutations import ROOT, TABLE, Mutation, read_mutations, read_promises

PROMISES = read_promises((ROOT / "README.md").read_text())
MUTATIONS = read_mutations(ROOT / TABLE)


def broken_by(promise: str) -> list[Mutation]:
    return [mutation for mutation in MUTATIONS if promise.startswith(mutation.promise)]


@pytest.mark.parametrize("promise", PROMISES)
def test_every_promise_has_a_mutation(promise: str) -> None:
    assert broken_by(promise)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.file}-{mutation.new.strip()}")
def test_a_mutation_breaks_one_line_and_names_a_test_of_its_row(mutation: Mutation, tmp_path: Path) -> None:
    (tests,) = [tests for promise, tests in PROMISES.items() if promise.startswith(mutation.promise)]
    file, _, function = mutation.test.partition("::")
    assert any(Path(file).is_relative_to(named) for named in tests.strip("`").split("`, `")), tests
    assert function in [node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")]
    assert "\n" not in mutation.old.rstrip("\n")
    broken = tmp_path / mutation.file
    broken.parent.mkdir(parents=True)
    broken.write_text((ROOT / mutation.file).read_text())
    mutation.apply(tmp_path)
    (tomllib.loads if broken.suffix == ".toml" else ast.parse)(broken.read_text())


README = f"""{mutations.HEADING}
| promise | test |
| --- | --- |
| Twice is twice | `tests/test_twice.py` |

## Further
"""
PACKAGE = 'def twice(x):\n    return 2 * x\n\n\nWORD = "twice"\n'
TESTS = """
import pytest
from tinyllama_ds import WORD, twice

def test_twice():
    assert twice(2) == 4

def test_word():
    assert WORD

def test_that_fails_anyway():
    assert twice(3) == 7

@pytest.mark.skip
def test_that_is_skipped():
    assert twice(2) == 4
"""
TWICE, WORD = ("return 2 * x", "return 3 * x"), ('WORD = "twice"', 'WORDS = "twice"')
CASES = {  # what is changed, the test, and the verdict
    "caught": (*TWICE, "test_twice", "caught"),
    "passes": (*TWICE, "test_word", "NOT CAUGHT: exit code 0 of pytest, 1 passed"),
    "skipped": (*TWICE, "test_that_is_skipped", "NOT CAUGHT: exit code 0 of pytest, 1 skipped"),
    "error of collection": (*WORD, "test_word", "NOT CAUGHT: exit code 4 of pytest, 1 error"),
    "fails anyway": (
        *TWICE, "test_that_fails_anyway", "NOT CAUGHT: test_that_fails_anyway does not pass without it either"),
}  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    files = {"README.md": README, "tinyllama_ds/__init__.py": PACKAGE, "tests/test_twice.py": TESTS}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    return root


def write_table(checkout: Path, cases: list[str]) -> None:
    lines = []
    for old, new, test, _ in map(CASES.__getitem__, cases):
        lines += ["[[mutation]]", 'promise = "Twice"', 'file = "tinyllama_ds/__init__.py"']
        lines += [f"old = '{old}'", f"new = '{new}'", f'test = "tests/test_twice.py::{test}"']
    (checkout / TABLE).write_text("\n".join(lines))


def test_only_a_test_that_fails_and_passes_without_it_has_caught_a_mutation(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # half of the time of so small a suite
    write_table(checkout, list(CASES))
    assert mutations.main([], checkout) == 1
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[-1] for row in rows] == [verdict for *_, verdict in CASES.values()]
    assert mutations.main(["--only", "test_twice.py::test_twice"], checkout) == 0
    assert "`return 2 * x` → `return 3 * x`" in capsys.readouterr().out
    assert (checkout / "tinyllama_ds/__init__.py").read_text() == PACKAGE
