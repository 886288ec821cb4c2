"""The metrics of a logged step: loss, learning rate, speed, memory, tokens by source, stragglers; and where they go."""

from time import perf_counter

from tinyllama_ds.config.run_plan import Step
from tinyllama_ds.hardware.gpus import GIB
from tinyllama_ds.health.stragglers import StragglerDetector
from tinyllama_ds.train.trainer import Callback, StepResult, Trainer
from tinyllama_ds.train.utilization import memory_bytes, peak_flops, utilisation


class StepMetrics(Callback):
    """Measures the time in steps since the last logged one, without that of validation, saving and scoring."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        dtype = next(trainer.engine.module.parameters()).dtype
        self._peak = peak_flops(trainer.world.device, dtype, trainer.world.size)[0] * trainer.world.size
        self._tokens, self._seconds, self._began = 0, 0.0, 0.0

    def before_step(self, step: Step) -> None:
        self._began = perf_counter()

    def after_step(self, result: StepResult) -> None:
        self._seconds += perf_counter() - self._began
        self._tokens += result.step.tokens_after - result.step.tokens_before
        if result.is_logged:
            result.metrics.update(self._metrics_of(result))
            self._tokens, self._seconds = 0, 0.0

    def _metrics_of(self, result: StepResult) -> dict[str, float]:
        run, status = self.trainer.run, result.status
        tokens_per_second = self._tokens / self._seconds
        metrics = {
            "Train/Loss": status.loss if status.is_finite else float("nan"),
            "Train/LearningRate": result.learning_rate,
            "Train/BatchTokens": result.step.batch * run.recipe.sequence_length,
            "Train/GradNorm": status.grad_norm if status.is_finite else float("inf"),
            "Speed/TokensPerSecond": tokens_per_second,
            "Memory/PeakGiB": memory_bytes(self.trainer.world.device) / GIB,
        }
        if status.divergence is not None:
            metrics["Train/Distillation"] = status.divergence if status.is_finite else float("nan")
        flops = run.model.flops_per_token(run.recipe.sequence_length) * tokens_per_second
        mfu = utilisation(flops, self._peak)
        metrics |= {} if mfu is None else {"Speed/MFU": mfu}
        metrics |= {f"Seconds/{name}": seconds for name, seconds in self.trainer.clock.read().items()}
        for source, samples in run.data.order.counts(result.progress.position).items():
            metrics[f"Tokens/{source}"] = samples * run.recipe.sequence_length
        return metrics


class Stragglers(Callback):
    """Compares the speed of the ranks, and names stragglers; measures the decoder blocks from the first step on."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._detector = StragglerDetector(trainer.engine.module.model.layers, trainer.world)

    def after_step(self, result: StepResult) -> None:
        if not result.is_logged:
            return
        metrics, sentences = self._detector.compare(result.metrics.get("Seconds/data", 0.0))
        result.metrics.update(metrics)
        for sentence in sentences:
            self.trainer.console.log_line(sentence)


class StepLog(Callback):
    """Writes the metrics to the sinks, and in short to the console."""

    def after_step(self, result: StepResult) -> None:
        if not result.is_logged or not self.trainer.world.is_rank0:
            return
        metrics, progress = result.metrics, result.progress
        self.trainer.metrics.log(progress.step, progress.tokens, metrics)
        mfu = f"{metrics['Speed/MFU']:.0%}" if "Speed/MFU" in metrics else "above the measured peak"
        divergence = f" (KL {metrics['Train/Distillation']:.3f})" if "Train/Distillation" in metrics else ""
        self.trainer.console.advance(
            progress.step,
            f"loss {metrics['Train/Loss']:.3f}{divergence}, lr {metrics['Train/LearningRate']:.2e},"
            f" {metrics['Speed/TokensPerSecond']:,.0f} tok/s, MFU {mfu}",
        )
