"""What doctor finds on this machine alone, without root and without ssh."""

import json
from pathlib import Path

from launching import tinyllama_ds

from tinyllama_ds.errors import EXIT_REFUSED
from tinyllama_ds.launch.probe import code_digest, data_digest


def test_this_machine_alone_is_green(tmp_path: Path) -> None:
    finished = tinyllama_ds("doctor", "--quick", "--json", "--run-dir", tmp_path / "run")
    result = json.loads(finished.stdout)
    assert finished.returncode == 0, result
    assert {finding["host"] for finding in result["findings"]} == {"this machine"}
    assert result["hosts"]["this machine"]["code"] == code_digest()


def test_a_missing_data_directory_is_red(tmp_path: Path) -> None:
    finished = tinyllama_ds("doctor", "--quick", "--data", tmp_path / "nothing")
    assert finished.returncode == EXIT_REFUSED
    assert f"RED data           this machine: {tmp_path / 'nothing'} is missing" in finished.stdout


def test_the_hash_sees_every_manifest_and_size(tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"shard{suffix}").write_text("{}")
    digests = [data_digest(tmp_path)]
    (tmp_path / "shard.bin").write_text("{} ")
    digests.append(data_digest(tmp_path))
    (tmp_path / "shard.json").write_text("[]")
    digests.append(data_digest(tmp_path))
    assert len({digest["digest"] for digest in digests}) == 3
    (tmp_path / "shard.idx").unlink()
    assert "or its .idx is missing" in data_digest(tmp_path)["error"]
