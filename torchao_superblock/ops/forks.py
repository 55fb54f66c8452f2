"""Whether this process was forked from one that had this package.

A forked child has none of its parent's threads, but the memory of their pool: whoever hands work to that waits for
ever. The compiled kernel watches for forks once it is loaded, but a parent that never called it may have filled torch's
pool all the same. So this watches from the moment the op is defined.
"""

import os

_in_child = False


def _note() -> None:
    global _in_child
    _in_child = True


def watch_forks() -> None:
    """Take note of forks from now on."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_note)


def in_forked_child() -> bool:
    """True in a child that `os.fork` (or `multiprocessing`) made since :func:`watch_forks`."""
    return _in_child
