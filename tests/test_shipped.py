"""Configs and hostfiles that travel with the package are found by name from any directory."""

from pathlib import Path

import pytest

from tinyllama_ds.commands.arguments import Parser, deepspeed_config
from tinyllama_ds.config.deepspeed import load_deepspeed_config
from tinyllama_ds.errors import ConfigError
from tinyllama_ds.launch.hostfile import read_hostfile
from tinyllama_ds.shipped import shipped_config, shipped_hostfile

ROOT = Path(__file__).parents[1]


def test_every_shipped_file_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = sorted((ROOT / "ds_configs").glob("*.json"))
    assert len(configs) > 10
    for path in configs:
        assert load_deepspeed_config(shipped_config(path.stem)) == load_deepspeed_config(path)
    assert [host.slots for host in read_hostfile(shipped_hostfile("a100_2x8"))] == [8, 8]


def test_a_file_of_the_users_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("zero1").mkdir()  # a run directory, say
    assert shipped_config("zero1").is_file()
    Path("zero3").write_text("{}")
    assert shipped_config("zero3") == Path("zero3")
    assert shipped_config("configs/mine.json") == Path("configs/mine.json")
    assert shipped_hostfile("hosts.txt") == Path("hosts.txt")


def test_an_unknown_name_is_answered_by_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ConfigError, match="hostfile 'hosts' is unknown; the shipped ones are a100_16x4, .*, or give a path$"
    ):
        shipped_hostfile("hosts")
    parser = Parser()
    parser.add_argument("--deepspeed-config", type=deepspeed_config)
    with pytest.raises(SystemExit):
        parser.parse_args(["--deepspeed-config", "zero4"])
    assert "--deepspeed-config: DeepSpeed config 'zero4' is unknown; the shipped ones are" in capsys.readouterr().err
