"""Damaged recipes and hostfiles: read, or rejected in one sentence that names the file."""

from pathlib import Path

from hypothesis import given
from mutating import mutations, returns_or_refuses

from tinyllama_ds.config.recipe import RECIPE_DIRECTORY, load_recipe
from tinyllama_ds.config.run_plan import RunPlan, micro_batches_of
from tinyllama_ds.launch.hostfile import filter_hosts, read_hostfile, write_filter

RECIPE = (
    (RECIPE_DIRECTORY / "tinyllama-v1.1-math-code.toml").read_bytes()
    + b"""
[guard]
spike_policy = "rollback"
spike_window = 64
spike_sigmas = 8.5
max_rollbacks = 1
[samples]
prompts = ["Once", "def"]
every_tokens = 640
new_tokens = 5
[evaluation]
tasks = ["commonsense", "mine.yaml"]
every_tokens = 640
limit = 9
batch_size = 4
data_dir = "sets"
"""
)
HOSTS = b"# two machines and one by its address\nnode-1.lab slots=8\n\nnode2 slots=8\n10.0.0.2 slots=4\n"


@given(content=mutations(RECIPE))
def test_a_damaged_recipe(content: bytes) -> None:
    returns_or_refuses(read_plan, content, "mine.toml")


def read_plan(path: Path) -> None:
    """What a launch works out first: a value that is accepted can be planned with, in no time."""
    plan = RunPlan(load_recipe(str(path)))
    plan.step(plan.total_steps - 1)
    micro_batches_of(plan, 1)


@given(content=mutations(HOSTS))
def test_a_damaged_hostfile(content: bytes) -> None:
    returns_or_refuses(read_filter, content, "hosts")


def read_filter(path: Path) -> None:
    hosts = read_hostfile(path)
    assert filter_hosts(hosts, write_filter(hosts), None) == hosts
