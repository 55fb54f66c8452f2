"""FlopCounterMode counts what the op and its gradients compute."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.reference import random_bsr
from torchao_superblock.ops import bsr_linear


@pytest.mark.parametrize("lead", [(7,), (2, 5), ()])
def test_two_for_each_stored_element_and_token(lead):
    _, crow, col, values = random_bsr(64, 96, 16, 0.5)
    values.requires_grad_()
    x = torch.randn(*lead, 96, requires_grad=True)
    once = 2 * x[..., 0].numel() * values.numel()
    with FlopCounterMode(display=False) as counter:
        y = bsr_linear(x, crow, col, values, torch.randn(64), activation="gelu")
    assert counter.get_total_flops() == once
    with FlopCounterMode(display=False) as counter:
        bsr_linear(x, crow, col, values)  # a second forward
        y.sum().backward()
    assert counter.get_flop_counts()["Global"] == {
        torch.ops.torchao_superblock.bsr_linear: once,
        # both gradients, and the product that gelu's backward needs again
        torch.ops.torchao_superblock.bsr_linear_backward: 3 * once,
    }


@pytest.mark.parametrize("counter_first", [False, True])
def test_the_counter_is_found_whoever_is_imported_first(counter_first):
    """The package must not import it: it takes longer than all else, and imports Triton."""
    imports = ["import torchao_superblock", "import torch.utils.flop_counter"]
    script = f"""
import sys, torch
{chr(10).join(reversed(imports) if counter_first else imports)}
from torch.utils.flop_counter import flop_registry
assert torch.ops.torchao_superblock.bsr_linear in flop_registry
assert type(sys.modules["torch.utils.flop_counter"].__loader__).__module__ != "torchao_superblock.ops.flops"
assert not [f for f in sys.meta_path if type(f).__module__ == "torchao_superblock.ops.flops"]
print("registered")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "registered", done.stderr


def test_importing_the_package_does_not_import_the_counter():
    script = "import sys, torchao_superblock; print('torch.utils.flop_counter' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
