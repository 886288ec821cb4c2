"""From a checkpoint at one context length to four times of it: whole documents in rows, another rotation, one run."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import pretrain
from launching import read_series, write_deepspeed_config, write_recipe
from made_up import made_up_text
from test_elastic import stop_after
from test_resume import tensors_of

from tinyllama_ds.checkpoint.format import find_checkpoints
from tinyllama_ds.config.run_plan import RunPlan
from tinyllama_ds.data.loader import open_streams
from tinyllama_ds.data.packing import PackedStream
from tinyllama_ds.data.prepare.prepare import Preparation, prepare
from tinyllama_ds.data.prepare.sources import source_format
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model
from tinyllama_ds.model.loss import IGNORE_INDEX
from tinyllama_ds.run.resolve import Options, Run, resolve_run
from tinyllama_ds.train.batches import count_targets, read_batch

CPU = torch.device("cpu")
SHORT, LONG = 32, 128
STEPS, STOP = 6, 3
ROPE = 'rope_theta = 100000.0\nrope_scaling = { rope_type = "yarn", factor = 4, original_max_position_embeddings = 32 }'


def write_model(path: Path, positions: int, rope: str = "") -> Path:
    """The size `test` with other positions, as the [model] table of a recipe that is there."""
    size = MODEL_SIZES["test"]
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    table = {key: getattr(size, key) for key in (*keys, "num_key_value_heads", "rms_norm_eps")}
    lines = [f"{key} = {value}" for key, value in (table | {"max_position_embeddings": positions}).items()]
    text = path.read_text().replace('model = "test"\n', "")
    path.write_text(text.replace("[[stages]]", "\n".join(["[model]", *lines, rope, "[[stages]]"])))
    return path


def write_extension(path: Path, steps: int = STEPS, **changes: object) -> Path:
    settings = {"sequence_length": LONG, "document_mask": True, "packing": "best_fit"} | changes
    write_recipe(path, steps, save_every=1, **settings)
    path.write_text(path.read_text() + "keep_last = 9\n")
    for key in ("tokens", "global_batch_tokens", "evaluate_tokens", "save_tokens"):  # the same steps of longer rows
        lines = [line.partition(" = ") for line in path.read_text().splitlines(keepends=True)]
        path.write_text("".join(f"{key} = {int(line[2]) * 4}\n" if line[0] == key else "".join(line) for line in lines))
    return write_model(path, LONG, ROPE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Documents of a few tokens to several rows."""
    root = tmp_path_factory.mktemp("documents")
    for source in ("slimpajama", "starcoderdata"):
        for split, documents in (("train", 150), ("validation", 12)):
            texts = [made_up_text(len(source) * 1000 + number, 3 + number % 40 * 3) for number in range(documents)]
            meta = {"meta": {"redpajama_set_name": "RedPajamaC4"}}
            lines = [json.dumps({"text": text, "content": text} | meta) for text in texts]
            path = root / "raw" / source / split / "part.jsonl"
            path.parent.mkdir(parents=True)
            path.write_text("\n".join(lines))
        prepare(Preparation(source, root / "raw" / source, source_format(source), tokenizer.path, root / "data"))
    return root / "data"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of rows of 32 tokens, concatenated, in which every token sees its whole row."""
    root = tmp_path_factory.mktemp("parent")
    recipe = write_model(write_recipe(root / "short.toml", STEPS, save_every=STEPS), SHORT)
    finished = pretrain(recipe, write_deepspeed_config(root / "ds.json", 1, 4), data, root / "run", 1)
    assert finished.returncode == 0, finished.stderr
    return root / "run"


def test_a_context_is_extended_stopped_resumed_and_resharded(parent: Path, data: Path, tmp_path: Path) -> None:
    recipe = write_extension(tmp_path / "long.toml")
    config = write_deepspeed_config(tmp_path / "ds.json", 3, micro_batch=2)
    whole = pretrain(recipe, config, data, tmp_path / "whole", 1, "--init-from", str(parent))
    assert whole.returncode == 0, whole.stderr
    assert (
        ": rope_theta 10000 -> 100000, rope_scaling none -> yarn x4, max_position_embeddings 32 -> 128\n"
        in whole.stdout
    )
    for name, ranks in (("same", 1), ("resharded", 2)):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        stop_after(tmp_path / name, STOP)
        arguments = ("--init-from", str(parent), "--resume", "must")
        resumed = pretrain(recipe, config, data, tmp_path / name, ranks, *arguments)
        assert resumed.returncode == 0, resumed.stderr
        assert f"resumed at step {STOP} " in resumed.stdout
        for figure in ("Train/Loss", "Train/GradNorm", "Validation/Loss/slimpajama", "Tokens/starcoderdata"):
            found, expected = (read_series(tmp_path / run, figure) for run in (name, "whole"))
            assert found == (expected if ranks == 1 else pytest.approx(expected, rel=1e-5)), figure
    found, expected = (tensors_of(find_checkpoints(tmp_path / run)[-1]) for run in ("same", "whole"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_a_branch_and_a_resume_cannot_change_the_rotation(parent: Path, data: Path, tmp_path: Path) -> None:
    recipe = write_model(write_recipe(tmp_path / "short.toml", STEPS, save_every=STEPS), SHORT, "rope_theta = 5.0")
    config = write_deepspeed_config(tmp_path / "ds.json", 1, 4)
    finished = pretrain(recipe, config, data, parent, 1)
    assert "model.rope_theta is 10000.0 there and 5.0 now" in finished.stderr
    assert "cannot be changed on resume" in finished.stderr
    branch = Options(str(recipe), config, data, tmp_path / "branch", branch_from=parent)
    with pytest.raises(ConfigError, match=r"model\.rope_theta is 10000\.0 there and 5\.0 now"):
        resolve_run(branch, 1, "cpu", bf16=False)


# --- parity with documents one by one ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    root = tmp_path_factory.mktemp("resolved")
    recipe = write_extension(root / "long.toml")
    config = write_deepspeed_config(root / "ds.json", 1, micro_batch=4)
    return resolve_run(Options(str(recipe), config, data, root / "run"), 1, "cpu", bf16=False)


def alone(model: LlamaForCausalLM, stream: PackedStream, row: int) -> Iterator[torch.Tensor]:
    """Token losses of each document of a row by plain cross-entropy, without document ids, mask or padding."""
    for start, length, continues in stream.rows(LONG).of(row):
        tokens = torch.from_numpy(stream.read(start, length + continues).astype("i8"))
        if len(tokens) > 1:
            yield torch.nn.functional.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")


def test_rows_have_the_losses_of_their_documents_one_by_one(run: Run) -> None:
    """In the batches of a whole run, to 1e-5; and as the targets that the step's loss is divided by."""
    model, kinds = build_model(run.model, "sdpa", seed=1), set()
    streams = open_streams(run.options.data, run.recipe.sources, "train", run.model.vocab_size, "best_fit")
    for step in RunPlan(run.recipe).steps(0):
        positions = np.arange(step.first_position, step.first_position + step.batch)
        batch = read_batch(run, positions, DistributedInfo(0, 0, 1, CPU))
        assert batch.num_targets == count_targets(run, step)
        inputs, labels, document_ids = batch.model_inputs(CPU)
        with torch.no_grad():
            found = model(inputs, labels, document_ids, reduction="none").view(labels.shape)
            assert (found[labels == IGNORE_INDEX] == 0).all()
            located = run.data.order.locate(positions)
            for number, (source, sample) in enumerate(zip(located.source, located.sample, strict=True)):
                stream = streams[run.data.order.sources[source]]
                assert isinstance(stream, PackedStream)
                expected = list(alone(model, stream, int(sample)))
                row = found[number][labels[number] != IGNORE_INDEX]
                torch.testing.assert_close(row, torch.cat(expected), rtol=1e-5, atol=1e-5)
                kinds.add((len(expected) > 1, sum(map(len, expected)) + len(expected) < LONG))
    assert kinds >= {(True, True), (False, False)}, "several documents and padding; a piece that fills its row"
