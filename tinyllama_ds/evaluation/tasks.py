"""Loads tasks of lm-eval and task files, with data from the hub, its cache or a local folder."""

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tinyllama_ds.config.recipe import Recipe
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.harness import reject_long_generations
from tinyllama_ds.evaluation.humaneval import humaneval_config
from tinyllama_ds.evaluation.suites import HUMANEVAL, Benchmark, load_suites
from tinyllama_ds.model.config import LlamaConfig

_HUB = "https://huggingface.co"
_OFFLINE = "HF_HUB_OFFLINE"  # read by huggingface_hub and datasets when they are imported
_CARD = "README.md"  # of a downloaded repository: maps its files to configs and splits
_READERS = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}  # of the package datasets


def require_lm_eval() -> None:
    """Raises `ConfigError` where lm-eval, an optional dependency, is absent."""
    for module in ("lm_eval", "accelerate"):
        if find_spec(module) is None:
            raise ConfigError(
                f"scoring on tasks needs {module}, which is not installed; pip install tinyllama_ds[eval]"
            )


def set_offline_if_hub_unreachable(data_dir: Path | None = None, seconds: float = 3.0) -> None:
    """Set HF_HUB_OFFLINE without a network, so that datasets uses its cache at once and does not retry for minutes.

    Data in `data_dir` need no network either. Call it before any Hugging Face import. A proxy is assumed to reach the
    hub.
    """
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", _OFFLINE)
    if data_dir is not None or not (any(map(os.environ.get, proxies)) or _reaches_hub(seconds)):
        os.environ[_OFFLINE] = "1"


def _reaches_hub(seconds: float) -> bool:
    hub = urlsplit(os.environ.get("HF_ENDPOINT", _HUB))
    found = threading.Event()

    def connect() -> None:
        with suppress(OSError):
            address = (hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443))
            socket.create_connection(address, seconds).close()
            found.set()

    threading.Thread(target=connect, daemon=True).start()  # a name that does not resolve may take half a minute
    return found.wait(seconds)


def load_tasks(recipe: Recipe, model: LlamaConfig) -> dict[str, Any] | None:
    """The recipe's tasks with their data; None if it has none.

    Raises `ConfigError` where lm-eval, a task or its data is missing, and for a task that this model cannot run.
    """
    evaluation = recipe.evaluation
    if not evaluation.tasks:
        return None
    data_dir = Path(evaluation.data_dir) if evaluation.data_dir else None
    try:
        require_lm_eval()
        set_offline_if_hub_unreachable(data_dir)
        with silence():
            tasks = load_named(evaluation.tasks, data_dir)
        reject_long_generations(tasks["tasks"], model.max_position_embeddings)
    except ConfigError as error:
        raise ConfigError(f"recipe {recipe.name!r}: evaluation: {error}") from error
    return tasks


@contextmanager
def silence() -> Iterator[None]:
    """Discard the output of lm-eval, whose progress bars overwrite ours."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def load_named(
    names: Sequence[str],
    data_dir: Path | None,
    humaneval_passes: Callable[[str], bool] | None = None,
    shots: int | None = None,
) -> dict[str, Any]:
    """Suites with their published shots, tasks, groups and tags of lm-eval, and YAML files of tasks, all together.

    In the form that lm-eval's `evaluate` takes. `humaneval_passes` runs a model-written program and returns whether its
    tests pass; without it HumanEval is rejected. `shots` replaces the tasks' own number.
    """
    benchmarks = benchmarks_of(names)
    manager = _manager(list(benchmarks))
    specs = {name: _spec(name, manager, humaneval_passes) for name in benchmarks}
    together: dict[str, Any] = {"tasks": {}, "groups": {}}
    with _datasets_from(data_dir):
        for name, spec in specs.items():
            benchmark, loaded = benchmarks[name], _load_one(manager, name, spec)
            for task in loaded["tasks"].values():
                _prepare(task, benchmark.shots if benchmark and shots is None else shots)
                if benchmark and benchmark.metric not in task.aggregation():
                    raise ConfigError(
                        f"task {task.task_name} of this lm-eval has no {benchmark.metric}; expected lm-eval 0.4.13"
                    )
            together = {kind: found | loaded[kind] for kind, found in together.items()}
    return together


def benchmarks_of(names: Sequence[str]) -> dict[str, Benchmark | None]:
    """Tasks by name, those of the suites among `names` with their benchmarks."""
    suites = load_suites()
    found: dict[str, Benchmark | None] = {
        b.task: b for name in names if name in suites for b in suites[name].benchmarks
    }
    return found | {name: None for name in names if name not in suites}


def _manager(names: Sequence[str]) -> Any:
    """For suites and files without lm-eval's other tasks: reading all of its 14,000 task files takes half a minute."""
    import lm_eval.tasks

    known = benchmarks_of(list(load_suites()))
    if any(name not in known and not _is_file(name) for name in names):
        return lm_eval.tasks.TaskManager()
    folders = {benchmark.folder for name in names if (benchmark := known.get(name)) and benchmark.folder}
    include: list[str | Path] = [Path(lm_eval.tasks.__file__).parent / folder for folder in sorted(folders)]
    return lm_eval.tasks.TaskManager(include_path=include, include_defaults=False)


def _spec(name: str, manager: Any, humaneval_passes: Callable[[str], bool] | None) -> Any:
    """What lm-eval loads a task by. Before anything is loaded: its code tasks run programs when they are imported."""
    if name == HUMANEVAL:
        if humaneval_passes is None:
            raise ConfigError(
                f"{HUMANEVAL} runs model-written code; expected `tinyllama-ds evaluate` with --allow-code-execution"
            )
        return humaneval_config(humaneval_passes)
    if _is_file(name):
        if not Path(name).is_file():
            what = "is a directory" if Path(name).is_dir() else "is missing"
            raise ConfigError(f"{name}: {what}; expected a task file of lm-eval")
        return name  # may name functions of its author anyway; `_prepare` sees what it loads
    if name not in manager.task_index:
        raise ConfigError(f"task {name!r} is unknown to lm-eval; `lm-eval ls tasks` lists its tasks")
    for config in _configs_below(name, manager.task_index):
        _reject_unsafe(config.get("task", name), config.get("unsafe_code"))
    return name


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _reject_unsafe(task: str, is_unsafe: object) -> None:
    if is_unsafe:
        raise ConfigError(
            f"task {task} runs model-written code without a sandbox; expected {HUMANEVAL}, which runs in a sandbox here"
        )


def _configs_below(name: str, index: Any) -> Iterator[dict]:
    entry = index.get(name)
    if entry is None:
        return
    config = entry.cfg or {}
    yield config
    members = config.get("task")
    for child in [*(members if isinstance(members, list) else []), *(entry.tags if entry.cfg is None else [])]:
        key = child if isinstance(child, str) else child.get("group", child.get("task"))
        if isinstance(key, str) and key != name:
            yield from _configs_below(key, index)


def _load_one(manager: Any, name: str, spec: Any) -> dict[str, Any]:
    try:
        return manager.load([spec])
    except ConfigError:
        raise
    except Exception as error:  # anything in a user's file, or the columns of local data
        raise ConfigError(f"task {name} cannot be loaded: {type(error).__name__}: {error}") from error


def _prepare(task: Any, shots: int | None) -> None:
    """Set the number of examples as lm-eval's `simple_evaluate` does; reject unsafe and sampling tasks."""
    name = task.task_name
    _reject_unsafe(name, task.config.unsafe_code)
    if (task.config.generation_kwargs or {}).get("do_sample"):
        raise ConfigError(f"task {name} samples; expected do_sample: false, for a reproducible score")
    if shots is not None and task.config.num_fewshot != 0:
        task.set_config(key="num_fewshot", value=shots)
        examples = len(list(task.fewshot_docs())) if shots else 0
        if examples < shots:
            raise ConfigError(f"task {name} has {examples} documents for examples; expected {shots}, one per shot")
    elif task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)


@contextmanager
def _datasets_from(data_dir: Path | None) -> Iterator[None]:
    """While tasks load, datasets come from a folder, and a missing one is a `ConfigError`.

    Replaces `datasets.load_dataset`, which lm-eval 0.4.13 calls directly (`api/task.py`: `Task.download` and
    `ConfigurableTask.download`). Overriding `dataset_path` by configs does not reach the members of groups and tags,
    nor tasks that are Python classes; a `download` hook there would make this function unnecessary.
    """
    import datasets

    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        folder = None if data_dir is None else _local_folder(data_dir, path, name)
        try:
            if folder is not None:
                return _read_folder(folder, name, original)
            return original(path, name, **options)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            what = path if name is None else f"{path} ({name})"
            is_file = "data_files" in options
            reason = _first_line(error) if is_file else _missing_reason(data_dir, folder, error)
            raise ConfigError(f"dataset {what}: {reason}") from error

    datasets.load_dataset = load
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.load_dataset = original


def _local_folder(data_dir: Path, path: str, name: str | None) -> Path | None:
    """`owner/dataset/config`, with or without the owner; without the config for a repository with a card."""
    if not data_dir.is_dir():
        raise ConfigError(f"--data-dir {data_dir}: is not a directory")
    bases = [data_dir / path, data_dir / Path(path).name]
    candidates = bases if name is None else [base / name for base in bases]
    candidates += [base for base in bases if (base / _CARD).is_file()]
    return next((folder for folder in candidates if folder.is_dir()), None)


def _read_folder(folder: Path, name: str | None, load_dataset: Callable[..., Any]) -> Any:
    """Output of `save_to_disk`, a downloaded repository, or files named by their split."""
    import datasets

    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(folder))
    if (folder / _CARD).is_file():
        return load_dataset(str(folder), name)
    splits: dict[str, list[str]] = {}
    files = [path for path in sorted(folder.iterdir()) if path.suffix in _READERS]
    for path in files:
        splits.setdefault(path.stem.split("-")[0], []).append(str(path))  # train-00000-of-00002.parquet
    readers = {_READERS[path.suffix] for path in files}
    if len(readers) != 1:
        raise OSError("expected output of save_to_disk or `hf download`, or files such as validation.jsonl")
    return load_dataset(readers.pop(), data_files=splits)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _missing_reason(data_dir: Path | None, folder: Path | None, error: Exception) -> str:
    if folder is not None:
        return f"{folder} cannot be read as its data: {_first_line(error)}"
    places = "Hugging Face's cache" if data_dir is None else f"{data_dir} or Hugging Face's cache"
    if os.environ.get(_OFFLINE):
        return f"is not in {places}, and the hub is unreachable; get it with `hf download`, or see --data-dir"
    return f"not available: {_first_line(error)}"
