"""Writes docs/configs.md from the tables of `tinyllama_ds/config/deepspeed_keys.toml`."""

from pathlib import Path

from tinyllama_ds.config.deepspeed_keys import Key, key_tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configs.md"
_HEAD = """# Keys of a DeepSpeed configuration

Made by `python scripts/write_config_table.py` from `tinyllama_ds/config/deepspeed_keys.toml`; a test walks the classes
of DeepSpeed 0.19.8 and fails for a key that is in none of the three tables. The shipped files are described in
[ds_configs/README.md](../ds_configs/README.md).

`pretrain` checks all keys and values, and then starts DeepSpeed's engine once with a small model, before anything is
launched: all problems of a file are listed at once, with exit code 78. A rejected key may stay if it is off
(`false`, or a section with `"enabled": false`), as other programs write it, unless DeepSpeed has it on by default.
A key without effect at the ZeRO stage of the file gives a warning, so that a stage can be changed in one line.
`tinyllama_ds.rank.pretrain` under a bare launcher checks keys and values alike; the engine's start is `pretrain`'s.
"""


def page() -> str:
    """The text of docs/configs.md."""
    keys = key_tables()
    supported = _accepted("Supported", _SUPPORTED, keys.supported)
    warned = _accepted("Passed on with a warning", _WARNED, keys.warned)
    optimizers = _optimizers(keys.supported["optimizer.type"])
    return "\n".join([_HEAD, *supported, *optimizers, *warned, *_rejected(keys.rejected)])


_SUPPORTED = (
    "Tests train eight steps with each of these and compare the curve with that of the same stage without it, or with\n"
    "PyTorch's optimizer (`tests/integration/test_key_effects.py`)."
)
_OPTIMIZERS = """Each name that DeepSpeed has, in any case. Tests train with the accepted ones at ZeRO stages 0 to 3,
on one rank and on two, and compare each loss with that of a plain loop, to 1e-5 in fp32
(`tests/integration/test_optimizers.py`). DeepSpeed takes any
other class of `torch.optim` too; those are rejected, since none is tested under ZeRO. What Muon is:
[training.md](training.md#muon).

| optimizer | equal to, or why it is rejected |
| --- | --- |"""
_WARNED = "Passed to DeepSpeed unchanged, because their effect depends on the machine; `pretrain` prints this once."


def _accepted(title: str, text: str, keys: dict[str, Key]) -> list[str]:
    rows = [
        f"| `{full}` | {key.expectation} | {', '.join(map(str, key.stages))} | {key.effect} |"
        for full, key in keys.items()
    ]
    return [f"## {title}\n\n{text}\n", "| key | value | stages | effect |", "| --- | --- | --- | --- |", *rows, ""]


def _optimizers(key: Key) -> list[str]:
    rows = [f"| {name} | {what} |" for name, what in key.names.items()]
    rows += [f"| {name} | rejected: it {why} |" for name, why in key.rejected.items()]
    return [f"## Optimizers\n\n{_OPTIMIZERS}", *rows, ""]


def _rejected(keys: dict[str, str]) -> list[str]:
    rows = [f"| `{full}` | {reason} |" for full, reason in keys.items()]
    text = "A section takes all its keys with it.\n"
    return ["## Rejected\n", text, "| key | why, and what to use |", "| --- | --- |", *rows, ""]


if __name__ == "__main__":
    PAGE.write_text(page())
