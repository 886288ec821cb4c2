"""llama.cpp's own server, as a package of the Python registry has it, or a `llama-server` of yours (`--real`)."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

from launching import TIMEOUT
from smollm import unpacked

from tinyllama_ds.distributed.network import free_port

LLAMA_SERVER = "TINYLLAMA_DS_LLAMA_CPP"  # names a llama-server to test with
PACKAGE = "xllamacpp==2026.10.11549"  # llama.cpp with its server, built for any CPU
PROGRAM = """
import sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.port = sys.argv[1], int(sys.argv[2])
params.n_ctx = int(sys.argv[3])
params.n_parallel, params.cpuparams.n_threads, params.warmup = 1, 1, False
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
sys.stdin.read()
"""
Ask = Callable[[str, dict], dict]


def llama_cpp(folder: Path) -> list[str]:
    """The command that takes a file, a port and the size of the context; skips the test where there is none."""
    if LLAMA_SERVER in os.environ:
        script = f'exec {os.environ[LLAMA_SERVER]} -m "$0" --port "$1" -c "$2" -np 1 -ctk f32 -ctv f32 -fa off'
        return ["sh", "-c", script]
    package = unpacked(folder, PACKAGE)
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package)!r})\n{PROGRAM}"]


@contextmanager
def serving(command: list[str], gguf: Path, context: int = 512) -> Iterator[Ask]:
    """The server of a file, without rounding of the cache, which is in fp16 by default; ask it by path and body."""
    port = free_port()
    words = [*command, str(gguf), str(port), str(context)]
    with gguf.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def ask(path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return json.load(answer)

    try:
        _wait_until_ready(process, ask, gguf)
        yield ask
    finally:
        process.kill()
        process.communicate()


def _wait_until_ready(process: subprocess.Popen, ask: Ask, gguf: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            ask("/health", {})
        except (URLError, ConnectionError):
            assert process.poll() is None, gguf.with_suffix(".log").read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return
