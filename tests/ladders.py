"""Ladders of small models for tests."""

import json
from pathlib import Path

from launching import write_deepspeed_config, write_recipe

KEYS = {"recipe": "large.toml", "deepspeed_config": "ds.json", "depths": [1, 2, 3, 4], "tokens": [2560, 5120, 10_240]}


def write_ladder(folder: Path, keys: dict | None = None, **changes: object) -> Path:
    """Next to a recipe of the model `test`, two layers of 64, and a DeepSpeed JSON."""
    write_recipe(folder / "large.toml", 100, save_every=50)
    write_deepspeed_config(folder / "ds.json", 1, micro_batch=2)
    path = folder / "mine.toml"
    chosen = {key: value for key, value in ((keys or KEYS) | changes).items() if value is not None}
    path.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in chosen.items()))
    return path
