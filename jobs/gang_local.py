"""A gang of ranks as processes of this machine, without a cluster: what `--inline` uses for more than one worker."""

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

from jobs.gang_ray import as_rank, bare
from jobs.parent import end_with_parent
from pipeline.errors import GristmillError, StageFailed, WorkerLost
from pipeline.stage import Context, RankContext

POLL_SECONDS = 0.05
LAST_WORDS_SECONDS = 5.0
"""How long the other ranks may take to end by themselves once one has failed."""

Rank = tuple[BaseProcess, Any]
"""A child process, and the end of a pipe on which it says why it fails."""


@dataclass(frozen=True)
class LocalGang:
    """`pipeline.stage.Gang` as child processes; `cpus` are those of one rank. Nothing outlives the call."""

    workers: int
    cpus: int
    timeout_seconds: float = 60.0
    """How long a rank may be silent before the others give up."""

    def __call__(self, function: Callable[[RankContext], None], ctx: Context) -> None:
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        rendezvous = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        be_rank = partial(as_rank, function, bare(ctx, self.cpus), self.timeout_seconds)
        ranks = [self._start(rank, rendezvous.port, be_rank) for rank in range(self.workers)]
        try:
            _watch(ctx.kind, ranks)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()

    def _start(self, rank: int, port: int, be_rank: Callable[[], None]) -> Rank:
        spawn = multiprocessing.get_context("spawn")
        hear, tell = spawn.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.workers),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is this process's, as under torchrun
            "OMP_NUM_THREADS": str(self.cpus),
        }
        process = spawn.Process(target=_be_rank, args=(environment, tell, be_rank), daemon=True)
        process.start()
        tell.close()
        return process, hear


def _be_rank(environment: dict[str, str], tell: Any, be_rank: Callable[[], None]) -> None:
    os.environ |= environment
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("gristmill").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a whole tree may be signalled: the driver has us stop in order
    end_with_parent()  # one that is killed ends nobody, and its successor has ranks of its own
    try:
        be_rank()
    except GristmillError as error:
        tell.send(error)
        sys.exit(error.exit_code)


def _watch(stage: str, ranks: list[Rank]) -> None:
    """Wait until every rank has ended well. Raises what ended the first that did not."""
    limit = float("inf")
    while any(process.is_alive() for process, _ in ranks) and time.monotonic() < limit:
        time.sleep(POLL_SECONDS)
        if limit == float("inf") and any(process.exitcode for process, _ in ranks):
            limit = time.monotonic() + LAST_WORDS_SECONDS
    if all(process.exitcode == 0 for process, _ in ranks):
        return
    codes = [process.exitcode or 0 for process, _ in ranks]
    if min(codes) < 0:  # the others then fail for want of it, and may be seen to end first
        raise WorkerLost(f"{stage}: rank {codes.index(min(codes))} of {len(ranks)} was killed by signal {-min(codes)}")
    for _, hear in ranks:
        if (said := _last_word(hear)) is not None:
            raise said
    failed = next(rank for rank, code in enumerate(codes) if code)
    raise StageFailed(f"{stage}: rank {failed} of {len(ranks)} failed; what it said stands above")


def _last_word(hear: Any) -> GristmillError | None:
    try:
        return hear.recv() if hear.poll() else None
    except EOFError:
        return None
