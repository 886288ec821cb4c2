"""Loads tasks of lm-eval and task files, with data from the hub, its cache or a local folder."""

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tinyllama_ds.config.recipe import Recipe
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation.harness import reject_long_generations
from tinyllama_ds.evaluation.suites import HUMANEVAL, SUITES, Benchmark
from tinyllama_ds.model.config import LlamaConfig

_HUB = "https://huggingface.co"
_OFFLINE = "HF_HUB_OFFLINE"  # read by huggingface_hub and datasets when they are imported
_CARD = "README.md"  # of a downloaded repository: maps its files to configs and splits
_READERS = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}  # of the package datasets
# Folders of lm-eval with the tasks of our suites: reading all of its 14,000 task files takes half a minute.
_FOLDERS = ("hellaswag", "openbookqa", "winogrande", "arc", "super_glue/boolq", "piqa", "mmlu/default", "bbh/fewshot",
            "drop", "xwinograd", "xstorycloze", "xnli", "xcopa")  # fmt: skip


def require_lm_eval() -> None:
    """Raises `ConfigError` where lm-eval, an optional dependency, is absent."""
    for module in ("lm_eval", "accelerate"):
        if find_spec(module) is None:
            raise ConfigError(
                f"scoring on tasks needs {module}, which is not installed; pip install tinyllama_ds[eval]"
            )


def set_offline_if_hub_unreachable(seconds: float = 3.0) -> None:
    """Set HF_HUB_OFFLINE without a network, so that datasets uses its cache at once and does not retry for minutes.

    Call it before any Hugging Face import. A proxy is assumed to reach the hub.
    """
    hub = urlsplit(os.environ.get("HF_ENDPOINT", _HUB))
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", _OFFLINE)):
        return
    found = threading.Event()

    def connect() -> None:
        try:
            address = (hub.hostname or "", hub.port or (80 if hub.scheme == "http" else 443))
            socket.create_connection(address, seconds).close()
            found.set()
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)  # a name that does not resolve may take half a minute
    thread.start()
    thread.join(seconds)
    if not found.is_set():
        os.environ[_OFFLINE] = "1"


def load_tasks(recipe: Recipe, model: LlamaConfig) -> dict[str, Any] | None:
    """The recipe's tasks with their data; None if it has none.

    Raises `ConfigError` where lm-eval, a task or its data is missing, and for a task that this model cannot run.
    """
    evaluation = recipe.evaluation
    if not evaluation.tasks:
        return None
    try:
        require_lm_eval()
        if evaluation.data_dir is not None:
            os.environ[_OFFLINE] = "1"
        set_offline_if_hub_unreachable()
        with silence():
            tasks = load_chosen(evaluation.tasks, Path(evaluation.data_dir) if evaluation.data_dir else None)
        reject_long_generations(tasks["tasks"], model.max_position_embeddings)
    except ConfigError as error:
        raise ConfigError(f"recipe {recipe.name!r}: evaluation: {error}") from error
    return tasks


@contextmanager
def silence() -> Iterator[None]:
    """Discard the output of lm-eval, whose progress bars overwrite ours."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def load_suite(
    benchmarks: tuple[Benchmark, ...], data_dir: Path | None, humaneval_passes: Callable[[str], bool] | None
) -> dict[str, Any]:
    """The benchmarks' tasks as lm-eval's `evaluate` takes them, with the published number of examples.

    `humaneval_passes` runs a model-written program and returns whether its tests pass; without it HumanEval is
    rejected.
    """
    loaded = _load(
        [item.task for item in benchmarks], data_dir, humaneval_passes, {b.task: b.shots for b in benchmarks}
    )
    for benchmark in benchmarks:
        group = loaded["groups"].get(benchmark.task)
        for task in group.get_all_tasks() if group else [loaded["tasks"][benchmark.task]]:
            if benchmark.metric not in task.aggregation():
                raise ConfigError(
                    f"task {task.task_name} of this lm-eval has no {benchmark.metric}; expected lm-eval 0.4.13"
                )
    return loaded


def load_named(
    names: list[str], data_dir: Path | None, humaneval_passes: Callable[[str], bool] | None, shots: int | None
) -> dict[str, Any]:
    """Tasks, groups and tags of lm-eval by name, or YAML files of tasks; `shots` replaces the tasks' own number."""
    return _load(names, data_dir, humaneval_passes, {} if shots is None else dict.fromkeys(names, shots))


def load_chosen(names: Sequence[str], data_dir: Path | None) -> dict[str, Any]:
    """Suites with their published shots, tasks, groups and tags of lm-eval, and YAML files of tasks, all together.

    For unattended runs: tasks that run model-written code are rejected.
    """
    suites = [SUITES[name] for name in names if name in SUITES]
    others = [name for name in names if name not in SUITES]
    if HUMANEVAL in [*others, *(benchmark.task for suite in suites for benchmark in suite)]:
        raise ConfigError(
            f"{HUMANEVAL} runs model-written code; expected `tinyllama-ds evaluate --allow-code-execution` instead"
        )
    parts = [load_suite(suite, data_dir, None) for suite in suites]
    if others:
        parts.append(load_named(others, data_dir, None, shots=None))
    return {kind: {name: it for part in parts for name, it in part[kind].items()} for kind in ("tasks", "groups")}


def _load(
    names: list[str], data_dir: Path | None, humaneval_passes: Callable[[str], bool] | None, shots: dict[str, int]
) -> dict[str, Any]:
    from tinyllama_ds.evaluation.humaneval import humaneval_config

    manager = _manager(names)
    specs: list[Any] = []
    for name in names:
        if name != HUMANEVAL:
            _reject_unknown_or_unsafe(name, manager)
            specs.append(name)
        elif humaneval_passes is None:
            raise ConfigError("humaneval runs model-written code; expected --allow-code-execution with it")
        else:
            specs.append(humaneval_config(humaneval_passes))
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    with _datasets_from(data_dir):
        for name, spec in zip(names, specs, strict=True):
            loaded = _load_one(manager, name, spec)
            _prepare(loaded["tasks"], shots.get(name))
            tasks |= loaded["tasks"]
            groups |= loaded["groups"]
    return {"tasks": tasks, "groups": groups}


def _manager(names: list[str]) -> Any:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    ours = {benchmark.task for suite in SUITES.values() for benchmark in suite}
    if all(name in ours or _is_file(name) for name in names):
        folders: list[str | Path] = [root / folder for folder in _FOLDERS if not all(map(_is_file, names))]
        return lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False)
    return lm_eval.tasks.TaskManager()


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _reject_unknown_or_unsafe(name: str, manager: Any) -> None:
    """Before anything is loaded: lm-eval's code tasks run programs when their modules are imported."""
    if _is_file(name):
        if not Path(name).is_file():
            what = "is a directory" if Path(name).is_dir() else "is missing"
            raise ConfigError(f"{name}: {what}; expected a task file of lm-eval")
        return  # may name functions of its author anyway; `_prepare` sees what it loads
    if name not in manager.task_index:
        raise ConfigError(f"task {name!r} is unknown to lm-eval; `lm-eval ls tasks` lists its tasks")
    for config in _configs_below(name, manager.task_index):
        if config.get("unsafe_code"):
            raise _unsafe(config.get("task", name))


def _unsafe(task: str) -> ConfigError:
    return ConfigError(
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


def _prepare(tasks: dict[str, Any], shots: int | None) -> None:
    """Set the number of examples as lm-eval's `simple_evaluate` does; reject unsafe and sampling tasks."""
    for name, task in tasks.items():
        if task.config.unsafe_code:
            raise _unsafe(name)
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
