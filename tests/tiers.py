"""Which tests a call of pytest runs: the flags of `scripts/test.sh`, and what is quick."""

import os
from types import ModuleType

import pytest

FLAGS = {  # of tests that only run when asked for: the marker, and what its flag adds
    "all_faults": "every fault case, not only the fast part",
    "gpu": "what needs a GPU, and nothing else; all else does not see it",
    "hosts": "the whole multi-host suite, not only its fast part",
    "real": "models of their real size, what others have trained and written, and what DeepSpeed compiles",
    "rehearsal": "docs/reproduce.md in small, and the rehearsal of v1.1",
}
STARTERS = {  # modules, and functions of others
    *("subprocess", "forked", "hosts", "one_gpu", "slurm", "tinyllama_ds.train.compile"),
    *("launching.pretrain", "launching.run", "launching.tinyllama_ds"),
}


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
    """Files that start processes come first: they are slow, and one at the end would keep a single worker busy."""
    chosen = {item: None for item in items if _is_chosen(item, config)}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = sorted(chosen, key=starts_processes, reverse=True)


def flag_of(marker: str) -> str:
    """Of a marker in `FLAGS`."""
    return f"--{marker.replace('_', '-')}"


def _is_chosen(item: pytest.Item, config: pytest.Config) -> bool:
    markers = FLAGS.keys() & {marker.name for marker in item.iter_markers()}
    if ("gpu" in markers) != config.getoption("--gpu") or not all(config.getoption(flag_of(name)) for name in markers):
        return False
    return not config.getoption("--quick") or not starts_processes(item)


def starts_processes(item: pytest.Item) -> bool:
    """Whether the file of a test imports what starts programs or forks, or compiles: so nobody has to mark it."""
    return any(_origins(value) & STARTERS for value in vars(item.module).values())


def _origins(value: object) -> set[str]:
    """The name of a module, or of a function and of its module."""
    if isinstance(value, ModuleType):
        return {value.__name__}
    module = getattr(value, "__module__", None) or ""
    return {module, f"{module}.{getattr(value, '__name__', '')}"}
