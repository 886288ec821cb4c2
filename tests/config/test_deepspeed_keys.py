"""The tables of keys: every key that DeepSpeed's own classes read is in one of them, and the page is made of them."""

import re
import runpy
import typing
from collections import defaultdict
from pathlib import Path

import pytest

from tinyllama_ds.config.deepspeed_keys import key_tables

KEYS = key_tables()
ROOT = Path(__file__).parents[2]
# Sections that DeepSpeed reads with a class of its own.
CLASSES = {
    "zero_optimization": "deepspeed.runtime.zero.config.DeepSpeedZeroConfig",
    "bf16": "deepspeed.runtime.precision_config.DeepSpeedBF16Config",
    "fp16": "deepspeed.runtime.precision_config.DeepSpeedFP16Config",
    "compile": "deepspeed.compile.config.CompileConfig",
    "comms_logger": "deepspeed.comm.config.CommsLoggerConfig",
    "hybrid_engine": "deepspeed.runtime.config.HybridEngineConfig",
    "tensor_parallel": "deepspeed.runtime.tensor_parallel.config.TPTrainingConfig",
    "timers.throughput": "deepspeed.utils.config.DeepSpeedThroughputTimerConfig",
    "tensorboard": "deepspeed.monitor.config.TensorBoardConfig",
    "csv_monitor": "deepspeed.monitor.config.CSVConfig",
    "wandb": "deepspeed.monitor.config.WandbConfig",
    "comet": "deepspeed.monitor.config.CometConfig",
}
MADE_BY_OTHERS = {"deepspeed.monitor.config.DeepSpeedMonitorConfig"}  # of the four above, not a section of its own


class Watched(dict):
    """A section that writes down which keys DeepSpeed asks for."""

    def __init__(self, data: dict, path: str, asked: dict[str, set[str]]) -> None:
        super().__init__(data)
        self.path, self.asked = path, asked

    def __contains__(self, key: object) -> bool:
        self.asked[self.path].add(str(key))
        return super().__contains__(key)

    def get(self, key: object, default: object = None) -> object:  # type: ignore[override]
        self.asked[self.path].add(str(key))
        return super().get(key, default)

    def keys(self) -> "Watched":  # type: ignore[override]
        return self

    def __deepcopy__(self, memo: dict) -> "Watched":
        return self


@pytest.fixture(scope="module")
def asked() -> dict[str, set[str]]:
    """What DeepSpeed's own parser asks a config for, by section: at the top level, then in each section."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        from deepspeed.runtime.config import DeepSpeedConfig

        found: dict[str, set[str]] = defaultdict(set)
        DeepSpeedConfig(Watched({"train_batch_size": 1}, "", found))
        for key in sorted(found[""]):
            section = Watched({}, key, found)
            try:
                DeepSpeedConfig(Watched({"train_batch_size": 1, key: section}, "", found))
            except Exception:  # a key that is not a section, or a removed one
                continue
    return found


def is_listed(full: str) -> bool:
    is_rejected = any(f"{full}.".startswith(f"{rejected}.") for rejected in KEYS.rejected)
    return full in KEYS.accepted or full in KEYS.sections or is_rejected


def test_every_key_that_deepspeeds_parser_asks_for_is_listed(asked: dict[str, set[str]]) -> None:
    full = {f"{section}.{key}" if section else key for section, keys in asked.items() for key in keys}
    assert {"optimizer", "zero_optimization", "torch_autocast", "checkpoint.writer", "data_types.param_dtype"} <= full
    assert [key for key in sorted(full) if not is_listed(key)] == []


@pytest.mark.parametrize("section", CLASSES)
def test_every_field_of_deepspeeds_classes_is_listed(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    fields = list(_fields(_load(CLASSES[section]), section))
    assert fields
    assert [full for full in fields if not is_listed(full)] == []


def _load(place: str) -> type:
    module, _, name = place.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)


def _fields(model: type, section: str) -> typing.Iterator[str]:
    for key, field in model.model_fields.items():
        full = f"{section}.{field.alias or key}"
        nested = [
            kind for kind in (field.annotation, *typing.get_args(field.annotation)) if hasattr(kind, "model_fields")
        ]
        if not nested:
            yield full
        for kind in nested:
            yield from _fields(kind, full)


def test_no_class_of_deepspeeds_config_is_passed_over(asked: dict[str, set[str]]) -> None:
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    assert asked
    seen: set[str] = set(MADE_BY_OTHERS)
    waiting = [_load(place) for place in CLASSES.values()]
    while waiting:
        model = waiting.pop()
        seen.add(f"{model.__module__}.{model.__name__}")
        for field in model.model_fields.values():
            kinds = (field.annotation, *typing.get_args(field.annotation))
            waiting += [kind for kind in kinds if hasattr(kind, "model_fields")]
    loaded = {f"{model.__module__}.{model.__name__}" for model in DeepSpeedConfigModel.__subclasses__()}
    training = {name for name in loaded if ".inference." not in name}
    assert training - seen == set()


def test_a_key_is_in_one_table_and_no_cell_is_empty() -> None:
    tables = (KEYS.supported, KEYS.warned, KEYS.rejected)
    assert sum(map(len, tables)) == len({*KEYS.supported, *KEYS.warned, *KEYS.rejected})
    assert all(key.effect and key.expectation and key.stages for key in KEYS.accepted.values())
    assert all(KEYS.rejected.values())
    assert KEYS.on_by_default <= KEYS.rejected.keys()
    text = (ROOT / "docs" / "configs.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == sum(map(len, tables))
    assert not [row for row in rows if re.search(r"\|\s*\|", row)]


def test_the_page_is_made_of_the_tables() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "write_config_table.py"))
    assert made["PAGE"].read_text() == made["page"]()


@pytest.mark.parametrize(
    ("full", "value", "off"),
    [
        ("fp16", {"enabled": False, "loss_scale": 0}, True),
        ("fp16", {"enabled": True}, False),
        ("dump_state", False, True),
        ("steps_per_print", 10, False),
        ("timers", {"enabled": False}, False),
        ("zero_optimization.compute_grad_norm", False, False),
    ],
)
def test_what_is_off_may_stay(full: str, value: object, off: bool) -> None:
    assert KEYS.is_off(full, value) == off


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, "4e-4", None, [], {}, [float("nan"), 2], 10**400])
def test_no_key_takes_an_odd_value(value: object) -> None:
    taken = {full for full, key in KEYS.accepted.items() if key.accepts(value)}
    if isinstance(value, str | list):
        taken -= {full for full, key in KEYS.accepted.items() if key.expectation in ("a text", "a list of names")}
    assert taken == set()
