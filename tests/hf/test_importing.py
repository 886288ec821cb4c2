"""Hugging Face folders become model folders with the same logits, or are refused with the file and the key."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hf_folders import write_hf_folder
from safetensors.torch import load_file, save_file

from tinyllama_ds.cli import main
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED, ConfigError
from tinyllama_ds.hf.convert import ExportOptions, export, hf_tokenizer
from tinyllama_ds.hf.import_model import import_hf_folder, read_config
from tinyllama_ds.hf.model_folder import ModelFolder, open_model_folder, verify_model_folder
from tinyllama_ds.model.config import MODEL_SIZES, Llama3Scaling, LlamaConfig, YarnScaling
from tinyllama_ds.model.llama import assign_weights, build_model, empty_model

GROUPED = MODEL_SIZES["test"]
SHAPES = {
    "grouped": GROUPED,
    "multi-head": LlamaConfig(512, 48, 100, 3, 4, 4, 64),
    "one key head": LlamaConfig(512, 96, 64, 1, 6, 1, 64, rms_norm_eps=1e-6, rope_theta=500.0),
    "interpolated": replace(GROUPED, rope_scaling_factor=4.0),
    "tied": replace(GROUPED, tie_word_embeddings=True, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 32), head_dim=32),
    "yarn": replace(GROUPED, rope_scaling=YarnScaling(4.0, 32, mscale=0.7, mscale_all_dim=0.5, truncate=False)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def as_transformers_4_wrote_it(folder: Path) -> None:
    """The rope at the top level, the dtype under its old name, without key heads where there are as many as heads."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = {"type": kind} | rope if kind != "default" else None
    raw["torch_dtype"] = raw.pop("dtype")
    if raw["num_key_value_heads"] == raw["num_attention_heads"]:
        del raw["num_key_value_heads"]
    path.write_text(json.dumps(raw))


def logits_of(folder: ModelFolder, ids: torch.Tensor) -> torch.Tensor:
    model = empty_model(folder.model, "eager")
    assign_weights(model, {name: tensor.float() for name, tensor in folder.tensors()})
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    ("shape", "dtype", "form"),
    [
        *((shape, torch.float32, "safetensors") for shape in SHAPES),
        *(("grouped", dtype, "safetensors shards") for dtype in DTYPES),
    ],
)
def test_imported_logits_equal_transformers(
    shape: str, dtype: torch.dtype, form: str, version: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = write_hf_folder(tmp_path / "hf", SHAPES[shape], tokenizer, dtype, "100KB" if "shards" in form else "5GB")
    if version == 4:
        as_transformers_4_wrote_it(folder)
    imported = import_hf_folder(folder, tmp_path / "ours")
    opened = open_model_folder(tmp_path / "ours")
    verify_model_folder(opened)
    assert (imported.model, imported.dtype) == (opened.model, opened.dtype) == (SHAPES[shape], dtype)
    ids = torch.randint(512, (2, 60), generator=torch.Generator().manual_seed(3))
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits_of(opened, ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["50GB", "100KB"])
@pytest.mark.parametrize("name", ["interpolated", "tied"])
def test_export_and_import_are_inverse(
    name: str, dtype: torch.dtype, size: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Ours to theirs to ours, and theirs to ours to theirs: the same bits, shapes and tokenizer."""
    shape = SHAPES[name]
    weights = {name: tensor.to(dtype) for name, tensor in build_model(shape, "eager", seed=1).named_parameters()}
    export(weights.items(), shape, tokenizer, tmp_path / "hf", ExportOptions(max_shard_size=size))
    import_hf_folder(tmp_path / "hf", tmp_path / "ours")
    ours = open_model_folder(tmp_path / "ours")
    assert (ours.model, ours.dtype, ours.tokenizer.sha256) == (shape, dtype, tokenizer.sha256)
    found = dict(ours.tensors())
    assert found.keys() == weights.keys()
    assert all(found[name].dtype == dtype and torch.equal(found[name], weights[name]) for name in weights)

    import_hf_folder(tmp_path / "hf", tmp_path / "ours again")
    assert open_model_folder(tmp_path / "ours again").files == ours.files
    export(ours.tensors(), ours.model, ours.tokenizer, tmp_path / "again", ExportOptions(max_shard_size=size))
    files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


# As it lies beside TinyLlama's released weights, written by transformers 4.31.
RELEASED = """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 2048,
"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false,
"torch_dtype": "float32", "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}"""


def test_the_released_description_is_tinyllama(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(RELEASED)
    assert read_config(path) == MODEL_SIZES["tinyllama-1.1b"]
    path.write_text(RELEASED.replace('"rope_scaling": null', '"rope_scaling": {"type": "linear", "factor": 4}')
                    .replace('embeddings": 2048', 'embeddings": 8192'))  # fmt: skip
    assert read_config(path) == MODEL_SIZES["tinyllama-1.1b-8k"]


def test_both_copies_of_a_tied_table_may_be_there(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "hf", SHAPES["tied"], tokenizer)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, lambda held: held.update({"lm_head.weight": table.clone()}))
    import_hf_folder(folder, tmp_path / "ours")
    assert "lm_head.weight" not in dict(open_model_folder(tmp_path / "ours").tensors())


def test_a_padded_vocabulary_is_kept(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows beyond the tokenizer's pieces come in and go out like all others, and are reported."""
    folder = write_hf_folder(tmp_path / "hf", replace(GROUPED, vocab_size=576), tokenizer)
    assert main(["import", str(folder), str(tmp_path / "ours")]) == EXIT_FINISHED
    assert "; 64 rows of the vocabulary are padding, which no text uses" in capsys.readouterr().out
    ours = open_model_folder(tmp_path / "ours")
    export(ours.tensors(), ours.model, ours.tokenizer, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert len(after["lm_head.weight"]) == 576


def test_buffers_that_old_versions_stored_are_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = write_hf_folder(tmp_path / "hf", GROUPED, tokenizer)
    edit_tensors(folder, lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    import_hf_folder(folder, tmp_path / "ours")
    assert len(dict(open_model_folder(tmp_path / "ours").tensors())) == 21


def edit_tensors(folder: Path, edit: Callable[[dict], object]) -> None:
    held = load_file(folder / "model.safetensors")
    edit(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, *absent: str, **changes: object) -> None:
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key not in absent}
    path.write_text(json.dumps(raw | changes))


def edit_index(folder: Path, file: str) -> None:
    """The index says that the first tensor is in another file."""
    path = folder / "model.safetensors.index.json"
    raw = json.loads(path.read_text())
    raw["weight_map"][min(raw["weight_map"])] = file
    path.write_text(json.dumps(raw))


def spoil_tokenizer_json(folder: Path, edit: Callable[[dict], object]) -> None:
    hf_tokenizer(load_tokenizer(folder / "tokenizer.model"), 128).save_pretrained(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    edit(raw)
    (folder / "tokenizer.json").write_text(json.dumps(raw))


class Trap:
    """What a pickle can do to whoever loads it as one."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("trapped"),)


def trap(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, folder / "pytorch_model.bin")


NORM = "model.norm.weight"
ADDED = {"id": 512, "content": "<|im_end|>"}
CONFIG_CASES: dict[str, tuple[dict, str]] = {
    "architecture": (
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        'config.json: 2 problems: (1) model_type is "mistral"; expected "llama"',
    ),
    "head": (
        {"architectures": ["LlamaForSequenceClassification"]},
        'config.json: architectures is ["LlamaForSequenceClassification"]; expected "LlamaForCausalLM"',
    ),
    "tied": (
        {"tie_word_embeddings": True},
        "model.safetensors: lm_head.weight differs from model.embed_tokens.weight, and config.json has tie_word_embedd",
    ),
    "attention bias": ({"attention_bias": True}, "config.json: attention_bias is true; expected false"),
    "mlp bias": ({"mlp_bias": True}, "config.json: mlp_bias is true; expected false"),
    "activation": ({"hidden_act": "gelu"}, 'config.json: hidden_act is "gelu"; expected "silu"'),
    "code": ({"auto_map": {"AutoModel": "m.M"}}, 'config.json: auto_map is {"AutoModel": "m.M"}; expected null'),
    "quantized": ({"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}; expected null'),
    "end of text": ({"eos_token_id": 0}, "config.json: eos_token_id is 0; expected 2"),
    "head size": ({"head_dim": 32}, "layers.0.self_attn.q_proj.weight has the shape [64, 64]; expected [128, 64]"),
    "rope": (
        {"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4}},
        """config.json: rope_parameters.rope_type is "longrope"; expected 'default', 'linear', 'llama3' or 'yarn'""",
    ),
    "old rope": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        """config.json: rope_scaling.type is "dynamic"; expected 'default', 'linear', 'llama3' or 'yarn'""",
    ),
    "incomplete rope": (
        {"rope_scaling": {"type": "llama3", "factor": 2.0}},
        "expected low_freq_factor and high_freq_factor with the type llama3",
    ),
    "rope factor": (
        {"rope_scaling": {"type": "linear", "factor": 0.5}},
        "config.json: rope_scaling_factor 0.5 must be 1 or more",
    ),
    "no size": ({"hidden_size": None}, "config.json: hidden_size is null; expected a whole number"),
    "no epsilon": ({"rms_norm_eps": "1e-5"}, 'config.json: rms_norm_eps is "1e-5"; expected a number'),
    "heads": ({"num_attention_heads": 3}, "config.json: hidden_size 64 must be a multiple of num_attention_heads 3"),
    "vocabulary": (
        {"vocab_size": 500},
        "tokenizer.model: has 512 pieces, but the model's vocabulary is 500; expected 512",
    ),
}
FOLDER_CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: the description of a Hugging Face"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "hf: holds no weights; expected model.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "hf: holds no tokenizer; expected tokenizer.model or"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.model").write_bytes(b"?"), "tokenizer.model: not a sentencepiece"),
    "other pieces": (
        lambda f: spoil_tokenizer_json(f, lambda raw: raw["added_tokens"].append(raw["added_tokens"][0] | ADDED)),
        "tokenizer.json: its pieces are not those of",
    ),
    "other merges": (
        lambda f: spoil_tokenizer_json(f, lambda raw: raw["model"]["merges"].reverse()),
        "tokenizer.json: its ids of ",
    ),
    "untied without a head": (
        lambda f: edit_tensors(f, lambda held: held.pop("lm_head.weight")),
        "tensor lm_head.weight is missing; expected the 21 of a Llama decoder with the shapes of config.json, where",
    ),
    "missing tensor": (
        lambda f: edit_tensors(f, lambda held: held.pop(NORM)),
        f"model.safetensors: the tensor {NORM} is missing; expected the 21 of a Llama decoder",
    ),
    "biases": (
        lambda f: edit_tensors(f, lambda held: held.update({"model.layers.0.mlp.up_proj.bias": torch.ones(176)})),
        "model.safetensors: the tensor model.layers.0.mlp.up_proj.bias is not expected",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda held: held.update({NORM: torch.ones(65)})),
        f"model.safetensors: {NORM} has the shape [65]; expected [64]",
    ),
    "wrong dtype": (
        lambda f: edit_tensors(f, lambda held: held.update({NORM: torch.ones(64).half()})),
        f"model.safetensors: {NORM} is float16; expected float32",
    ),
    "not finite": (
        lambda f: edit_tensors(f, lambda held: held[NORM].fill_(float("nan"))),
        f"model.safetensors: {NORM} holds values that are not finite",
    ),
    "cut short": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]),
        "model.safetensors: not a whole safetensors file",
    ),
    "code in a pickle": (trap, "pytorch_model.bin: weights in PyTorch's format are not read, as they can run code"),
    "pickled shards": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model-00001-of-00002.bin"),
        "pytorch_model-00001-of-00002.bin: weights in PyTorch's format are not read, as they can run code; convert the",
    ),
}  # fmt: skip
SHARD_CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda f: max(f.glob("model-*")).unlink(),
        "-of-00006.safetensors: this shard is missing, model.safetensors.index.json names it",
    ),
    "elsewhere": (
        lambda f: edit_index(f, "../secret.safetensors"),
        "weight_map names '../secret.safetensors'; expected the plain name of a file beside it",
    ),
    "another shard": (
        lambda f: edit_index(f, "model-00003-of-00006.safetensors"),
        "model-00003-of-00006.safetensors: does not hold lm_head.weight, which",
    ),
    "no index": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        "model.safetensors.index.json: not an index of shards with a weight_map",
    ),
}


def refuse(folder: Path, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused with the sentence, and nothing is there that was not."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as error:
        import_hf_folder(folder, tmp_path / "ours")
    assert sentence in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["tied", "multi-head"])
def test_some_layers_are_the_model_without_the_others(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shape = replace(SHAPES[name], num_hidden_layers=5)
    folder = write_hf_folder(tmp_path / "hf", shape, tokenizer)
    imported = import_hf_folder(folder, tmp_path / "draft", layers=[0, 2, 4])
    opened = open_model_folder(tmp_path / "draft")
    verify_model_folder(opened)
    assert imported.model == opened.model == replace(shape, num_hidden_layers=3)
    assert opened.tokenizer.sha256 == tokenizer.sha256
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    for number in (3, 1):
        del theirs.model.layers[number]
    ids = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(3))
    expected = theirs(ids, use_cache=False).logits
    torch.testing.assert_close(logits_of(opened, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", ["0,5", "2,1", "1,1", "", "0,,1", "-1", "a"])
def test_wrong_layers_are_rejected(
    layers: str, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = replace(SHAPES["multi-head"], num_hidden_layers=5)
    folder = write_hf_folder(tmp_path / "hf", shape, tokenizer)
    try:
        code = main(["import", str(folder), str(tmp_path / "draft"), f"--layers={layers}"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == EXIT_CONFIG
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"--layers .*: expected numbers (with commas|in rising order from 0 to 4)", error)
    assert not (tmp_path / "draft").exists()


@pytest.mark.parametrize("case", CONFIG_CASES)
def test_other_models_are_rejected(
    case: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_hf_folder(tmp_path / "hf", GROUPED, tokenizer)
    changes, sentence = CONFIG_CASES[case]
    edit_json(folder / "config.json", **changes)
    refuse(folder, sentence, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", FOLDER_CASES)
def test_damaged_folders_are_rejected(
    case: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_hf_folder(tmp_path / "hf", GROUPED, tokenizer)
    spoil, sentence = FOLDER_CASES[case]
    spoil(folder)
    refuse(folder, sentence, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", SHARD_CASES)
def test_damaged_shards_are_rejected(
    case: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_hf_folder(tmp_path / "hf", GROUPED, tokenizer, max_shard_size="100KB")
    spoil, sentence = SHARD_CASES[case]
    spoil(folder)
    refuse(folder, sentence, tmp_path, monkeypatch)


def test_the_command_imports_once_and_rejects_with_78(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder lacks the tokenizer that the weights were trained with, until it is given."""
    folder = write_hf_folder(tmp_path / "hf", GROUPED, tokenizer, torch.bfloat16)
    (folder / "tokenizer.model").rename(tmp_path / "right.model")
    arguments = ["import", str(folder), str(tmp_path / "ours"), "--json"]
    capsys.readouterr()  # transformers' bar
    assert main(arguments) == EXIT_CONFIG
    said = capsys.readouterr().err.splitlines()
    assert [f"{folder}: holds no tokenizer; expected" in line for line in said] == [True]
    arguments += ["--tokenizer", str(tmp_path / "right.model")]
    assert main(arguments) == EXIT_FINISHED
    result = json.loads(capsys.readouterr().out)
    assert (result["dtype"], result["model"]) == ("bfloat16", GROUPED.to_dict())
    assert result["largest_logit_difference"] < 1e-5
    assert main(arguments) == EXIT_CONFIG
    assert "ours: already exists; expected a new folder" in capsys.readouterr().err
    assert main(["generate", str(tmp_path / "ours"), "the small", "--max-new-tokens", "3"]) == EXIT_FINISHED
    assert capsys.readouterr().out.startswith("the small")
