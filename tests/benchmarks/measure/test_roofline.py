"""The floor under a time, and the ceilings it comes from."""

from benchmarks.measure.roofline import Roofline, measure_roofline


def test_the_floor_is_the_larger_of_both_ceilings():
    roofline = Roofline(bandwidth=100.0, rates={"float32": 10.0, "tf32": 60.0})
    assert roofline.floor(1000, 1, "tf32") == 10.0
    assert roofline.floor(1, 6000, "tf32") == 100.0
    assert roofline.rate("float32") == 20.0  # three TF32 products beat the plain ones


def test_the_roofline_is_measured():
    roofline = measure_roofline("cpu", ["float32"], quick=True)
    assert roofline.bandwidth > 0 and roofline.rates["float32"] > 0
    assert set(roofline.describe()) == {"copy bandwidth (read + write)", "dense float32 product"}
