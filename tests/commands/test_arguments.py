"""Numbers on command lines have a type and a range, and what is wrong with them is one sentence and exit code 78."""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinyllama_ds.cli import command_parser, main
from tinyllama_ds.commands.arguments import Number, Parser, Size, WholeNumber
from tinyllama_ds.errors import EXIT_CONFIG, ConfigError

ROOT = Path(__file__).parents[2]
PROGRAMS = [*ROOT.glob("tinyllama_ds/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/**/*.py")]


def numbers_of(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from numbers_of(child)
        elif isinstance(action.type, Number | Size | WholeNumber):
            yield parser, action


ADD_ARGUMENT = ("add_argument", "add")  # `add = parser.add_argument` is a habit of the commands
NONSENSE = ["nan", "inf", "-inf", "-7", "1e400", "1" + 30 * "0", 5000 * "9", "seven", "", "0x10", "1,000", "True"]
NUMBERS = [
    pytest.param(parser, action, id=f"{parser.prog.split()[-1]} {action.dest}")
    for parser, action in numbers_of(command_parser())
]


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_number_has_a_range(path: Path) -> None:
    """`type=int` and `type=float` take anything; without a type a number stays text."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ADD_ARGUMENT:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            where = f"{path}:{node.lineno}: {ast.unparse(node.args[0])}"
            assert given.get("type") not in ("int", "float", "complex"), where
            assert "type" in given or not given.get("default", "text").lstrip("-").replace(".", "").isdecimal(), where


def test_every_program_reports_errors_in_one_way() -> None:
    for path in PROGRAMS:
        assert "ArgumentParser(" not in path.read_text().replace("class Parser(argparse.ArgumentParser)", ""), path


@pytest.mark.parametrize(("parser", "action"), NUMBERS)
def test_no_number_takes_nonsense(
    parser: argparse.ArgumentParser, action: argparse.Action, capsys: pytest.CaptureFixture[str]
) -> None:
    name = action.option_strings[0] if action.option_strings else str(action.metavar)
    for text in NONSENSE if action.option_strings else [text for text in NONSENSE if not text.startswith("-")]:
        with pytest.raises(SystemExit) as end:
            parser.parse_args([f"{name}={text}"] if action.option_strings else [text])
        assert end.value.code == EXIT_CONFIG
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"tinyllama-ds: {name}"), line
        assert len(line) < 300


@pytest.mark.parametrize("text", ["1.5", "1e9"])
def test_a_whole_number_is_written_as_one(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number from 1 to 1000000000"):
        WholeNumber()(text)


def test_help_has_the_default_once() -> None:
    parser = Parser(prog="program")
    parser.add_argument("--steps", type=WholeNumber(0), default=0, help="of training")
    parser.add_argument("--ranks", type=WholeNumber(), default=2, help="processes (default: %(default)s on a CPU)")
    parser.add_argument("--quick", action="store_true", help="without the network")
    for _ in range(2):
        text = " ".join(parser.format_help().split())
        assert "of training (default: 0)" in text
        assert text.count("default:") == 2


def test_bounds() -> None:
    assert WholeNumber(0, 3)("3") == 3
    assert Number(most=1.0)("1") == 1.0
    assert Number(most=1.0, least=0)("0") == 0.0
    for wrong, kind in (("4", WholeNumber(0, 3)), ("0", Number(most=1.0)), ("1.01", Number(most=1.0))):
        with pytest.raises(argparse.ArgumentTypeError):
            kind(wrong)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "run", "a\udcffb"], r"'a\udcffb' is not UTF-8; expected text and paths in UTF-8"),
        (["generate"], "the following arguments are required: MODEL, TEXT; see tinyllama-ds generate --help"),
        (["generate", "run", "x", "--top-p", "0"], "--top-p 0: expected a number above 0, 1 at most"),
        (["prepare", "--share", "4/4"], "--share: '4/4' is not of the form RANK/SIZE"),
        (["generate", "run", "x", "two\nlines"], r"unrecognized arguments: two\nlines"),
        (["plan", "--gpu-memory", "1e999GiB"], "--gpu-memory 1e999GiB: expected a size such as 40GiB, in GiB, GB"),
        (
            ["export", "run", "hf", "--max-shard-size", "0GB"],
            "--max-shard-size 0GB: expected a size such as 40GB",
        ),
        (["pretrain", "--master-port", "65535"], "--master-port 65535: expected 65534 or less"),
        (["evaluate", ".", "--tasks", "piqa", "--batch-size", "0"], "--batch-size 0: expected 1 or more"),
        ([], "the following arguments are required: command"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == EXIT_CONFIG
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tinyllama-ds: {sentence}")


def test_a_benchmark_is_rejected_before_it_is_launched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "ds_configs" / "zero1.json")
    for more, sentence in (
        (["--sequence-length", "129", "--model", "test"], "--sequence-length 129: test has 128 positions"),
        (["--model", "tset"], "model 'tset' is unknown"),
    ):
        arguments = ["bench", "--deepspeed-config", config, "--output", str(tmp_path / "out"), *more]
        assert main(arguments) == EXIT_CONFIG
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "pretrain"])
def test_all_files_are_checked_at_once(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, config, hosts = tmp_path / "r.toml", tmp_path / "c.json", tmp_path / "hosts"
    recipe.write_text('name = "mine"\nsed = 1\n')
    config.write_text('{"gradient_cliping": 1, "amp": {}}')
    hosts.write_text("node slots=many\n")
    more = ["--data", str(tmp_path), "--run-dir", str(tmp_path / "run")] if command == "pretrain" else []
    arguments = ["--recipe", str(recipe), "--deepspeed-config", str(config), "--hostfile", str(hosts)]
    assert main([command, *arguments, *more]) == EXIT_CONFIG
    [line] = capsys.readouterr().err.splitlines()
    for part in (
        "r.toml: 3 problems",
        "unknown key 'sed'",
        "c.json: 2 problems",
        "'gradient_clipping'",
        "hosts:1",
    ):
        assert part in line
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_library_in_several_lines_is_one() -> None:
    assert str(ConfigError("task.yaml: is wrong:\n  in line 2\n  column 1")).count("\n") == 0
