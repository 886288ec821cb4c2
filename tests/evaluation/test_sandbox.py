"""Untrusted programs: each tries to do harm, fails, and changes nothing outside."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from launching import TIMEOUT, wait_until

from tinyllama_ds.errors import ConfigError
from tinyllama_ds.evaluation import confine
from tinyllama_ds.evaluation.sandbox import Limits, Sandbox, open_sandbox

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is made of Linux")

LIFE_SECONDS = 600  # of a process that is not ended


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return open_sandbox()


def test_a_harmless_program_passes(sandbox: Sandbox) -> None:
    program = "import math\nfrom typing import List\nopen('notes', 'w').write('mine')\nassert math.gcd(12, 18) == 6"
    assert sandbox.passes(program)
    assert not sandbox.passes(program.replace("== 6", "== 7"))


@pytest.mark.parametrize(
    "program", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "def f(:", "x = '\ud800'[1]"]
)
def test_a_program_that_does_not_reach_its_end_fails(sandbox: Sandbox, program: str) -> None:
    assert not sandbox.passes(program.encode("utf-8", "replace").decode())


def test_environment_variables_cannot_be_read(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY_TOKEN", "very-secret")
    assert not sandbox.passes("import os; os.environ['CANARY_TOKEN']")
    assert not sandbox.passes(
        "import os; assert [name for name in os.environ if name not in ('PYTHONHASHSEED', 'LC_CTYPE')]"
    )
    pids = [os.getpid(), os.getppid(), 1]
    for place in (*(f"/proc/{pid}/environ" for pid in pids), "/proc/self/environ", str(Path.home())):
        assert not sandbox.passes(
            f"import os\nos.listdir({place!r}) if os.path.isdir({place!r}) else open({place!r}).read()"
        )


def test_nothing_is_written_outside(sandbox: Sandbox, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    inside = tmp_path / "victim"
    inside.write_text("as it was")
    inside.chmod(0o666)
    for attempt in (
        f"open({str(inside)!r}, 'w').write('harm')",
        f"open({str(tmp_path / 'new')!r}, 'w').write('harm')",
        f"import os; os.remove({str(inside)!r})",
        f"import os; os.symlink({str(inside)!r}, 'link'); open('link', 'a').write('harm')",
        "open('/tmp/tinyllama-ds-canary', 'w').write('harm')",
    ):
        assert not sandbox.passes(attempt), attempt
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert inside.read_text() == "as it was"
    assert not Path("/tmp/tinyllama-ds-canary").exists()


def test_a_fork_bomb_is_limited_and_leaves_no_process(sandbox: Sandbox) -> None:
    before = {process.pid for process in psutil.process_iter()}
    bomb = (
        "import os, time\nfor _ in range(200):\n    if os.fork() == 0:\n        os.setsid()\n"
        f"        time.sleep({LIFE_SECONDS})\n"
    )
    assert not sandbox.passes(bomb)
    wait_until(lambda: not programs_except(before), "a process is left", seconds=LIFE_SECONDS / 2)


def programs_except(before: set[int]) -> list[psutil.Process]:
    """Programs of sandboxes among all processes of this machine; another test may have one for a moment."""
    processes = psutil.process_iter(["cmdline"])
    return [p for p in processes if p.pid not in before and "program.py" in str(p.info["cmdline"])]


def test_memory_time_and_files_are_limited(sandbox: Sandbox) -> None:
    # Never touched: filling it would reach the time limit.
    assert sandbox.passes("import mmap; mmap.mmap(-1, 2**28)")
    assert not sandbox.passes("import mmap; mmap.mmap(-1, 2**31)")
    assert not sandbox.passes("open('big', 'wb').write(bytes(2**21))")
    impatient = Sandbox(sandbox.namespaces, Limits(cpu_seconds=1), wall_seconds=2)
    started = time.monotonic()
    assert not impatient.passes("while True: pass")
    assert not impatient.passes("import time, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)")
    assert time.monotonic() - started < TIMEOUT


def test_there_is_no_network(sandbox: Sandbox) -> None:
    reached = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT)

        def wait() -> None:
            try:
                server.accept()
                reached.set()
            except OSError:
                pass

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        port = server.getsockname()[1]
        assert not sandbox.passes(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)")
        assert not reached.is_set()
        socket.create_connection(("127.0.0.1", port)).close()
        thread.join()


def test_a_machine_without_confinement_is_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same sandbox without its confinement: the attempts to escape succeed, and that is detected."""
    source = Path(confine.__file__).read_text()
    open_door = tmp_path / "confine.py"
    source = source.replace("version = landlock_version()", "version = 0").replace("os.geteuid() != 0", "True")
    open_door.write_text(source)
    monkeypatch.setattr(confine, "__file__", str(open_door))
    with pytest.raises(ConfigError, match=r"does not hold on this machine: expected a kernel with Landlock"):
        open_sandbox()


def test_the_sandbox_confines_programs_of_a_user_other_than_root(tmp_path: Path) -> None:
    """Inside a namespace where this user is 1000 and has no privileges outside."""
    as_user = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    if subprocess.run([*as_user, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not permit user namespaces")
    program = f"""
import os
from tinyllama_ds.evaluation.sandbox import open_sandbox
assert os.geteuid() == 1000
sandbox = open_sandbox()
assert sandbox.passes("open('notes', 'w').write('mine')")
assert not sandbox.passes("open({str(tmp_path / "outside")!r}, 'w').write('harm')")
assert not sandbox.passes("import mmap; mmap.mmap(-1, 2**31)")
"""
    finished = subprocess.run([*as_user, sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert not list(tmp_path.iterdir())
