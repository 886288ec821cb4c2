"""The callbacks of a training run, in the order in which they are executed."""

from tinyllama_ds.train.callbacks.anomaly_log import AnomalyLog
from tinyllama_ds.train.callbacks.checkpoints import Checkpoints, ParameterCheck
from tinyllama_ds.train.callbacks.evaluation import Samples, TaskScores, Validation
from tinyllama_ds.train.callbacks.process import GarbageCollection, Liveness
from tinyllama_ds.train.callbacks.step_metrics import StepLog, StepMetrics, Stragglers
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
