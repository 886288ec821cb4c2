"""One preparing agent per host, started over ssh.

Every agent sees the same files and makes its share of the shards, without communication: an agent that dies loses the
shard that it was making, which a later run makes.
"""

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tinyllama_ds.data.prepare.prepare import Preparation, plan_shards, watch_shards
from tinyllama_ds.data.tokenizers.storage import load_tokenizer
from tinyllama_ds.distributed.ssh import ssh_command


def prepare_on_hosts(job: Preparation, hosts: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Run `tinyllama-ds prepare ARGUMENTS --share RANK/SIZE` on every host; returns a sentence for each that failed.

    The hosts must see the same directories, and this Python under the same path.
    """
    open_tasks = [task for task in plan_shards(job) if not task.manifest.exists()]
    vocab_size = load_tokenizer(job.tokenizer).vocab_size
    agents = [_start(host, [*arguments, "--share", f"{rank}/{len(hosts)}"]) for rank, host in enumerate(hosts)]
    watching = watch_shards(f"prepare {job.source} on {len(hosts)} hosts", open_tasks, vocab_size).watching()
    with watching, ThreadPoolExecutor(len(agents)) as pool:
        try:
            logs = list(pool.map(lambda agent: agent.communicate()[1], agents))
        finally:
            for agent in agents:
                agent.terminate()
    return [
        f"{host}: exit code {agent.returncode}: {_last_line(log)}"
        for host, agent, log in zip(hosts, agents, logs, strict=True)
        if agent.returncode
    ]


def _start(host: str, arguments: list[str]) -> subprocess.Popen[str]:
    ssh = ssh_command(host, [sys.executable, "-m", "tinyllama_ds.cli", *arguments])
    return subprocess.Popen(ssh, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _last_line(log: str) -> str:
    lines = [line for line in log.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
