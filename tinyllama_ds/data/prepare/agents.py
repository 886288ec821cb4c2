"""One preparing agent per host, started over ssh.

Every agent sees the same files and makes its share of the shards, without communication: an agent that dies loses the
shard that it was making, which a later run makes.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import IO

from tinyllama_ds.data.prepare.prepare import Preparation, plan_shards, watch_shards
from tinyllama_ds.data.tokenizer import Tokenizer
from tinyllama_ds.distributed.ssh import ssh_command

_POLL_SECONDS = 0.5


def prepare_on_hosts(job: Preparation, hosts: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Run `tinyllama-ds prepare ARGUMENTS --share RANK/SIZE` on every host; returns a sentence for each that failed.

    The hosts must see the same directories, and this Python under the same path.
    """
    open_tasks = [task for task in plan_shards(job) if not task.manifest.exists()]
    vocab_size = Tokenizer(job.tokenizer).vocab_size
    with ExitStack() as files:
        logs = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in hosts]
        agents = [
            _start(host, [*arguments, "--share", f"{rank}/{len(hosts)}"], log)
            for rank, (host, log) in enumerate(zip(hosts, logs, strict=True))
        ]
        try:
            with watch_shards(f"prepare {job.source} on {len(hosts)} hosts", open_tasks, vocab_size).watching():
                while any(agent.poll() is None for agent in agents):
                    time.sleep(_POLL_SECONDS)
        finally:
            for agent in agents:
                agent.terminate()
        return [
            f"{host}: exit code {agent.returncode}: {_last_line(log)}"
            for host, agent, log in zip(hosts, agents, logs, strict=True)
            if agent.returncode
        ]


def _start(host: str, arguments: list[str], log: IO[str]) -> subprocess.Popen:
    ssh = ssh_command(host, [sys.executable, "-m", "tinyllama_ds.cli", *arguments])
    return subprocess.Popen(ssh, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, text=True)


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    lines = [line for line in log.read().replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
