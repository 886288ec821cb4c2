"""`optimizer.param_groups`: what a user may get wrong, and which parameters are in which group."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tinyllama_ds.config.deepspeed import load_deepspeed_config
from tinyllama_ds.config.param_groups import assign_settings, check_optimizer
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.hf.weights import parameter_shapes
from tinyllama_ds.model.config import Mup, model_config
from tinyllama_ds.planning.plan import read_inputs

NAMES = list(parameter_shapes(model_config("test")))


def optimizer(*groups: object) -> dict:
    return {"type": "AdamW", "params": {}, "param_groups": list(groups)}


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([], "optimizer.param_groups is []; expected a list of groups in braces, each with params"),
        ([3], "optimizer.param_groups is [3]; expected a list of groups"),
        ([{"weight_decay": 0.0}], "line 5: the key 'optimizer.param_groups[0].params' is missing"),
        ([{"params": [], "weight_decay": 0}], "optimizer.param_groups[0].params is []; expected at least 1 entry"),
        ([{"params": ["*"], "weight_decay": -1}], "param_groups[0].weight_decay is -1; expected 0.0 or more"),
        ([{"params": ["*"], "lr_multiplier": 0}], "param_groups[0].lr_multiplier is 0; expected a positive number"),
        ([{"params": ["*"], "lr_multiplier": "2"}], 'param_groups[0].lr_multiplier is "2"; expected a number'),
        ([{"params": ["*"], "lr_mult": 2}], "unknown key 'optimizer.param_groups[0].lr_mult'; did you mean"),
        ([{"params": ["*norm*"]}], "the group of '*norm*' changes nothing; expected weight_decay or lr_multiplier"),
    ],
)
def test_mistakes_are_named(groups: list, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": optimizer(*groups), "zero_optimization": {"stage": 1}}, indent=1))
    with pytest.raises(ConfigError) as raised:
        load_deepspeed_config(path)
    assert sentence in str(raised.value)
    assert str(raised.value).startswith(f"{path}: ")


def test_patterns_are_globs_over_whole_names() -> None:
    groups = [{"params": ["*norm*", "model.embed_tokens.weight"], "weight_decay": 0.0}]
    found = assign_settings(NAMES, optimizer(*groups, {"params": ["*.[qk]_proj.weight"], "lr_multiplier": 2}))
    assert len(found) == 5 + 1 + 4
    assert {found[name].weight_decay for name in found if "norm" in name or "embed" in name} == {0.0}
    assert {found[name].lr_multiplier for name in found if "_proj" in name} == {2}
    assert assign_settings(NAMES, {"type": "AdamW"}) == {}


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        (
            [{"params": ["*norm*", "embed_tokens"], "weight_decay": 0}],
            "optimizer.param_groups[0]: the pattern 'embed_tokens' matches no parameter; expected one over names such"
            " as model.embed_tokens.weight",
        ),
        (
            [{"params": ["*norm*"], "weight_decay": 0}, {"params": ["model.norm.weight"], "weight_decay": 1}],
            "optimizer.param_groups[1]: model.norm.weight is in optimizer.param_groups[0] as well; expected one group",
        ),
    ],
)
def test_a_pattern_matches_and_a_parameter_is_in_one_group(groups: list, sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        assign_settings(NAMES, optimizer(*groups))
    assert str(raised.value).startswith(sentence)


def test_a_plan_rejects_what_a_run_would(tmp_path: Path) -> None:
    """Groups of parameters that the recipe's model does not have."""
    path = tmp_path / "ds.json"
    config = {"optimizer": optimizer({"params": ["*.layers.22.*"], "lr_multiplier": 2}), "zero_optimization": {}}
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as raised:
        read_inputs("tinyllama-v1", path)
    assert str(raised.value).startswith(f"{path}: optimizer.param_groups[0]: the pattern '*.layers.22.*' matches no")


def test_muon_has_no_rules_of_mup() -> None:
    model = replace(model_config("test"), mup=Mup(32))
    check_optimizer({"type": "AdamW"}, model, Path("ds.json"))
    with pytest.raises(ConfigError, match=r"ds.json: optimizer.type is Muon; the recipe's table \[mup\] has the rules"):
        check_optimizer({"type": "Muon"}, model, Path("ds.json"))
