"""Training over the nodes of a Ray cluster: the numbers of one process, through the loss of a node, without a disk
that the nodes share.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from ruamel.yaml import YAML

from pipeline.batches import sample_ids
from pipeline.ledger import check
from pipeline.stages.shards import TokenShards
from pipeline.store import Store
from pipeline.tracking import read_journal, read_progress
from tests.jobs.two_machines import Machine, two_machines
from tests.pipeline.recipes import SIMPLE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SEQ_LEN, ROWS, STEPS = 32, 8, 120
PRETRAIN = {
    "steps": STEPS,
    "lr": 1e-3,
    "precision": "fp32",
    "global_batch_tokens": ROWS * SEQ_LEN,
    "validate_every": 20,
    "samples": 1,
}
FINETUNE = SIMPLE | {
    "lr": 1e-3,
    "precision": "fp32",
    "epochs": 2,
    "batch_size": 8,
    "checkpoint_seconds": 0.5,
    "zero_stage": 1,
}
CONFIG = {
    "name": "nodes",
    "corpus": {"path": str(ROOT / "data/smoke/corpus.txt")},
    "tokenizer": {"vocab_size": 512},
    "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64, "seq_len": SEQ_LEN},
    "pretrain": PRETRAIN | {"checkpoint_seconds": 0, "log_every": 1, "ledger": True, "zero_stage": 1},
    "cluster": {"cpus": 1},
}
LABELLED = {
    "labels": {"path": str(ROOT / "data/smoke/labels.jsonl"), "split": [0.7, 0.1, 0.2]},
    "finetune": FINETUNE,
    "evaluate": {"random_init": False},
}
AWS = {
    "AWS_ACCESS_KEY_ID": "toy-key",
    "AWS_SECRET_ACCESS_KEY": "toy-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What every process of a cluster has in its environment, and whoever runs something on it."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.touch(mode=0o600)
    token.write_text("7" * 64)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GRISTMILL_", "RAY_"))}
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }


def config(folder: Path, *parts: Mapping[str, Any]) -> Path:
    whole = dict(CONFIG)
    for part in parts:
        whole |= part
    path = folder / "config.yaml"
    with path.open("w") as out:
        YAML().dump(whole, out)
    return path


def started(home: Path, config: Path, *options: str, env: Mapping[str, str], where: tuple[str, ...] = ()) -> Any:
    return subprocess.Popen(
        [*where, sys.executable, "-m", "jobs.cli", "run", str(config), "--json", *options],
        env={**env, "GRISTMILL_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=(home.parent / f"{home.name}.log").open("w"),
        text=True,
        cwd=ROOT,
    )


def finished(run: Any, home: Path) -> dict[str, Any]:
    try:
        said, _ = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 0, (home.parent / f"{home.name}.log").read_text()[-6000:]
    return json.loads(said.splitlines()[-1])


def keys(result: Mapping[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["key"] for stage in result["stages"]}


@dataclass(frozen=True)
class Ended:
    """A run that is over, and its home."""

    home: Path
    result: dict[str, Any]

    def losses(self, stage: str = "pretrain") -> list[float]:
        points = read_journal(Store(self.home).journal(stage, keys(self.result)[stage]))
        return [point.metrics["train/loss"] for point in points if "train/loss" in point.metrics]

    def digests(self, *stages: str) -> list[str]:
        found = [Store(self.home).find(stage, keys(self.result)[stage]) for stage in stages]
        return [manifest.digest for manifest in found if manifest]

    def faults(self) -> list[str]:
        """What is wrong with which samples were read."""
        shards = TokenShards(Store(self.home).path("shards", keys(self.result)["shards"]))
        rows = (shards.split("train").n_tokens - 1) // SEQ_LEN
        ledger = Store(self.home).journal("pretrain", keys(self.result)["pretrain"]).with_suffix(".ledger")
        return check(ledger, lambda step: sample_ids(step, ROWS, rows, 0), STEPS)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Ended:
    """The whole pipeline in one process."""
    home = tmp_path_factory.mktemp("alone") / "home"
    run = started(home, config(home.parent, LABELLED), "--inline", env=environment)
    return Ended(home, finished(run, home))


# ---- two nodes of one machine


@pytest.fixture
def cluster(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray of two nodes with one slot each."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
    two = Cluster(initialize_head=True, head_node_args=node)
    try:
        two.add_node(**{name: value for name, value in node.items() if name != "include_dashboard"})
        yield two
    finally:
        two.shutdown()


def reaches(run: Any, home: Path, steps: int) -> bool:
    """Wait until a pretraining has come so far; False if the run is over before."""
    while run.poll() is None:
        for path in (home / "journal" / "pretrain").glob("*.jsonl"):
            if (seen := read_progress(path)) and seen["done"] >= steps:
                return True
        time.sleep(0.01)
    return False


def test_two_nodes_have_the_numbers_of_one_process_and_one_may_be_lost(
    tmp_path: Path, alone: Ended, cluster: Any, environment: dict[str, str]
):
    lossy = tmp_path / "lossy"
    to = ["--set", f"cluster.address={cluster.address}", "--set", "cluster.workers=[1,2]"]
    run = started(lossy, config(tmp_path), *to, env=environment)
    assert reaches(run, lossy, 2)
    cluster.remove_node(next(node for node in cluster.list_all_nodes() if not node.head), allow_graceful=False)
    done = Ended(lossy, finished(run, lossy))
    assert "Going on in" in (tmp_path / "lossy.log").read_text()
    assert done.losses() == pytest.approx(alone.losses(), abs=1e-4)
    assert done.faults() == []
    sizes = [
        json.loads(line)["world_size"]
        for path in (lossy / "journal" / "pretrain").glob("*.ledger/*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert set(sizes) == {1, 2}


# ---- two machines: each with a network and a disk of its own


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[str, list[Machine]]]:
    with two_machines(tmp_path) as made:
        yield made


@pytest.fixture
def bucket(machines: tuple[str, list[Machine]]) -> Iterator[dict[str, str]]:
    """An S3 server with one bucket that both machines reach, as an environment says it."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(machines[0], 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client(
        "s3",
        endpoint_url=address,
        region_name="us-east-1",
        aws_access_key_id="toy-key",
        aws_secret_access_key="toy-secret",
    )
    client.create_bucket(Bucket="shared")
    yield {**AWS, "AWS_ENDPOINT_URL": address}
    server.stop()


@contextmanager
def ray_over(machines: list[Machine], env: Mapping[str, str]) -> Iterator[str]:
    """A Ray with one slot on each machine; its address. On the last one a rank is killed once, in mid-checkpoint."""
    head = machines[0].address
    port = f"{head}:6379"
    options = ["--num-cpus=1", f"--object-store-memory={100 << 20}", "--block"]
    nodes: list[subprocess.Popen[str]] = []
    try:
        for one in machines:
            is_head = one.address == head
            role = ["--head", "--port=6379", "--include-dashboard=false"] if is_head else [f"--address={port}"]
            command = [*one.inside, sys.executable, "-m", "ray.scripts.scripts", "start", *role, *options]
            own = {**env, "GRISTMILL_CACHE": str(one.disk / "cache"), "GLOO_SOCKET_IFNAME": "eth0"}
            own |= {} if is_head else {"GRISTMILL_FAULT": f"checkpoint.upload:3:{one.disk}/killed"}
            said = (one.disk.parent / f"{one.disk.name}.log").open("w")
            command.append(f"--node-ip-address={one.address}")
            nodes.append(
                subprocess.Popen(command, env=own, stdout=said, stderr=said, text=True, start_new_session=True)
            )
            wait_for_line(one.disk.parent / f"{one.disk.name}.log", "Ray runtime started", nodes[-1])
        yield port
    finally:
        for one in machines:
            one.switch_off()
        for node in nodes:
            node.wait()


def wait_for_line(path: Path, text: str, process: Any) -> None:
    until = time.monotonic() + 60
    while text not in path.read_text():
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < until, path.read_text()
        time.sleep(0.05)


def test_two_machines_need_to_share_nothing_but_a_store_even_to_go_on_after_a_loss(
    tmp_path: Path,
    alone: Ended,
    machines: tuple[str, list[Machine]],
    bucket: dict[str, str],
    environment: dict[str, str],
):
    _, both = machines
    home = both[0].disk / "home"
    env = environment | bucket
    with ray_over(both, env) as address:
        run = started(
            home,
            config(tmp_path, LABELLED),
            *("--set", "pretrain.checkpoint_seconds=0.2"),
            *("--set", f"cluster.address={address}", "--set", "cluster.workers=2"),
            *("--set", "cluster.store=s3://shared/store"),
            env=env,
            where=both[0].inside,
        )
        done = Ended(home, finished(run, home))
    assert (both[1].disk / "killed").exists()
    assert "going on from step" in home.with_suffix(".log").read_text()
    same = ("corpus", "tokenizer", "shards", "labels")
    assert done.digests(*same) == alone.digests(*same)
    assert done.losses() == pytest.approx(alone.losses(), abs=1e-4)
    assert done.losses("finetune") == pytest.approx(alone.losses("finetune"), abs=1e-4)
    for one in both:
        assert list((one.disk / "cache" / "store" / "shards").iterdir()), "each fetched what it read"
        assert not list((one.disk / "cache" / "work").rglob("*.safetensors"))
