"""Tasks of every kind with data of their own: multiple choice, perplexity of whole texts, greedy generation."""

import json
import random
from pathlib import Path

from made_up import made_up_text

from tinyllama_ds.data.demo.tasks import multiple_choice_task

PERPLEXITY = """
task: local_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
metadata: {{version: 1.0}}
"""
GENERATION = """
task: local_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
process_results: !function answers.digest
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: digest, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
# A figure that tells any two outputs apart.
ANSWERS = """
from zlib import crc32


def digest(document, outputs):
    return {"digest": crc32(outputs[0].encode()) % 99991}
"""


def write_tasks(folder: Path, documents: int) -> list[Path]:
    """Texts with blanks at both ends, of one letter, of other scripts, and longer than the model's 128 positions."""
    rng = random.Random(1)
    data = folder / "data.jsonl"
    with data.open("w") as file:
        for number in range(documents):
            question = made_up_text(number, rng.choice([2, 20, 150])) + rng.choice(["", " ", "\n", " é 中 "])
            letters = number % 3 == 0
            choices = [" A", " B", " C"] if letters else [f" {made_up_text(100 * number + k, 3)}" for k in range(4)]
            row = {"question": question, "choices": choices, "answer": number % len(choices), "text": question * 3}
            file.write(json.dumps(row) + "\n")
    (folder / "answers.py").write_text(ANSWERS)
    paths = []
    choice = f"{multiple_choice_task('local_choice', data)}fewshot_split: test\nnum_fewshot: 2\n"
    perplexity, generation = (template.format(data=data) for template in (PERPLEXITY, GENERATION))
    for name, task in (("choice", choice), ("perplexity", perplexity), ("generation", generation)):
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(task)
    return paths
