"""llama.cpp's own converter, out of a package of the Python registry that has its sources (`--real`)."""

import subprocess
import sys
from pathlib import Path

from launching import TIMEOUT
from registry import unpacked

PACKAGE = "llama-cpp-python==0.3.36"  # not built


def unpack_converter(folder: Path) -> Path:
    """The sources of llama.cpp; skips the test where the registry cannot be reached."""
    return unpacked(folder, PACKAGE) / PACKAGE.replace("-", "_").replace("==", "-") / "vendor" / "llama.cpp"


def convert(sources: Path, hf: Path, gguf: Path, dtype: str = "f32") -> Path:
    """A GGUF file from a Hugging Face folder."""
    command = [sys.executable, sources / "convert_hf_to_gguf.py", hf, "--outfile", gguf, "--outtype", dtype]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert finished.returncode == 0, finished.stderr
    return gguf
