"""Train with block masks under Accelerate: accumulated batches, a checkpoint, and going on from it.

    python examples/accelerate_digits.py
    accelerate launch examples/accelerate_digits.py --output-dir run
    python examples/accelerate_digits.py --output-dir run --resume    # from the last checkpoint

What is special about the masks is marked with (*).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchao_superblock import SupermaskSparsifier, swap_to_bsr

try:
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration, set_seed
    from sklearn.datasets import load_digits
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(
        f"this example needs {error.name}: pip install 'torchao_superblock[accelerate]' scikit-learn tqdm "
        "(in a clone: pip install -e '.[accelerate]' scikit-learn tqdm)"
    ) from error


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Trains; returns the losses of this run and the test accuracy, squashed and swapped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--stop-after", type=int, help="epochs, as if the run were cut off then")
    parser.add_argument("--accumulate", type=int, default=2, help="batches for a step")
    parser.add_argument("--output-dir", type=Path, default=Path("output/accelerate"))
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)

    set_seed(0)
    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulate,
        project_config=ProjectConfiguration(
            str(options.output_dir), automatic_checkpoint_naming=True, total_limit=2
        ),
    )
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:400], order[400:]
    loader = DataLoader(TensorDataset(images[train], labels[train]), 32, shuffle=True)
    model = nn.Sequential(
        nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)
    )
    steps = options.epochs * -(-len(loader) // options.accumulate)
    # (*) Masks first, then the optimizer, then `accelerator.prepare`. Steps are the optimizer's.
    sparsifier = SupermaskSparsifier(
        0.9, 16, ramp_steps=int(0.4 * steps), freeze_step=int(0.7 * steps)
    )
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model, weight_decay=0.05), lr=2e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(sparsifier)  # (*) saved and loaded with the rest

    first = 0
    if options.resume:
        accelerator.load_state()  # the newest, and the numbers of the next ones follow from its name
        saved = (options.output_dir / "checkpoints").glob("checkpoint_*")
        first = 1 + max(int(folder.name.rpartition("_")[2]) for folder in saved)
        accelerator.project_configuration.iteration = first
    last = options.epochs if options.stop_after is None else options.stop_after
    losses: list[float] = []
    for epoch in range(first, last):
        loader.set_epoch(epoch)
        for x, y in tqdm(loader, f"epoch {epoch}", disable=not accelerator.is_local_main_process):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                # (*) Once for each step of the optimizer, while its gradients are there.
                if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
                    sparsifier.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        accelerator.save_state()
    if last < options.epochs:
        return {"losses": losses}

    model = accelerator.unwrap_model(model).eval()
    sparsifier.squash_mask()
    report = swap_to_bsr(model)
    accelerator.print(report)
    with torch.no_grad():
        x = images[test].to(accelerator.device)
        accuracy = (model(x).argmax(-1).cpu() == labels[test]).float().mean().item()
    accelerator.print(f"test accuracy {accuracy:.1%}")
    return {"losses": losses, "accuracy": accuracy}


if __name__ == "__main__":
    main()
