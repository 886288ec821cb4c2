"""The decoder against transformers' LlamaForCausalLM with the same weights, in fp32."""

import math
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers

from tinyllama_ds.hf.convert import hf_config, hf_model
from tinyllama_ds.model.config import MODEL_SIZES, Llama3Scaling, LlamaConfig, RopeScaling, YarnScaling
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model, initialize_weights
from tinyllama_ds.model.rope import apply_rope, rope_tables

TOLERANCE = 1e-5
SHAPES = {
    "grouped": LlamaConfig(97, 64, 176, 2, 8, 2, 64),
    "multi-head": LlamaConfig(97, 48, 100, 3, 4, 4, 64),
    "one key head": LlamaConfig(50, 96, 64, 1, 6, 1, 64),
    "other rope and eps": LlamaConfig(97, 64, 176, 2, 4, 2, 64, rms_norm_eps=1e-3, rope_theta=500.0),
    "interpolated": LlamaConfig(97, 64, 176, 2, 4, 2, 64, rope_scaling_factor=4.0),
    "tied": LlamaConfig(97, 64, 176, 2, 4, 2, 64, tie_word_embeddings=True),
    "narrow heads": LlamaConfig(97, 64, 176, 2, 4, 2, 64, head_dim=8),
    "yarn": LlamaConfig(97, 64, 176, 2, 4, 2, 64, rope_scaling=YarnScaling(4.0, 16)),
    "yarn with all its keys": LlamaConfig(
        97, 64, 176, 2, 4, 2, 64, rope_scaling=YarnScaling(4.0, 16, None, 8.0, 2.0, 0.7, 0.9, truncate=False)
    ),
    "yarn with sharper attention": LlamaConfig(97, 64, 176, 2, 4, 2, 64, rope_scaling=YarnScaling(4.0, 16, 1.5)),
    "tied, with wide heads and Llama 3's rotation": LlamaConfig(
        97, 64, 176, 2, 4, 2, 64, rope_theta=500.0, head_dim=32, tie_word_embeddings=True,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 16),
    ),
}  # fmt: skip


def twins(config: LlamaConfig) -> tuple[LlamaForCausalLM, transformers.LlamaForCausalLM]:
    """Our model and transformers' with copies of its weights, large enough that differences show."""
    ours = build_model(config, "sdpa", seed=1)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return ours, hf_model({name: tensor.detach().clone() for name, tensor in ours.named_parameters()}, config)


@pytest.mark.parametrize("length", [1, 7, 33, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_equal_transformers(shape: str, length: int) -> None:
    ours, theirs = twins(SHAPES[shape])
    tokens = torch.randint(SHAPES[shape].vocab_size, (3, length + 1), generator=torch.Generator().manual_seed(3))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    expected = theirs(inputs).logits
    torch.testing.assert_close(ours(inputs), expected, rtol=TOLERANCE, atol=TOLERANCE)

    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    loss = ours(inputs, labels)
    torch.testing.assert_close(loss, expected_loss, rtol=TOLERANCE, atol=0)
    expected_loss.backward()
    loss.backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, their_gradients[name], rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("shape", ["grouped", "tied"])
def test_parameter_names_are_hugging_faces(shape: str) -> None:
    ours, theirs = twins(SHAPES[shape])
    assert {name: p.shape for name, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


@pytest.mark.parametrize("name", MODEL_SIZES)
def test_parameter_counts_of_named_sizes(name: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(MODEL_SIZES[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == MODEL_SIZES[name].num_parameters


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_once(shape: str) -> None:
    model = build_model(SHAPES[shape], "sdpa", seed=1)
    assert sum(parameter.numel() for parameter in model.parameters()) == SHAPES[shape].num_parameters


# Shapes of the family, from their config.json.
tied = partial(LlamaConfig, tie_word_embeddings=True)
FAMILY = {
    "SmolLM2-135M": (tied(49_152, 576, 1536, 30, 9, 3, 8192), 134_515_008),
    "SmolLM2-360M": (tied(49_152, 960, 2560, 32, 15, 5, 8192), 361_821_120),
    "SmolLM2-1.7B": (tied(49_152, 2048, 8192, 24, 32, 32, 8192), 1_711_376_384),
    "Llama-3.2-1B": (tied(128_256, 2048, 8192, 16, 32, 8, 131_072), 1_235_814_400),
    "Llama-3.2-3B": (tied(128_256, 3072, 8192, 28, 24, 8, 131_072), 3_212_749_824),
    "OpenLLaMA-3B": (LlamaConfig(32_000, 3200, 8640, 26, 32, 32, 2048), 3_426_473_600),
}


@pytest.mark.parametrize("name", FAMILY)
def test_published_parameter_counts_of_the_family(name: str) -> None:
    config, parameters = FAMILY[name]
    assert config.num_parameters == parameters
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_published_numbers_of_tinyllama() -> None:
    config = MODEL_SIZES["tinyllama-1.1b"]
    assert config.num_parameters == 1_100_048_384
    assert config.num_matmul_parameters == 1_034_420_224
    assert config.flops_per_token(2048) == pytest.approx(7.313e9, rel=2e-4)
    assert MODEL_SIZES["tinyllama-120m"].num_parameters == 121_129_728


def test_rope_rotates_exactly_at_far_positions_in_bf16() -> None:
    """Against a rotation of complex numbers in double precision: one rounding to bf16 is all the error there is."""
    config = replace(SHAPES["grouped"], max_position_embeddings=8192)
    x = torch.randn(1, 8192, 2, config.head_dim, generator=torch.Generator().manual_seed(4)).bfloat16()
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(8192, half).double(), torch.outer(torch.arange(8192).double(), frequencies))
    rotated = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn[:, None]
    expected = torch.cat((rotated.real, rotated.imag), dim=-1)
    found = apply_rope(x, *rope_tables(config, 8192, x.device)).double()
    # an angle of 8192 radians carries fp32's own rounding of half a thousandth
    assert ((found - expected).abs() <= expected.abs() * 2**-8 + 5e-3).all()
    assert (found - expected).norm() / expected.norm() < 2**-8


def test_interpolation_is_transformers_to_the_last_position() -> None:
    """8,192 positions divided by 4, as in TinyLlama's code model: the tables are those of linear rope scaling."""
    config = replace(MODEL_SIZES["tinyllama-1.1b-8k"], num_hidden_layers=1)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf_config(config, torch.float32))
    expected = rotary(torch.zeros(1), torch.arange(8192)[None])
    for found, table in zip(rope_tables(config, 8192, torch.device("cpu")), expected, strict=True):
        torch.testing.assert_close(found, table[0], rtol=0, atol=1e-5)
    plain = rope_tables(MODEL_SIZES["tinyllama-1.1b"], 2048, torch.device("cpu"))
    scaled = rope_tables(config, 8192, torch.device("cpu"))
    assert all(torch.equal(a, b[::4]) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize(
    "scaling",
    [
        Llama3Scaling(32.0, 1.0, 4.0, 8192),  # Llama 3.2's
        YarnScaling(4.0, 32_768),
        YarnScaling(40.0, 4096, None, 32.0, 1.0, 0.707, 0.5),
    ],
)
def test_rotations_are_transformers_to_the_last_position(scaling: RopeScaling) -> None:
    """At 131,072 positions a relative error of one rounding is visible."""
    config = LlamaConfig(97, 256, 176, 1, 4, 2, 131_072, rope_theta=5e5, rope_scaling=scaling)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(hf_config(config, torch.float32))
    expected = rotary(torch.zeros(1), torch.arange(131_072)[None])
    for found, table in zip(rope_tables(config, 131_072, torch.device("cpu")), expected, strict=True):
        torch.testing.assert_close(found, table[0], rtol=0, atol=1e-5)


def test_initialisation_is_tinyllamas() -> None:
    config = LlamaConfig(1000, 256, 512, 4, 4, 2, 64)
    model = build_model(config, "sdpa", seed=5)
    small = 1 / math.sqrt(256) / 4
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all()
            continue
        expected = small if name.endswith(("o_proj.weight", "down_proj.weight")) else math.sqrt(0.4 / 256)
        assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
        assert abs(parameter.mean().item()) < expected / 50, name


def test_initialisation_depends_on_the_seed_alone() -> None:
    first, again, other = (build_model(SHAPES["grouped"], "sdpa", seed) for seed in (1, 1, 2))
    torch.rand(10)
    initialize_weights(again, 1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_give_the_same_gradients(every: int) -> None:
    config = SHAPES["other rope and eps"]
    plain, recomputed = (build_model(config, "sdpa", 1, recompute_every) for recompute_every in (0, every))
    tokens = torch.randint(config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(3))
    for model in (plain, recomputed):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    for (name, parameter), twin in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(parameter.grad, twin.grad), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_with_segments_logits_of_a_packed_document_are_those_of_it_alone(device: str) -> None:
    """The segments stay in host memory, also where the model is on a GPU."""
    config = SHAPES["grouped"]
    model = twins(config)[0].to(device)
    tokens = torch.randint(config.vocab_size, (1, 40), generator=torch.Generator().manual_seed(3)).to(device)
    document_ids = torch.tensor([[0] * 13 + [1] * 27])
    packed = model(tokens, document_ids=document_ids)
    torch.testing.assert_close(packed[:, :13], model(tokens[:, :13]), rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(packed[:, 13:], model(tokens[:, 13:]), rtol=TOLERANCE, atol=TOLERANCE)
    assert not torch.allclose(model(tokens)[:, 13:], packed[:, 13:])


def test_a_model_made_in_bf16_has_the_bits_of_one_rounded_to_it() -> None:
    """What DeepSpeed would do with a model in fp32, without one in host memory."""
    rounded = build_model(SHAPES["grouped"], "sdpa", seed=1).bfloat16()
    made = build_model(SHAPES["grouped"], "sdpa", seed=1, dtype=torch.bfloat16)
    for (name, expected), found in zip(rounded.named_parameters(), made.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_building_holds_one_parameter_in_host_memory() -> None:
    """On the device `meta`, which takes no memory, nothing but one fp32 parameter at a time is allocated elsewhere."""
    held: list[weakref.ref] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type == "cpu" and out.numel() > 1:
                held.append(weakref.ref(out))
            alive = {id(tensor) for ref in held if (tensor := ref()) is not None}
            assert len(alive) <= 1, "two at once"
            return out

    with Watch():
        build_model(SHAPES["grouped"], "sdpa", seed=1, device="meta")
    assert len({id(ref) for ref in held}) > 10
