"""The process that `doctor` starts on every host. It answers questions, one line of JSON each, and leaves no files.

`{"ask": "report"}` is answered by a report of this host, `"connections"` by its connections to the others, `"clock"` by
the time, `"machine"` by the hardware; the other keys are the arguments of the function that answers.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import requires
from pathlib import Path
from threading import Thread

from tinyllama_ds.distributed.network import free_port, interface_towards, local_address_towards
from tinyllama_ds.hardware.devices import PACKAGES, cpu_has_bf16, installed_versions, list_gpus

_PACKAGE = Path(__file__).parents[1]
_CONNECT_SECONDS = 5


def report(data: str | None, run_dir: str | None, token: str) -> dict:
    """The report of this host, which accepts connections on its `port`; writes a token into the run directory."""
    packages = (*PACKAGES, *nccl_packages(requires("torch") or []))
    return {
        "python": platform.python_version(),
        "packages": dict.fromkeys(packages) | installed_versions(packages),
        "code": code_digest(),
        "revision": _revision(),
        **machine(),
        "free": {path: _free_bytes(Path(path)) for path in (run_dir, tempfile.gettempdir()) if path},
        "data": None if data is None else data_digest(Path(data)),
        "run_dir_error": None if run_dir is None else _write_token(Path(run_dir), token),
        "free_port": free_port(),
        "port": listen(),
    }


def machine() -> dict:
    """The hardware of this host."""
    gpus, cores = list_gpus(), len(os.sched_getaffinity(0))
    return {"host": socket.gethostname(), "gpus": gpus, "cores": cores, "bf16": cpu_has_bf16()}


def nccl_packages(requirements: list[str]) -> list[str]:
    """The NCCL package that torch requires, such as `nvidia-nccl-cu13`; empty for builds without CUDA."""
    return [match[0] for text in requirements if (match := re.match(r"nvidia-nccl-\w+", text))]


def check_peers(peers: dict[str, list], run_dir: str | None, tokens: list[str], master: str) -> dict:
    """Which peers (name: [address, port]) are unreachable, which tokens are missing, and the route to rank 0."""
    with ThreadPoolExecutor(64) as pool:
        errors = dict(zip(peers, pool.map(lambda peer: _connect(*peer), peers.values()), strict=True))
    address = local_address_towards(master)
    return {
        "unreached": {name: error for name, error in errors.items() if error},
        "unseen_tokens": [token for token in tokens if run_dir and not (Path(run_dir) / token).is_file()],
        "address": address,
        "interface": interface_towards(master, may_be_loopback=False),
    }


def code_digest() -> str:
    """SHA-256 over the package: a git revision does not show uncommitted changes."""
    digest = hashlib.sha256()
    for path in sorted([*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("*.toml")]):
        digest.update(str(path.relative_to(_PACKAGE.parent)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def data_digest(data: Path) -> dict:
    """One hash over all manifests of a data directory, or the first missing file."""
    if not data.is_dir():
        return {"error": f"{data} is missing"}
    digest, manifests = hashlib.sha256(), sorted(data.rglob("*.json"))
    for path in manifests:
        digest.update(str(path.relative_to(data)).encode() + b"\0" + path.read_bytes() + b"\0")
        shard = path.with_suffix(".bin")
        if shard.is_file() != path.with_suffix(".idx").is_file():
            return {"error": f"{shard} or its .idx is missing"}
    sizes = [(str(path.relative_to(data)), path.stat().st_size) for path in sorted(data.rglob("*.bin"))]
    digest.update(json.dumps(sizes).encode())
    return {"digest": digest.hexdigest()[:12], "manifests": len(manifests)}


def _revision() -> str | None:
    git = ["git", "-C", str(_PACKAGE.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError):
        return None


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _write_token(run_dir: Path, token: str) -> str | None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        (run_dir / token).write_text(socket.gethostname())
    except OSError as error:
        return error.strerror or str(error)
    return None


def _connect(host: str, port: int) -> str | None:
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_SECONDS):
            return None
    except OSError as error:
        return error.strerror or str(error)


def listen() -> int:
    """Accept connections on a free port until this process ends; returns the port."""
    server = socket.create_server(("", 0), backlog=1024)

    def accept() -> None:
        while True:
            server.accept()[0].close()

    Thread(target=accept, daemon=True).start()
    return server.getsockname()[1]


_ANSWERS: dict[str, Callable[..., dict]] = {
    "report": report,
    "connections": check_peers,
    "clock": lambda: {"time": time.time()},
    "machine": machine,
}


def main() -> None:
    """Answer until the input is closed; then remove the token."""
    with ExitStack() as stack:
        for line in sys.stdin:
            question = json.loads(line)
            if question.get("token") and question["run_dir"]:
                stack.callback(Path(question["run_dir"], question["token"]).unlink, missing_ok=True)
            print(json.dumps(_ANSWERS[question.pop("ask")](**question)), flush=True)


if __name__ == "__main__":
    main()
