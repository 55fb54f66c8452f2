import torch

from benchmarks import gated_mlp


def test_a_cell_times_all_candidates_and_compares_them_with_float64():
    gate, model = gated_mlp.cell(
        "tiny", 64, 32, 16, 8, device=torch.device("cpu"), dtype=torch.float32, seconds=0.01
    )
    for key in ("separate", "composed"):
        assert gate[f"{key} error"] < 1e-6 and gate[f"{key} ms"] > 0
    assert model["as swapped ms"] > 0 and model["dense ms"] > 0
