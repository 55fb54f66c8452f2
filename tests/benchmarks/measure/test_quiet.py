"""Peers that warn at every call are kept quiet, and only meanwhile."""

import logging
import warnings

from benchmarks.measure.quiet import quiet


def test_quiet_silences_warnings_and_logs_and_restores_them():
    with quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.warn("untuned", stacklevel=1)
        assert logging.root.manager.disable == logging.WARNING
    assert caught == []
    assert logging.root.manager.disable == logging.NOTSET
