"""HumanEval (Chen et al. 2021) with the prompts of lm-eval's task, and our sandbox in place of its metric.

lm-eval's own task downloads a metric that runs the programs in the evaluating process, already at import.
"""

from collections.abc import Callable
from typing import Any

from tinyllama_ds.evaluation.suites import HUMANEVAL


def humaneval_config(passes: Callable[[str], bool]) -> dict[str, Any]:
    """The task for lm-eval: 0-shot, one greedy completion of each of the 164 functions."""

    def process_results(document: dict, completions: list[str]) -> dict[str, float]:
        tests = f"{document['test']}\ncheck({document['entry_point']})"
        return {"pass@1": float(passes(f"{document['prompt']}{completions[0]}\n{tests}"))}

    return {
        "task": HUMANEVAL,
        "dataset_path": "openai/openai_humaneval",
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{canonical_solution}}",
        "process_results": process_results,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
            "max_gen_toks": 1024,
            "do_sample": False,
        },
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
