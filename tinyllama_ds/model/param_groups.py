"""Parameters in groups of the same settings, for an optimizer; with muP the rules of the decoder's are in them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Settings:
    """What a parameter has in place of the optimizer's own."""

    lr_multiplier: float = 1.0
    weight_decay: float | None = None  # None: the optimizer's own
    weight_decay_multiplier: float = 1.0
    is_muons: bool = False  # DeepSpeed would divide a group into Muon's matrices and what Adam trains


def group_parameters(
    parameters: "Iterable[tuple[str, nn.Parameter]]",
    width_multiplier: float,
    settings: Mapping[str, Settings] = {},
    has_muon: bool = False,
) -> "dict[Settings, list[nn.Parameter]]":
    """A decoder's named parameters by their settings, of which some have their own; Muon's matrices come first.

    With muP the hidden matrices of a model m times as wide as its base have 1 / m of the learning rate, and m times the
    weight decay, which AdamW multiplies by it: as `MuAdamW` of the package mup.
    """
    groups = defaultdict(list)
    for name, parameter in parameters:
        own = settings.get(name, Settings())
        if is_hidden_matrix(name, parameter):
            own = replace(
                own,
                lr_multiplier=own.lr_multiplier / width_multiplier,
                weight_decay_multiplier=width_multiplier,
                is_muons=has_muon,
            )
        groups[own].append(parameter)
    return dict(sorted(groups.items(), key=lambda item: not item[0].is_muons))


def is_hidden_matrix(name: str, parameter: "nn.Parameter") -> bool:
    """Whether a parameter is a block's matrix: neither the embeddings, nor the LM head, nor a norm."""
    return name.startswith("model.layers.") and parameter.dim() == 2
