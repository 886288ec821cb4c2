"""The callbacks of a training run, in the order in which they are executed."""

from tinyllama_ds.train.callbacks.anomaly_log import AnomalyLog
from tinyllama_ds.train.callbacks.checkpoints import Checkpoints
from tinyllama_ds.train.callbacks.garbage_collection import GarbageCollection
from tinyllama_ds.train.callbacks.liveness import Liveness
from tinyllama_ds.train.callbacks.parameter_check import ParameterCheck
from tinyllama_ds.train.callbacks.samples import Samples
from tinyllama_ds.train.callbacks.step_log import StepLog
from tinyllama_ds.train.callbacks.step_metrics import StepMetrics
from tinyllama_ds.train.callbacks.stragglers import Stragglers
from tinyllama_ds.train.callbacks.task_scores import TaskScores
from tinyllama_ds.train.callbacks.validation import Validation
from tinyllama_ds.train.trainer import Callback, Trainer

CALLBACKS: tuple[type[Callback], ...] = (
    AnomalyLog,
    StepMetrics,
    Stragglers,
    StepLog,  # writes the metrics that those before it have added
    Validation,
    Samples,
    ParameterCheck,  # before weights are saved
    Checkpoints,
    TaskScores,
    GarbageCollection,
    Liveness,
)


def register_callbacks(trainer: Trainer) -> None:
    """Give a trainer its callbacks."""
    trainer.callbacks = [callback(trainer) for callback in CALLBACKS]
