"""Which tests a call of pytest runs: the flags of `scripts/test.sh`, and what is quick."""

import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType

import pytest

FLAGS = {  # of tests that only run when asked for: the marker, and what its flag adds
    "all_faults": "every fault case, not only the fast part",
    "gpu": "what needs a GPU, and nothing else; all else does not see it",
    "hosts": "the whole multi-host suite, not only its fast part",
    "real": "models of their real size, and what others have trained and written",
    "rehearsal": "docs/reproduce.md in small, and the rehearsal of v1.1",
}
INSTALLED = tuple(sysconfig.get_paths()[place] for place in ("stdlib", "purelib", "platlib"))
STARTS_PROCESSES = ("subprocess", "forked", "torch.compile", "tinyllama_ds.training.compilation")  # modules, functions


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only what starts no process and compiles nothing")
    for marker, text in FLAGS.items():
        parser.addoption(flag_of(marker), action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Without --gpu a machine's GPUs are hidden: most tests start several ranks, which run on the CPU."""
    for marker in FLAGS:
        config.addinivalue_line("markers", f"{marker}: only with {flag_of(marker)}")
    asked_for = [flag_of(marker) for marker in FLAGS if config.getoption(flag_of(marker))]
    if asked_for and config.getoption("--quick"):
        raise pytest.UsageError(f"--quick leaves out what {asked_for[0]} adds; give one of them")
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not config.option.collectonly:
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--gpu: PyTorch sees no GPU on this machine")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = [item for item in items if _is_chosen(item, config)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def flag_of(marker: str) -> str:
    """Of a marker in `FLAGS`."""
    return f"--{marker.replace('_', '-')}"


def _is_chosen(item: pytest.Item, config: pytest.Config) -> bool:
    markers = FLAGS.keys() & {marker.name for marker in item.iter_markers()}
    if ("gpu" in markers) != config.getoption("--gpu") or not all(config.getoption(flag_of(name)) for name in markers):
        return False
    return not config.getoption("--quick") or not starts_processes(item)


def starts_processes(item: pytest.Item) -> bool:
    """Whether a test starts programs, forks or compiles: itself, by fixtures, or by what it calls of ours.

    Read from the names in the code, so that nobody has to mark a test for it.
    """
    fixtures = [fixture.func for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
    arguments = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(map(_reaches_processes, filter(callable, [item.obj, *fixtures, *arguments])))


@cache
def _reaches_processes(value: Callable) -> bool:
    waiting, seen = [value], set()
    while waiting:
        value = inspect.unwrap(waiting.pop())
        module = getattr(value, "__module__", None) or ""
        if module in STARTS_PROCESSES or f"{module}.{getattr(value, '__name__', '')}" in STARTS_PROCESSES:
            return True
        if id(value) not in seen and _is_ours(module):
            seen.add(id(value))
            waiting += _named(value) if isinstance(value, FunctionType) else _members(value)
    return False


@cache
def _is_ours(module: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and not file.startswith(INSTALLED)


def _named(function: FunctionType) -> Iterator[object]:
    """What the names in a function stand for, in the functions inside it too, and its arguments' defaults."""
    yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    codes = [function.__code__]
    for code in codes:
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        values = [function.__globals__[name] for name in code.co_names if name in function.__globals__]
        yield from values
        for module in values:
            if isinstance(module, ModuleType):
                yield from (vars(module)[name] for name in code.co_names if name in vars(module))


def _members(value: object) -> Iterator[object]:
    """Of a class; a property is its function."""
    if isinstance(value, type):
        yield from (getattr(member, "fget", member) for member in vars(value).values())
