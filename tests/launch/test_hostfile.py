"""The hostfile: stricter than DeepSpeed's, and DeepSpeed reads the same hosts from what passes."""

from pathlib import Path

import pytest

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.launch.hostfile import Host, filter_hosts, read_hostfile, write_filter

EXAMPLES = sorted(path for path in (Path(__file__).parents[2] / "hostfiles").iterdir() if path.suffix != ".md")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_read_as_deepspeed_reads_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(path)) == {host.name: host.slots for host in read_hostfile(path)}


def test_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two machines\n\nnode-1.lab  slots=8\n10.0.0.2 slots=4\n")
    assert read_hostfile(path) == [Host("node-1.lab", 8), Host("10.0.0.2", 4)]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("node2", "'node2' is not of the form 'host slots=N'"),
        ("node2 slots=", "is not of the form"),
        ("node2 slots=two", "is not of the form"),
        ("node2 slots=8 extra", "is not of the form"),
        ("node2 slots=0", "slots=0; expected the number of GPUs of node2"),
        ("node1 slots=4", "node1 is listed twice"),
        ("-oProxyCommand=id slots=8", "neither a host name nor an IPv4 address"),
        ("node[1-9] slots=8", "neither a host name"),
        ("a,b slots=8", "neither a host name"),
        ("^file slots=8", "neither a host name"),
        ("rsh:node slots=8", "neither a host name"),
        ("$(id) slots=8", "neither a host name"),
        ("node2;id slots=8", "neither a host name"),
        ("300.1.1.1 slots=8", "neither a host name"),
        ("node_2 slots=8", "neither a host name"),
        ("node2- slots=8", "neither a host name"),
    ],
)
def test_bad_lines_are_named_by_their_number(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"node1 slots=8\n{line}\n")
    with pytest.raises(ConfigError) as error:
        read_hostfile(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert sentence in str(error.value)


@pytest.mark.parametrize("slots", ["1025", "1000000000000", 5000 * "9", "007000"])
def test_no_host_has_so_many_slots(slots: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"node1 slots={slots}\n")
    with pytest.raises(
        ConfigError, match=r"hosts:1: slots=[179].*; expected the number of GPUs of node1, from 1 to 1024"
    ) as r:
        read_hostfile(path)
    assert len(str(r.value)) < 300


def test_all_bad_lines_are_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("node1 slots=8\nnode2\n\nnode1 slots=8\nnode3 slots=0\n")
    with pytest.raises(ConfigError) as error:
        read_hostfile(path)
    assert str(error.value) == (
        f"{path}: 3 problems: (1) line 2: 'node2' is not of the form 'host slots=N'; (2) line 4: node1 is listed twice;"
        " give each host one line with all its slots; (3) line 5: slots=0; expected the number of GPUs of node3, from 1"
        " to 1024"
    )


@pytest.mark.parametrize(
    "content",
    [b"node1 slots=8\r\nnode2 slots=08\r\n", b"node1 slots=8\rnode2 slots=8", b"node1\x0cslots=8\nnode2 slots=8"],
)
def test_lines_end_as_they_do_for_deepspeed(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hosts"
    path.write_bytes(content)
    assert read_hostfile(path) == [Host("node1", 8), Host("node2", 8)]
    assert fetch_hostfile(str(path)) == {"node1": 8, "node2": 8}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"# caf\xe9\nnode1 slots=8\n", "hosts:1: byte 0xe9 is not UTF-8; expected the hostfile in UTF-8"),
        ("node1 slots=8\n".encode("utf-16"), "hosts:1: byte 0xff is not UTF-8"),
        ("node1 slots=8\n".encode("utf-8-sig"), "hosts:1: begins with a byte order mark; expected UTF-8 without one"),
        ("node1 slots=8\u2028node2 slots=8\n".encode(), "hosts:1: .* is not of the form 'host slots=N'"),
        (None, "hosts: is a directory; expected the hostfile, which is a file"),
        (17 * 2**20 * b"#", "hosts: is larger than 16 MiB, which is too long for the hostfile"),
    ],
)
def test_other_files_are_rejected(content: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        read_hostfile(path)


def test_missing_and_empty_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the hostfile is missing"):
        read_hostfile(tmp_path / "hosts")
    (tmp_path / "hosts").write_text("# nobody\n")
    with pytest.raises(ConfigError, match="has no hosts"):
        read_hostfile(tmp_path / "hosts")


POOL = [Host("node1", 2), Host("node2", 4)]


@pytest.mark.parametrize(
    ("include", "exclude"),
    [("node1", None), ("node2:0,2", None), ("node2:3@node1", None), (None, "node1"), (None, "node2:1,0@node1:1")],
)
def test_filters_choose_what_deepspeed_chooses(
    include: str | None, exclude: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    wanted = parse_inclusion_exclusion({host.name: host.slots for host in POOL}, include or "", exclude or "")
    chosen = filter_hosts(POOL, include, exclude)
    assert {host.name: list(host.devices or range(host.slots)) for host in chosen} == dict(wanted)
    again = parse_inclusion_exclusion({host.name: host.slots for host in POOL}, write_filter(chosen), "")
    assert dict(again) == dict(wanted)


@pytest.mark.parametrize(
    ("include", "exclude", "sentence"),
    [
        ("node3", None, "node3 is not in the hostfile; expected one of node1, node2"),
        ("node1:2", None, "node1 has no slot 2; expected 0 to 1"),
        ("node1:", None, "'node1:' is not of the form"),
        ("node1:0-1", None, "is not of the form"),
        ("node1,node2", None, "node1,node2 is not in the hostfile"),
        ("node1@@node2", None, "'' is not of the form"),
        (None, "node1@node2", "excludes all GPUs"),
        ("node1", "node2", "were both given"),
    ],
)
def test_bad_filters_are_rejected(include: str | None, exclude: str | None, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        filter_hosts(POOL, include, exclude)
