"""TinyLlama's three published suites as tasks of lm-eval."""

from dataclasses import dataclass

from tinyllama_ds.errors import ConfigError

HUMANEVAL = "humaneval"


@dataclass(frozen=True)
class Benchmark:
    """A column of a published table, and the task of lm-eval behind it."""

    title: str
    task: str
    metric: str
    shots: int = 0


# The published commonsense and Chinese scores come from lm-eval (EVAL.md of TinyLlama's repository: zero-shot,
# fp32, batches of 32). Those of `instruct` come from InstructEval (github.com/declare-lab/instruct-eval), whose prompts
# differ: its DROP asks only questions with one answer, and counts an output that starts with it.
SUITES: dict[str, tuple[Benchmark, ...]] = {
    "commonsense": (
        Benchmark("HellaSwag", "hellaswag", "acc_norm"),
        Benchmark("OpenBookQA", "openbookqa", "acc_norm"),
        Benchmark("WinoGrande", "winogrande", "acc"),
        Benchmark("ARC-c", "arc_challenge", "acc_norm"),
        Benchmark("ARC-e", "arc_easy", "acc_norm"),
        Benchmark("BoolQ", "boolq", "acc"),
        Benchmark("PIQA", "piqa", "acc_norm"),
    ),
    "instruct": (
        Benchmark("MMLU", "mmlu", "acc", shots=5),
        Benchmark("BBH", "bbh_fewshot", "exact_match", shots=3),
        Benchmark("HumanEval", HUMANEVAL, "pass@1"),
        Benchmark("DROP", "drop", "f1", shots=3),
    ),
    "chinese": (
        Benchmark("xwinograd_zh", "xwinograd_zh", "acc"),
        Benchmark("xstorycloze_zh", "xstorycloze_zh", "acc"),
        Benchmark("xnli_zh", "xnli_zh", "acc"),
        Benchmark("xcopa_zh", "xcopa_zh", "acc"),
    ),
}


def suite_named(name: str) -> tuple[Benchmark, ...]:
    """The benchmarks of a suite, in the order of the published table."""
    if name not in SUITES:
        raise ConfigError(f"suite {name!r} is unknown; choose {', '.join(SUITES)}")
    return SUITES[name]
