"""Loads lm-eval's tasks and a user's own, with data from the hub, from its cache or from a local folder."""

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
_OFFLINE = "HF_HUB_OFFLINE"  # what huggingface_hub and datasets read when they are imported
_CARD = "README.md"  # of a downloaded repository, where it says which files are which config and split
_READERS = {".parquet": "parquet", ".jsonl": "json", ".csv": "csv"}  # of the package datasets
# Where lm-eval keeps the tasks of our suites: reading all of its 14,000 task files takes half a minute.
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
    """Without a network let datasets look into its cache at once, where it would retry for minutes otherwise.

    To be called before anything of Hugging Face is imported. A proxy is believed to lead to the hub.
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
    """What the recipe wants the model to be scored on, with its data; None for nothing.

    Raises `ConfigError` where lm-eval, a task or its data is missing, and for a task that this model cannot be scored
    on.
    """
    wanted = recipe.evaluation
    if not wanted.tasks:
        return None
    try:
        require_lm_eval()
        if wanted.data_dir is not None:
            os.environ["HF_HUB_OFFLINE"] = "1"
        set_offline_if_hub_unreachable()
        with silence():
            tasks = load_chosen(wanted.tasks, Path(wanted.data_dir) if wanted.data_dir else None)
        reject_long_generations(tasks["tasks"], model.max_position_embeddings)
    except ConfigError as error:
        raise ConfigError(f"recipe {recipe.name!r}: evaluation: {error}") from error
    return tasks


@contextmanager
def silence() -> Iterator[None]:
    """lm-eval prints, and draws progress bars over ours."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def load_suite(
    benchmarks: tuple[Benchmark, ...], data_dir: Path | None, humaneval_passes: Callable[[str], bool] | None
) -> dict[str, Any]:
    """The benchmarks' tasks as lm-eval's `evaluate` takes them, with the published number of examples.

    `humaneval_passes` runs a program that the model wrote and says whether its tests pass; without it HumanEval is
    refused.
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

    For where nobody looks on: what runs a model's code is refused.
    """
    suites = [SUITES[name] for name in names if name in SUITES]
    others = [name for name in names if name not in SUITES]
    if HUMANEVAL in [*others, *(benchmark.task for suite in suites for benchmark in suite)]:
        raise ConfigError(
            f"{HUMANEVAL} runs code that the model has written; expected it on a checkpoint, with"
            " `tinyllama-ds evaluate --allow-code-execution`"
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
            raise ConfigError("humaneval runs code that the model has written; expected --allow-code-execution with it")
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
    """Before anything is loaded: lm-eval's code tasks run programs as soon as their modules are imported."""
    if _is_file(name):
        if not Path(name).is_file():
            what = "is a directory" if Path(name).is_dir() else "is missing"
            raise ConfigError(f"{name}: {what}; expected a task file of lm-eval")
        from lm_eval.tasks._yaml_loader import load_yaml

        try:
            config = load_yaml(Path(name), resolve_func=False)
        except Exception as error:
            raise ConfigError(f"{name}: is not a task file of lm-eval: {error}") from error
        members = [config]
    elif name not in manager.task_index:
        raise ConfigError(f"task {name!r} is unknown to lm-eval; `lm-eval ls tasks` lists those that it has")
    else:
        members = list(_configs_below(name, manager.task_index))
    for config in members:
        if config.get("unsafe_code"):
            raise ConfigError(
                f"task {config.get('task', name)} runs code that the model has written, outside of any sandbox;"
                f" expected {HUMANEVAL}, which runs in ours"
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
    except Exception as error:  # whatever is wrong with a user's file, or with the columns of local data
        raise ConfigError(f"task {name} does not load: {type(error).__name__}: {error}") from error


def _prepare(tasks: dict[str, Any], shots: int | None) -> None:
    """The number of examples in the prompt as lm-eval's `simple_evaluate` sets it; sampling refused."""
    for name, task in tasks.items():
        if (task.config.generation_kwargs or {}).get("do_sample"):
            raise ConfigError(
                f"task {name} samples; expected do_sample: false, for a score that is the same every time"
            )
        if shots is not None and task.config.num_fewshot != 0:
            task.set_config(key="num_fewshot", value=shots)
            examples = len(list(task.fewshot_docs())) if shots else 0
            if examples < shots:
                raise ConfigError(
                    f"task {name} has {examples} documents for examples; expected the {shots} of its shots"
                )
        elif task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)


@contextmanager
def _datasets_from(data_dir: Path | None) -> Iterator[None]:
    """While tasks load: their datasets from a folder, and what is nowhere as one sentence.

    lm-eval calls `datasets.load_dataset` for every task; there is no other place that all of them go through.
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
            names_files = "data_files" in options
            why = _first_line(error) if names_files else _why_absent(data_dir, folder, error)
            raise ConfigError(f"dataset {what}: {why}") from error

    datasets.load_dataset = load
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.load_dataset = original


def _local_folder(data_dir: Path, path: str, name: str | None) -> Path | None:
    """`owner/dataset/config`, with or without the owner; without the config for a repository that knows its own."""
    if not data_dir.is_dir():
        raise ConfigError(f"--data-dir {data_dir}: is not a directory")
    bases = [data_dir / path, data_dir / Path(path).name]
    candidates = bases if name is None else [base / name for base in bases]
    candidates += [base for base in bases if (base / _CARD).is_file()]
    return next((folder for folder in candidates if folder.is_dir()), None)


def _read_folder(folder: Path, name: str | None, load_dataset: Callable[..., Any]) -> Any:
    """What `save_to_disk` wrote, a downloaded repository, or files named by their split."""
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
        raise OSError("expected what save_to_disk or `hf download` writes, or files such as validation.jsonl")
    return load_dataset(readers.pop(), data_files=splits)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _why_absent(data_dir: Path | None, folder: Path | None, error: Exception) -> str:
    if folder is not None:
        return f"{folder} cannot be read as its data: {_first_line(error)}"
    places = "Hugging Face's cache" if data_dir is None else f"{data_dir} or Hugging Face's cache"
    if os.environ.get(_OFFLINE):
        return f"is not in {places}, and the hub is out of reach; put it there with `hf download`, or see --data-dir"
    return f"is not to be had: {_first_line(error)}"
