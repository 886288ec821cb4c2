"""The `config.json` of published Llamas as their publishers have them, with keys of training and of the tokenizer."""

LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": True,
    "vocab_size": 49152,
}  # fmt: skip
TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 2048,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
    "torch_dtype": "float32", "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
OPEN_LLAMA_3B = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 3200, "initializer_range": 0.02, "intermediate_size": 8640, "max_position_embeddings": 2048,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 26, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
FAMILY: dict[str, tuple[dict, int]] = {  # with the number of parameters
    "SmolLM2-135M": (SMOLLM2_135M, 134_515_008),
    "SmolLM2-360M": (
        SMOLLM2_135M | {"hidden_size": 960, "initializer_range": 0.02, "intermediate_size": 2560,
                        "num_attention_heads": 15, "num_hidden_layers": 32, "num_key_value_heads": 5},
        361_821_120,
    ),
    "SmolLM2-1.7B": (
        SMOLLM2_135M | {"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
                        "num_attention_heads": 32, "num_hidden_layers": 24, "num_key_value_heads": 32,
                        "rope_theta": 130000},
        1_711_376_384,
    ),
    "Llama-3.2-1B": (LLAMA_3_2_1B, 1_235_814_400),
    "Llama-3.2-3B": (
        LLAMA_3_2_1B | {"head_dim": 128, "hidden_size": 3072, "num_attention_heads": 24, "num_hidden_layers": 28},
        3_212_749_824,
    ),
    "TinyLlama-1.1B": (TINYLLAMA, 1_100_048_384),
    "OpenLLaMA-3B": (OPEN_LLAMA_3B, 3_426_473_600),
}  # fmt: skip
