"""The batch script for Slurm, by a real one over two machines: it stops before its time is up, waits, and goes on."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.jobs.two_machines import Machine, two_machines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "infra" / "slurm" / "gristmill.sbatch"
NEEDED = ("slurmctld", "slurmd", "munged")
FIRST_JOB = 1000 + os.getpid() % 10**6
CONFIG = """
ClusterName=toy
SlurmctldHost={host}({here})
SlurmUser=root
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
FirstJobId={first_job}
NodeName=n0 NodeAddr={first} CPUs=1 RealMemory=2000
NodeName=n1 NodeAddr={second} CPUs=1 RealMemory=2000
PartitionName=all Nodes=ALL Default=YES
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of somebody who submits to a Slurm of two nodes with a core each."""
    if os.geteuid() != 0 or not all(shutil.which(name) for name in NEEDED):
        pytest.skip(f"needs to be root, with {', '.join(NEEDED)} installed")
    folder = tmp_path / "slurm"
    for name in ("munge", "state", "n0", "n1"):
        (folder / name).mkdir(parents=True)
    (folder / "munge").chmod(0o711)
    (folder / "munge" / "key-file").write_bytes(os.urandom(1024))
    (folder / "munge" / "key-file").chmod(0o400)
    kept = [f"--{what}={folder}/munge/{what}" for what in ("key-file", "socket", "pid-file", "log-file", "seed-file")]
    with two_machines(tmp_path) as (here, machines), ExitStack() as stack:
        first, second = (machine.address for machine in machines)
        config = folder / "slurm.conf"
        places = {"host": socket.gethostname(), "here": here, "folder": folder, "first": first, "second": second}
        config.write_text(CONFIG.format(first_job=FIRST_JOB, **places))
        env = {name: value for name, value in os.environ.items() if not name.startswith(("GRISTMILL_", "RAY_"))}
        env |= {
            "SLURM_CONF": str(config),
            "GRISTMILL_HOME": str(tmp_path / "home"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        stack.enter_context(running(["munged", "--foreground", "--force", *kept], folder / "munged.log", env))
        wait_until(lambda: (folder / "munge" / "socket").exists())
        stack.enter_context(running(["slurmctld", "-D"], folder / "controller.log", env))
        for n, machine in enumerate(machines):
            inside = f"{own_temp(machine)} && exec nsenter --net=/run/netns/{machine.name} slurmd -D -N n{n}"
            command = ["unshare", "--mount", "sh", "-c", inside]
            stack.callback(machine.switch_off)
            stack.enter_context(running(command, folder / f"n{n}.log", env))
        wait_until(lambda: said(env, "sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")
        yield env
    for place in shared_temps():
        place.rmdir()


def own_temp(machine: Machine) -> str:
    """Shell commands that give a machine its own place for what Ray keeps under /tmp."""
    places = [(shared, machine.disk / shared.name) for shared in shared_temps()]
    return " && ".join(f"mkdir -p {shared} {own} && mount --bind {own} {shared}" for shared, own in places)


def shared_temps() -> list[Path]:
    """Where the job's Ray keeps its sockets and logs, at its first start and at its second."""
    return [Path(f"/tmp/ray-{FIRST_JOB}-{start}") for start in range(2)]


@contextmanager
def running(command: list[str], log: Path, env: dict[str, str]) -> Iterator[None]:
    """A server, until the block ends."""
    with log.open("w") as out, subprocess.Popen(command, env=env, stdout=out, stderr=out) as process:
        try:
            yield
        finally:
            process.kill()


def said(env: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False).stdout


def wait_until(holds: Callable[[], bool], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.5)


def test_a_job_that_is_asked_to_stop_waits_in_the_queue_and_goes_on(tmp_path: Path, slurm: dict[str, str]):
    log, steps = tmp_path / "job.log", 600
    settings = (f"pretrain.steps={steps}", "cluster.workers=2", "pretrain.zero_stage=1", "labels=null", "export=null")
    options = [part for setting in settings for part in ("--set", setting)]
    command = ["sbatch", "--parsable", "--nodes=2", f"--output={log}", str(SCRIPT), "configs/smoke.yaml", *options]
    submitted = subprocess.run(command, env=slurm, cwd=ROOT, capture_output=True, text=True, check=True)
    job = submitted.stdout.strip()
    assert job == str(FIRST_JOB)
    wait_until(lambda: log.exists() and re.search(rf"pretrain .* [1-9]\d*/{steps} ", log.read_text()) is not None)
    said(slurm, "scancel", "--batch", "--signal=TERM", job)  # what Slurm does two minutes before the time is up
    wait_until(lambda: said(slurm, "squeue", "-h", "-o", "%T").strip() == "PENDING")
    assert "its checkpoint is safe" in log.read_text()
    said(slurm, "scontrol", "update", f"job={job}", "StartTime=now")  # it would wait two minutes
    wait_until(lambda: "Restarts=1" in said(slurm, "scontrol", "show", "job", job) and state(slurm, job) != "PENDING")
    wait_until(lambda: state(slurm, job) not in ("RUNNING", "COMPLETING"))
    assert state(slurm, job) == "COMPLETED", log.read_text()
    assert "going on from step" in log.read_text()
    assert "gristmill generate smoke" in log.read_text()


def state(env: dict[str, str], job: str) -> str:
    found = re.search(r"JobState=(\w+)", said(env, "scontrol", "show", "job", job))
    assert found is not None
    return found[1]
