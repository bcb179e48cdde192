"""Processes that compile and execute side by side."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """Run first in a worker: it ends when the process that started it does, however that ends. A pool's workers would
    go on, and then wait for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()
