"""What a call costs the host, in every mode of autograd."""

import pytest

from benchmarks import host_time as bench
from tests.benchmarks.layer.tiny import tiny_context


@pytest.mark.gpu
def test_every_mode_is_measured(tmp_path):
    context = tiny_context(tmp_path, "cuda")
    bench.section_host(context)
    assert [r["mode"] for r in context.report.records] == 2 * ["inference_mode", "no_grad", "grad"]
    host, walls = context.report.records[:3], context.report.records[3:]
    assert all(row["op us"] > 0 and row["BSRLinear - nn.Linear us"] is not None for row in host)
    assert all(row["BSRLinear x"] > 0 for row in walls)


def test_it_is_about_a_gpu(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cpu"])
    assert "pass --device cuda" in capsys.readouterr().err
