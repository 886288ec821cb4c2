"""The variables that are forwarded to other hosts, as DeepSpeed reads them."""

import json
from pathlib import Path

import pytest

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.files import read_secret
from tinyllama_ds.launch.environment import (
    check_argument,
    forward_secrets,
    forwarded,
    is_secret,
    named_secrets,
    read_user_files,
    runner_environment,
)


@pytest.fixture(autouse=True)
def empty_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working directory without a .deepspeed_env."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DS_ENV_FILE", raising=False)
    return tmp_path


def test_only_the_allow_list_is_forwarded() -> None:
    environment = {
        "NCCL_DEBUG": "INFO", "PATH": "/usr/bin", "HF_HOME": "/cache", "EDITOR": "vi", "CUDA_VISIBLE_DEVICES": "0",
        "HF_TOKEN": "hf_1", "WANDB_API_KEY": "1", "TOKENIZERS_PARALLELISM": "false", "TORCH_LOGS": "",
    }  # fmt: skip
    assert forwarded(environment, [], "pdsh") == {
        "NCCL_DEBUG": "INFO", "PATH": "/usr/bin", "HF_HOME": "/cache", "TOKENIZERS_PARALLELISM": "false"
    }  # fmt: skip
    assert "WANDB_API_KEY" not in forwarded(environment, ["WANDB_API_KEY"], "pdsh")
    assert named_secrets(environment, ["WANDB_API_KEY", "HF_HOME"]) == {"WANDB_API_KEY": "1"}


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "MLFLOW_TRACKING_TOKEN", "KEY"])
def test_secrets_never_reach_a_command_line(name: str, tmp_path: Path) -> None:
    """They are not forwarded; those that are named go through a file that only this user can read."""
    assert is_secret(name)
    assert runner_environment({name: "x", "A": "b"}, []) == {"A": "b"}
    assert runner_environment({name: "x"}, [name]) == {}
    (tmp_path / ".deepspeed_env").write_text(f"{name}=y\n")
    assert forwarded({}, [], "pdsh") == {}
    assert named_secrets({}, []) == {name: "y"}
    assert named_secrets({name: '$"x'}, [name]) == {name: '$"x'}
    forward_secrets(tmp_path / "secrets", {name: "x"})
    assert json.loads(read_secret(tmp_path / "secrets")) == {name: "x"}
    forward_secrets(tmp_path / "secrets", {})
    assert not (tmp_path / "secrets").exists()
    assert not is_secret("TOKENIZERS_PARALLELISM")
    assert not is_secret("MONKEY")


MACHINE = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "KMP_AFFINITY": "compact", "MKL_NUM_THREADS": "1",
           "MALLOC_MMAP_MAX_": "0", "GOMP_CPU_AFFINITY": "0"}  # fmt: skip


@pytest.mark.parametrize("name", MACHINE)
def test_settings_for_this_machine_are_forwarded_only_if_named(name: str, tmp_path: Path) -> None:
    assert forwarded(MACHINE, [], "pdsh") == {}
    assert runner_environment(MACHINE, []) == {}
    assert forwarded(MACHINE, [name], "pdsh") == runner_environment(MACHINE, [name]) == {name: MACHINE[name]}
    (tmp_path / ".deepspeed_env").write_text(f"{name}=x\n")
    assert forwarded(MACHINE, [], "pdsh") == {name: "x"}


def test_the_users_file_is_forwarded_and_may_have_comments(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("# ours\n\nNCCL_SOCKET_IFNAME=ib0\nMY_OPTION=a=b\n")
    assert read_user_files() == {"NCCL_SOCKET_IFNAME": "ib0", "MY_OPTION": "a=b"}
    assert forwarded({"NCCL_SOCKET_IFNAME": "eth0"}, [], "pdsh")["NCCL_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize("line", ["export A=b", "A", "1A=b", "=b"])
def test_a_bad_line_of_the_users_file_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text(f"A=b\n{line}\n")
    with pytest.raises(ConfigError, match=r"\.deepspeed_env:2: "):
        read_user_files()


@pytest.mark.parametrize(
    ("launcher", "value", "passes"),
    [
        ("pdsh", "two words; and more", True), ("pdsh", 'a "quote"', False), ("pdsh", "$HOME", False),
        ("pdsh", "100%h", False), ("pdsh", "a\nb", False), ("pdsh", "`id`", False), ("pdsh", "a\\b", False),
        ("openmpi", "a:b,c=d", True), ("openmpi", "two words", False), ("slurm", "a,b", False), ("slurm", "a:b", True),
    ],
)  # fmt: skip
def test_a_value_arrives_or_is_rejected(launcher: str, value: str, passes: bool) -> None:
    if passes:
        assert forwarded({"NCCL_X": value}, [], launcher) == {"NCCL_X": value}
        return
    with pytest.raises(ConfigError, match="NCCL_X: its value"):
        forwarded({"NCCL_X": value}, [], launcher)
    assert forwarded({"PATH": value}, [], launcher) == {}, "other hosts have a PATH of their own"


def test_a_named_variable_must_be_set() -> None:
    with pytest.raises(ConfigError, match="--forward-env NOPE: is not set"):
        forwarded({}, ["NOPE"], "pdsh")


def test_arguments_that_a_remote_shell_would_change_are_rejected() -> None:
    check_argument("/data/two words", "pdsh")
    check_argument("/data/$x", "openmpi")
    for argument in ("/data/$x", "/data/a;b", "/data/`id` x", "/data/%h", "/data/it's"):
        with pytest.raises(ConfigError, match="a remote shell would change it"):
            check_argument(argument, "pdsh")
