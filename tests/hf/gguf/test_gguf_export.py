"""GGUF files read by others: the gguf package's reader with its own dequantisation, and transformers' loader."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import fast_folders
import jinja2
import pytest
import torch
import transformers
from gguf import GGUFReader, dequantize
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tinyllama_ds.cli import main
from tinyllama_ds.data.chat import chat_template
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.errors import EXIT_CONFIG, EXIT_FINISHED, ConfigError
from tinyllama_ds.hf.convert import hf_config
from tinyllama_ds.hf.gguf import export as gguf_export
from tinyllama_ds.hf.gguf.comparison import SampleText
from tinyllama_ds.hf.gguf.export import GgufModel, GgufResult, export_gguf
from tinyllama_ds.hf.model_folder import write_model_folder
from tinyllama_ds.model.config import MODEL_SIZES, Llama3Scaling, LlamaConfig, YarnScaling
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model

TEST = MODEL_SIZES["test"]
TIED = replace(TEST, vocab_size=640, head_dim=32, tie_word_embeddings=True, rope_theta=100_000.0)  # and padded
LLAMA_3 = replace(TEST, rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 32))
YARN = replace(TEST, rope_scaling=YarnScaling(4.0, 32))
SHARP = replace(TEST, rope_scaling=YarnScaling(4.0, 32, attention_factor=1.5))
CONFIGS = {"plain": TEST, "tied": TIED, "linear": replace(TEST, rope_scaling_factor=4.0), "llama3": LLAMA_3}
PARAMETERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
TOLERANCE = {"f16": 5e-3, "q8_0": 0.1, "q4_0": 1.0}  # of logits, relative to the largest


def trained(config: LlamaConfig) -> LlamaForCausalLM:
    """Weights large enough that differences show."""
    model = build_model(config, "eager", seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return model


def exported(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path, kind: str, chat: bool = False) -> GgufResult:
    windows = [torch.randint(0, 500, (65,), generator=torch.Generator().manual_seed(number)) for number in range(3)]
    described = GgufModel("llama of tests", model.config, model.state_dict(), tokenizer, chat)
    return export_gguf(described, kind, output, SampleText("numbers", windows))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(fast_folders.smollm2(tmp_path_factory.mktemp("bpe")))


def transformers_model(reader: GGUFReader, config: LlamaConfig) -> transformers.LlamaForCausalLM:
    """With the tensors of a file, whose pairs of rows of queries and keys are neighbours."""
    state = {}
    for found in reader.tensors:
        *block, kind, _ = found.name.split(".")
        if kind == "rope_freqs":
            continue
        tensor = torch.from_numpy(dequantize(found.data, found.tensor_type).copy())
        if kind in ("attn_q", "attn_k"):
            tensor = torch.cat([torch.cat([head[0::2], head[1::2]]) for head in tensor.split(config.head_dim)])
        state[f"{f'model.layers.{block[1]}.' if block else ''}{PARAMETERS[kind]}.weight"] = tensor
    model = transformers.LlamaForCausalLM(hf_config(config, torch.float32))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if config.tie_word_embeddings else [], [])
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("case", CONFIGS)
def test_the_file_holds_the_model(case: str, kind: str, tokenizer: Tokenizer, bpe: Tokenizer, tmp_path: Path) -> None:
    """transformers' decoder with the dequantised tensors has our logits, and the result says how near."""
    config = CONFIGS[case]
    model = trained(config)
    result = exported(model, bpe if case == "tied" else tokenizer, tmp_path / "m.gguf", kind)
    theirs = transformers_model(GGUFReader(tmp_path / "m.gguf"), config)
    ids = torch.randint(0, 500, (65,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = theirs(ids[None]).logits[0]
        difference = relative(logits, model(ids[None])[0])
        loss = torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:]).item()
    assert difference < TOLERANCE[kind]
    comparison = result.comparison
    assert comparison.largest_logit_difference == pytest.approx(difference, rel=0.3, abs=1e-4)
    assert comparison.gguf_loss == pytest.approx(loss, rel=0.1)
    assert comparison.tokens == 3 * 64
    assert abs(comparison.gguf_loss - comparison.loss) < 6 * comparison.loss_error + 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_transformers_loads_the_file_itself(kind: str, bpe: Tokenizer, tmp_path: Path) -> None:
    """Model and tokenizer: the logits of ours, and the same ids of every piece."""
    from tinyllama_ds.data.tokenizers.vocabulary import difference_of

    model = trained(TIED)
    exported(model, bpe, tmp_path / "m.gguf", kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.arange(64)[None]
    with torch.no_grad():
        assert relative(theirs(ids).logits, model(ids)) < TOLERANCE[kind]
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert difference_of(loaded.backend_tokenizer, bpe) is None
    assert (loaded.bos_token_id, loaded.eos_token_id) == (bpe.bos_id, bpe.eos_id)


def fields(path: Path) -> dict:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def test_the_description(tokenizer: Tokenizer, tmp_path: Path) -> None:
    exported(trained(TEST), tokenizer, tmp_path / "m.gguf", "q8_0")
    found = fields(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "llama",
        "general.name": "llama of tests",
        "general.file_type": 7,
        "llama.context_length": 128,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 176,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 512,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def test_which_tensors_are_quantised(tokenizer: Tokenizer, bpe: Tokenizer, tmp_path: Path) -> None:
    """Norms never, the LM head with 8 bits; 176 is not a multiple of 32."""
    result = exported(trained(TEST), tokenizer, tmp_path / "m.gguf", "q4_0")
    found = types(tmp_path / "m.gguf")
    assert result.kept == 2
    assert {name.split(".")[-2]: kind for name, kind in found.items()} == {
        "token_embd": "Q4_0", "attn_norm": "F32", "attn_q": "Q4_0", "attn_k": "Q4_0", "attn_v": "Q4_0",
        "attn_output": "Q4_0", "ffn_norm": "F32", "ffn_gate": "Q4_0", "ffn_up": "Q4_0", "ffn_down": "F16",
        "output_norm": "F32", "output": "Q8_0",
    }  # fmt: skip
    exported(trained(TIED), bpe, tmp_path / "tied.gguf", "q4_0")
    assert types(tmp_path / "tied.gguf")["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in types(tmp_path / "tied.gguf")


def test_llama_3s_rotation_is_a_tensor(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Of the factors that transformers' frequencies are divided by."""
    exported(trained(LLAMA_3), tokenizer, tmp_path / "m.gguf", "f16")
    [factors] = [tensor.data for tensor in GGUFReader(tmp_path / "m.gguf").tensors if "rope_freqs" in tensor.name]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](hf_config(LLAMA_3, torch.float32), "cpu")
    plain = 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / torch.from_numpy(factors.copy()), scaled)
    assert factors[0] == 1
    assert factors[-1] == 8


@pytest.mark.parametrize("config", [YARN, SHARP], ids=["its factor", "another factor"])
def test_yarns_attention_factor(config: LlamaConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """llama.cpp has transformers' factor once it has multiplied by its own."""
    exported(trained(config), tokenizer, tmp_path / "m.gguf", "f16")
    found = fields(tmp_path / "m.gguf")
    keys = ("type", "factor", "original_context_length")
    assert [found[f"llama.rope.scaling.{key}"] for key in keys] == ["yarn", 4.0, 32]
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](hf_config(config, torch.float32), "cpu")
    assert found["llama.rope.scaling.attn_factor"] * (1 + 0.1 * math.log(4)) == pytest.approx(factor)


def test_the_chat_template_is_ours(bpe: Tokenizer, tmp_path: Path) -> None:
    """Without the tags that only transformers has."""
    exported(trained(TIED), bpe, tmp_path / "m.gguf", "f16", chat=True)
    template = jinja2.Template(fields(tmp_path / "m.gguf")["tokenizer.chat_template"])
    turns = [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Ho"}]
    loaded = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe.to_fast(), eos_token="<|endoftext|>", chat_template=chat_template(bpe)
    )
    for prompt in (False, True):
        rendered = template.render(messages=turns, eos_token="<|endoftext|>", add_generation_prompt=prompt)
        assert rendered == loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)


def test_weights_that_differ_are_rejected_and_leave_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that is stored with rows in the order of ours."""
    write = gguf_export.to_gguf
    monkeypatch.setattr(gguf_export, "to_gguf", lambda name, *rest: write(name.replace("q_proj", ""), *rest))
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj\.weight differs from the model's by"):
        exported(trained(TEST), tokenizer, tmp_path / "m.gguf", "q4_0")
    assert not list(tmp_path.iterdir())


def test_a_rotation_that_llama_cpp_lacks_is_rejected(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = replace(TEST, rope_scaling=YarnScaling(4.0, 32, beta_fast=16.0))
    with pytest.raises(ConfigError, match="beta_fast 32, beta_slow 1 and truncate true only; the model has 16, 1"):
        exported(trained(config), tokenizer, tmp_path / "m.gguf", "f16")


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    write_model_folder(path, trained(TEST).state_dict().items(), TEST, tokenizer)
    return path


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("the small llama reads a token and writes a shard. " * 40)
    output = tmp_path / "m.gguf"
    arguments = ["export", str(folder), str(output), "--gguf", "q8_0", "--text", str(tmp_path / "text.txt")]
    assert main([*arguments, "--json"]) == EXIT_FINISHED
    found = json.loads(capsys.readouterr().out)
    assert (found["type"], found["bytes"]) == ("q8_0", output.stat().st_size)
    assert found["gguf_perplexity"] == pytest.approx(found["perplexity"], rel=0.02)
    assert found["text"] == str(tmp_path / "text.txt")
    assert fields(output)["general.name"] == "model"

    assert main(arguments) == EXIT_CONFIG
    assert f"{output}: already exists; expected the name of a new file" in capsys.readouterr().err
    output.unlink()
    assert main(arguments) == EXIT_FINISHED
    printed, err = capsys.readouterr()
    assert "q8_0, 0.2 MB" in printed
    assert f"perplexity {found['perplexity']:.4f} -> {found['gguf_perplexity']:.4f}, " in printed
    assert "2 tensors are in f16" in err


def test_without_the_package(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["export", str(folder), str(tmp_path / "m.gguf"), "--gguf", "f16"]) == EXIT_CONFIG
    assert "pip install 'tinyllama_ds[gguf]'" in capsys.readouterr().err
