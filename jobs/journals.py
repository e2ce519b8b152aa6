"""What running stages say of themselves on other machines, brought here while a run waits for them."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.record import OpenRecord
from pipeline.errors import GristmillError
from pipeline.store import Store

log = logging.getLogger("gristmill")

PULL_SECONDS = 2.0


@contextmanager
def following(store: Store, record: OpenRecord) -> Iterator[None]:
    """While the block runs, keep the journals and the progress of running stages here up to date.

    Never raises into the block, and never makes it wait for long. Without a remote they are here as it is.
    """
    if store.remote is None:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_pull, args=(store, record, over), name="journals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _pull(store: Store, record: OpenRecord, over: threading.Event) -> None:
    is_away = False
    while not over.wait(PULL_SECONDS):
        running = [(s.kind, s.key) for s in record.record.stages if s.status == "running" and s.key]
        try:
            for kind, key in running:
                store.pull_journal(kind, key)
            is_away = False
        except (GristmillError, OSError) as problem:
            if not is_away:
                log.warning("no word of how far the stages are: %s", problem)
            is_away = True
