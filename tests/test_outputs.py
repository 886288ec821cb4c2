"""Whether an output can be written is asked before the work, and what cannot be written leaves nothing."""

import os
from pathlib import Path

import pytest

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.outputs import check_file, check_folder, check_picture, reporting_write_errors, write_file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    return tmp_path


def everything(place: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in place.rglob("*"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no/such/page.html", "cannot be written: the directory .*/no/such is missing"),
        ("file/page.html", "cannot be written: .*/file is not a directory"),
        ("folder", "is a directory; expected the name of a file to write"),
        (".", "is a directory; expected the name of a file to write"),
        (300 * "x", "cannot be written: File name too long"),
        (240 * "x", "cannot be written: File name too long"),  # with what stands before it while it is written
        ("/proc/page.html", "cannot be written: "),
    ],
)
def test_a_file_that_cannot_be_written_is_rejected(name: str, sentence: str, place: Path) -> None:
    before = everything(place)
    with pytest.raises(ConfigError, match=sentence):
        check_file(place / name)
    assert everything(place) == before


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("file", "cannot be written: .*/file is not a directory"),
        ("file/below/it", "cannot be written: .*/file is not a directory|Not a directory"),
        ("/proc/folder", "cannot be written: "),
        (300 * "x", "cannot be written: File name too long"),
    ],
)
def test_a_folder_that_cannot_be_written_is_rejected(name: str, sentence: str, place: Path) -> None:
    before = everything(place)
    with pytest.raises(ConfigError, match=sentence):
        check_folder(place / name)
    assert everything(place) == before


def test_storage_without_write_permission_is_rejected(place: Path) -> None:
    """Root may write everywhere but on what is mounted read-only or belongs to the kernel, as /proc above."""
    if os.geteuid() == 0:
        pytest.skip("root needs no permission")
    (place / "folder").chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
        check_file(place / "folder" / "page.html")


def test_what_can_be_written_passes(place: Path) -> None:
    (place / "link").symlink_to(place / "file")
    (place / "forward").symlink_to(place / "later")
    before = everything(place)
    for name in ("new", "file", "folder/new", "link", "forward", "/dev/null"):
        check_file(place / name)
    for name in ("folder", "new/and/below", "."):
        check_folder(place / name)
    check_picture(place / "a.PNG")
    assert everything(place) == before


@pytest.mark.parametrize("name", ["a", "a.xyz", "a.png.gz", ".png"])
def test_the_suffix_of_a_picture_is_its_format(name: str, place: Path) -> None:
    with pytest.raises(ConfigError, match="is not the name of a picture; expected one that ends with .png, .svg, "):
        check_picture(place / name)


def test_links_are_followed_and_devices_stay(place: Path) -> None:
    (place / "link").symlink_to("file")
    write_file(place / "link", "new")
    assert (place / "link").is_symlink()
    assert (place / "file").read_text() == "new"
    write_file(Path("/dev/null"), "away")
    assert Path("/dev/null").is_char_device()


def test_text_that_is_not_unicode_is_written_all_the_same(place: Path) -> None:
    write_file(place / "page", "run\udcff")
    assert (place / "page").read_text() == r"run\udcff"


def test_a_full_disk_leaves_the_old_file(small_disk) -> None:  # type: ignore[no-untyped-def]
    disk = small_disk(64 * 1024)
    (disk / "page").write_text("old")
    with pytest.raises(ConfigError, match="page: cannot be written: No space left on device"):
        write_file(disk / "page", bytes(100 * 1024))
    assert (disk / "page").read_text() == "old"
    assert [path.name for path in disk.iterdir()] == ["page"]


def test_errors_of_rust_are_the_systems() -> None:
    with (
        pytest.raises(ConfigError, match="hf: cannot be written: No space left on device"),
        reporting_write_errors(Path("hf")),
    ):
        raise Exception("Error while serializing: No space left on device (os error 28)")  # noqa: TRY002
    with pytest.raises(KeyError), reporting_write_errors(Path("hf")):
        raise KeyError("mine")
