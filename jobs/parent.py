"""A child process that does not outlive its parent, however that ends."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """In a process that multiprocessing started: end at once when its parent is gone."""
    threading.Thread(target=_watch, name="parent", daemon=True).start()


def _watch() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a child has a parent"
    parent.join()
    os._exit(1)
