"""Which tests a call of pytest runs: the flags of `scripts/test.sh`, and what is quick."""

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import pytest
import torch

HERE = Path(__file__).parent
FLAGS = {  # of tests that only run when asked for: the marker, and what its flag adds
    "all_faults": "every fault case, not only the fast part",
    "gpu": "what needs a GPU, and nothing else; all else does not see it",
    "hosts": "the whole multi-host suite, not only its fast part",
    "real": "models of their real size, and what others have trained and written",
    "rehearsal": "docs/reproduce.md in small, and the rehearsal of v1.1",
}
STARTS_PROCESSES = ("subprocess", "multiprocessing", "pty")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only what starts no process and compiles nothing")
    for marker, text in FLAGS.items():
        parser.addoption(_flag(marker), action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Without --gpu a machine's GPUs are hidden: most tests start several ranks, which run on the CPU."""
    for marker in FLAGS:
        config.addinivalue_line("markers", f"{marker}: only with {_flag(marker)}")
    asked_for = [_flag(marker) for marker in FLAGS if config.getoption(_flag(marker))]
    if asked_for and config.getoption("--quick"):
        raise pytest.UsageError(f"--quick leaves out what {asked_for[0]} adds; give one of them")
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available() and not config.option.collectonly:
        raise pytest.UsageError("--gpu: PyTorch sees no GPU on this machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if _is_chosen(item, config)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _flag(marker: str) -> str:
    return f"--{marker.replace('_', '-')}"


def _is_chosen(item: pytest.Item, config: pytest.Config) -> bool:
    markers = FLAGS.keys() & {marker.name for marker in item.iter_markers()}
    if ("gpu" in markers) != config.getoption("--gpu") or not all(config.getoption(_flag(name)) for name in markers):
        return False
    return not config.getoption("--quick") or not starts_processes(item)


def starts_processes(item: pytest.Item) -> bool:
    """Whether a test starts processes, itself or by helpers and fixtures of these tests.

    Read from the names in their code, so that nobody has to mark a test for it. Processes that the package starts by
    itself are not seen.
    """
    fixtures = [fixture.func for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
    return any(map(_reaches_processes, [item.obj, *fixtures]))


@cache
def _reaches_processes(function: Callable) -> bool:
    waiting, seen = [function], set()
    while waiting:
        value = inspect.unwrap(waiting.pop())
        module = _module_of(value)
        if module.split(".")[0] in STARTS_PROCESSES:
            return True
        if id(value) not in seen and _is_in_tests(module):
            seen.add(id(value))
            waiting += _named(value) if isinstance(value, FunctionType) else _members(value)
    return False


def _module_of(value: object) -> str:
    return value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""


def _is_in_tests(module: str) -> bool:
    return str(getattr(sys.modules.get(module), "__file__", "")).startswith(f"{HERE}{os.sep}")


def _named(function: FunctionType) -> Iterator[object]:
    """What the names in a function stand for, and in the functions inside it."""
    codes = [function.__code__]
    for code in codes:
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)


def _members(value: object) -> Iterator[object]:
    """Of a module or a class; a property is its function."""
    if isinstance(value, ModuleType | type):
        yield from (getattr(member, "fget", member) for member in vars(value).values())
