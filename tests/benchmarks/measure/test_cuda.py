"""Operands are copied only where a cache has to be gone past."""

import pytest

from benchmarks.measure.cuda import copies_beyond_cache, l2_bytes


def test_no_copies_are_made_on_the_cpu():
    assert copies_beyond_cache(10, "cpu") == 1


@pytest.mark.gpu
def test_copies_exceed_the_cache_three_times():
    nbytes = l2_bytes() // 4
    assert (copies_beyond_cache(nbytes, "cuda") - 1) * nbytes < 3 * l2_bytes()
    assert copies_beyond_cache(nbytes, "cuda") * nbytes >= 3 * l2_bytes()
