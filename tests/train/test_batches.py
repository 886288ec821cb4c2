"""Batches of packs: a conversation has the loss and gradient in a pack that it has alone."""

import numpy as np
import pytest
import torch
from chats import SEQUENCE_LENGTH as T
from chats import conversations, prepare_chat, write_records

from tinyllama_ds.data.chat import Message, conversation_ids
from tinyllama_ds.data.packing import ConversationStream, open_stream
from tinyllama_ds.data.tokenizers.abstract import Tokenizer
from tinyllama_ds.distributed.world import DistributedInfo
from tinyllama_ds.model.config import MODEL_SIZES
from tinyllama_ds.model.llama import LlamaForCausalLM, build_model
from tinyllama_ds.model.loss import IGNORE_INDEX
from tinyllama_ds.train.batches import Batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> ConversationStream:
    root = tmp_path_factory.mktemp("chat")
    write_records(root / "raw" / "a.jsonl", [{"messages": messages} for messages in conversations()])
    prepare_chat(root / "raw", tokenizer.path, root / "data")
    stream = open_stream(root / "data" / "chat" / "train")
    assert isinstance(stream, ConversationStream)
    return stream


def batch_of(stream: ConversationStream, indices: list[int]) -> Batch:
    return Batch(
        *(
            torch.from_numpy(np.stack([part(index, T) for index in indices]).astype(dtype))
            for part, dtype in ((stream.sample, "i8"), (stream.document_ids, "i4"), (stream.loss_mask, "?"))
        )
    )


def masks_by_ids(tokenizer: Tokenizer) -> dict[tuple, list[int]]:
    """Which tokens of each conversation are answers, from the messages and not from the shard."""
    found = {}
    for messages in conversations():
        for turns in range(len(messages)):
            ids, assistant_mask = conversation_ids(tokenizer, [Message(**message) for message in messages[: turns + 1]])
            found[tuple(ids)] = assistant_mask
    return found


def gradient(model: LlamaForCausalLM, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("attention", ["eager", "sdpa", "blocked"])
def test_a_pack_trains_as_its_conversations_alone(
    stream: ConversationStream, tokenizer: Tokenizer, attention: str
) -> None:
    model = build_model(MODEL_SIZES["test"], attention, seed=1)
    masks = masks_by_ids(tokenizer)
    indices = list(range(stream.num_samples(T)))[-4:]  # the packs of the shortest, several in each
    assert min(len(stream.documents(index, T)) for index in indices) > 1
    batch = batch_of(stream, indices)
    alone: list[torch.Tensor] = []
    for index in indices:
        for ids in stream.documents(index, T):
            tokens, assistant_mask = torch.from_numpy(ids.astype("i8")), torch.tensor(masks[tuple(ids.tolist())])
            losses = torch.nn.functional.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")
            alone += losses[assistant_mask[1:] == 1]
    assert batch.num_targets == len(alone)
    found, expected = model(*batch.model_inputs(CPU)), torch.stack(alone).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(gradient(model, found), gradient(model, expected), rtol=1e-4, atol=1e-7)


def test_labels_are_the_tokens_that_count(stream: ConversationStream) -> None:
    batch = batch_of(stream, [0, 1])
    inputs, labels, document_ids = batch.model_inputs(CPU)
    assert torch.equal(inputs, batch.tokens[:, :-1])
    assert torch.equal(document_ids, batch.document_ids)
    counts = labels != IGNORE_INDEX
    assert torch.equal(counts, batch.loss_mask)
    assert torch.equal(labels[counts], batch.tokens[:, 1:][counts])


def test_without_conversations_every_label_counts() -> None:
    batch = Batch(torch.arange(22).view(2, 11))
    inputs, labels = batch.model_inputs(CPU)
    assert batch.num_targets == 20
    assert torch.equal(labels, inputs + 1)


def test_parts_of_sequences_are_the_whole(stream: ConversationStream) -> None:
    """Two ranks that share sequences have all inputs, labels and predictions between them, and whole document ids."""
    teacher = torch.arange(4 * T * 3).view(4, T, 3), torch.randn(4, T, 4)
    whole = batch_of(stream, [0, 1, 2, 3])._replace(teacher=teacher)
    worlds = [DistributedInfo(rank, rank, 4, CPU, sequence_parallel=2) for rank in range(4)]
    assert [(world.data_rank, world.sequence_rank, world.data_size) for world in worlds] == [
        (0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2),
    ]  # fmt: skip
    parts = [whole._replace(own=world.own_tokens(T)) for world in worlds[2:]]
    assert sum(part.num_targets for part in parts) == whole.num_targets
    inputs, labels, document_ids, predicted = whole.model_inputs(CPU)
    found = [part.model_inputs(CPU) for part in parts]
    assert torch.equal(torch.cat([part[0] for part in found], dim=1), inputs)
    assert torch.equal(torch.cat([part[1] for part in found], dim=1), labels)
    assert all(torch.equal(part[2], document_ids) for part in found)
    for number, tensor in enumerate(predicted):
        assert torch.equal(torch.cat([part[3][number] for part in found], dim=1), tensor)
