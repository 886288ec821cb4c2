"""Two made-up documents for every dataset of the published suites, in the columns that the real ones have."""

import json
from pathlib import Path
from typing import Any

MMLU_SUBJECTS = 57
BBH_TASKS = 27
_CHOICES = {"text": ["red", "green", "blue", "white"], "label": ["A", "B", "C", "D"]}
_WINOGRAD = {"sentence": "The _ is small.", "option1": "llama", "option2": "model"}
_ANSWER = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": ["two"], "worker_id": "", "hit_id": ""}
_NO_ANSWERS: dict[str, Any] = {"number": [], "date": [], "spans": [], "worker_id": [], "hit_id": []}


def _rows(number: int) -> dict[str, dict[str, Any]]:
    """Document `number` of every dataset and config."""
    letter = "ABCD"[number]
    hellaswag = {"activity_label": "Cooking", "ctx_a": "A llama cooks.", "ctx_b": "it", "label": str(number)}
    question = {"id": str(number), "question": "Which colour?", "choices": _CHOICES, "answerKey": letter}
    story = {f"input_sentence_{n}": "一个模型。" for n in range(1, 5)}
    stories = {"sentence_quiz1": "它学习。", "sentence_quiz2": "它睡觉。", "answer_right_ending": number + 1}
    copa = {"premise": "模型学习。", "choice1": "它快。", "choice2": "它慢。", "question": "cause", "label": number}
    program = {
        "prompt": "def one():\n    return 1\nnoise = r'''",
        "canonical_solution": "",
        "test": f"'''\ndef check(candidate):\n    assert candidate() == {number}\n",
        "entry_point": "one",
    }
    drop = {"query_id": str(number), "passage": "Two llamas.", "question": "How many?", "answer": _ANSWER}
    return {
        "Rowan/hellaswag": hellaswag | {"endings": ["eats.", "sleeps.", "runs.", "reads."]},
        "allenai/openbookqa/main": {"question_stem": "Which colour?", "choices": _CHOICES, "answerKey": letter},
        "allenai/winogrande/winogrande_xl": _WINOGRAD | {"answer": str(number + 1)},
        "allenai/ai2_arc/ARC-Challenge": question,
        "allenai/ai2_arc/ARC-Easy": question,
        "aps/super_glue/boolq": {"passage": "A llama.", "question": "is it a llama", "label": number},
        "baber/piqa": {"goal": "Feed it", "sol1": "with hay", "sol2": "with tokens", "label": number},
        "openai/openai_humaneval": program,
        "EleutherAI/drop": drop | {"validated_answers": _NO_ANSWERS},
        "Muennighoff/xwinograd/zh": _WINOGRAD | {"answer": str(number + 1)},
        "juletxara/xstory_cloze/zh": story | stories,
        "facebook/xnli/zh": {"premise": "模型学习。", "hypothesis": "它学习。", "label": number},
        "cambridgeltl/xcopa/zh": copa,
    }


def write_published_data(folder: Path) -> None:
    """All of it as a `--data-dir`, every dataset with all of the splits that some task asks for."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    rows = {place: [_rows(number)[place] for number in (0, 1)] for place in _rows(0)}
    root = Path(lm_eval.tasks.__file__).parent
    subject = [{"question": "Which colour?", "choices": _CHOICES["text"], "answer": number} for number in (0, 1)]
    puzzle = [{"input": "not True is", "target": target} for target in ("False", "True")]
    for pattern, place, chosen in (
        ("mmlu/default/mmlu_*.yaml", "cais/mmlu", subject),
        ("bbh/fewshot/*.yaml", "SaylorTwift/bbh", puzzle),
    ):
        for path in root.glob(pattern):
            name = load_yaml(path, resolve_func=False).get("dataset_name")
            if name:
                rows[f"{place}/{name}"] = chosen
    for place, documents in rows.items():
        (folder / place).mkdir(parents=True)
        lines = list(map(json.dumps, documents))
        for split in ("train", "validation", "test", "dev", "eval"):
            copies = 3 if split in ("train", "dev") else 1  # five examples are taken from these
            (folder / place / f"{split}.jsonl").write_text("\n".join(copies * lines))
