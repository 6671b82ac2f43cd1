"""Processes that work for this one."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """In a process that `multiprocessing` made: end with the one that made it, also where a signal ended that one
    before it could tell its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
