"""A trained Llama through all commands (`--real`): import, generate, evaluate, continue to train, export."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import transformers
from launching import TIMEOUT, Finished, read_series, run, write_deepspeed_config
from smollm import write_datasets

from tinyllama_ds.cli import main

pytestmark = pytest.mark.real
PROMPT = "The capital of France is"
TASKS = "hellaswag,boolq,piqa,winogrande"
LIMIT = 40  # documents of each task
RECIPE = """
name = "continued"
sequence_length = 256
seed = 1
validation_samples = 8

[[stages]]
name = "demo"
tokens = 12_288
global_batch_tokens = 1024
weights = { slimpajama = 1.0 }

[intervals]
log_steps = 1
evaluate_tokens = 6_144
save_tokens = 12_288

[model]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("smollm2")


@pytest.fixture(scope="module")
def imported(root: Path, smollm2: Path) -> Path:
    assert main(["import", str(smollm2), str(root / "ours")]) == 0
    return root / "ours"


@pytest.fixture(scope="module")
def exported(root: Path, imported: Path) -> Path:
    assert main(["export", str(imported), str(root / "hf")]) == 0
    return root / "hf"


@pytest.fixture(scope="module")
def datasets(root: Path) -> Path:
    (root / "data_packages").mkdir()
    return write_datasets(root / "datasets", root / "data_packages")


def command(*arguments: object) -> Finished:
    finished = run(["tinyllama-ds", *map(str, arguments)], timeout=20 * TIMEOUT)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def greedy(folder: Path) -> str:
    """64 tokens of transformers' own generation."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    found = model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=2, pad_token_id=2)
    return tokenizer.decode(found[0], skip_special_tokens=True)


def test_it_comes_back_bit_for_bit(root: Path, imported: Path, exported: Path) -> None:
    assert main(["import", str(exported), str(root / "again")]) == 0
    assert sha256(root / "again") == sha256(imported)
    assert (root / "again" / "tokenizer.json").read_bytes() == (imported / "tokenizer.json").read_bytes()


def test_the_same_text_is_generated_from_all_folders(smollm2: Path, imported: Path, exported: Path) -> None:
    expected = greedy(smollm2)
    assert " Paris" in expected
    assert greedy(exported) == expected
    for model in (imported, exported):
        finished = command("generate", model, PROMPT, "--max-new-tokens", 64, "--temperature", 0)
        assert finished.stdout.strip() == expected.strip()


def scores_of(model: Path, datasets: Path, output: Path) -> dict:
    arguments = ["--tasks", TASKS, "--limit", LIMIT, "--data-dir", datasets, "--output", output]
    command("evaluate", model, *arguments)
    found = json.loads((output / "tasks.json").read_text())["lm_eval"]
    print({task: metrics["acc,none"] for task, metrics in found.items()})
    return found


def test_scores_are_those_of_lm_evals_own_model(exported: Path, imported: Path, datasets: Path, tmp_path: Path) -> None:
    import lm_eval

    from tinyllama_ds.evaluation.tasks import load_named, set_offline_if_hub_unreachable

    set_offline_if_hub_unreachable(datasets)
    tasks = load_named(TASKS.split(","), datasets)["tasks"]
    expected = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(exported), "dtype": "float32"},
        tasks=list(tasks.values()),
        device="cpu",
        batch_size=8,
        limit=LIMIT,
        log_samples=False,
    )
    found = scores_of(imported, datasets, tmp_path / "scores")
    assert expected is not None
    for task, metrics in json.loads(json.dumps(expected["results"])).items():
        numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
        assert {key: found[task][key] for key in numbers} == numbers


def test_training_continues_from_its_loss(root: Path, smollm2: Path, imported: Path, datasets: Path) -> None:
    """The first loss is the imported model's, and it falls; the scores afterwards are printed."""
    command("demo-data", root / "raw", "--source", "slimpajama")
    source, data, run_dir = root / "raw" / "slimpajama", root / "data", root / "run"
    command("prepare", "--source", "slimpajama", "--input", source, "--tokenizer", imported, "--output", data)
    described = json.loads((smollm2 / "config.json").read_text())
    kept = {key: described[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
            "tie_word_embeddings")}  # fmt: skip
    lines = [f"{key} = {json.dumps(value)}" for key, value in kept.items()]
    (root / "recipe.toml").write_text(RECIPE + "\n".join([*lines, "rope_theta = 100000.0"]) + "\n")
    adam = {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.1, "torch_adam": True}}
    config = write_deepspeed_config(root / "ds.json", stage=3, micro_batch=4, optimizer=adam)
    arguments = ["--recipe", root / "recipe.toml", "--deepspeed-config", config, "--data", data, "--run-dir", run_dir]
    command("pretrain", *arguments, "--init-from", imported, "--num-gpus", 1)
    losses = read_series(run_dir, "Train/Loss")
    validation = read_series(run_dir, "Validation/Loss/slimpajama")
    print("training losses", losses[0], losses[-1], "validation losses", validation)
    assert losses[0] < 5  # a model without training is at ln 49,152 = 10.8
    assert validation[-1] < validation[0]
    command("export", run_dir, root / "continued-hf")
    scores_of(root / "continued-hf", datasets, root / "scores_after")
