"""The command line of `train.py`: torchvision's reference recipe, and what block sparsity adds to it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipe.sparsity import LAYERS, SPARSIFIERS

INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
AUGMENTATIONS = ("ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn")


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """All options, with torchvision's names where torchvision has them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", choices=("folder", "fake", "digits"), default="folder", help="%(default)s")
    add("--data-path", type=Path, help="of --data folder: has train/CLASS/* and val/CLASS/*")
    add("--fake-images", type=int, default=1024, help="of --data fake, a quarter more to test on")
    add("--fake-classes", type=int, default=10, help="of --data fake (%(default)s)")
    add("-j", "--workers", type=int, default=8, help="loader processes for each rank (%(default)s)")
    add("--interpolation", choices=INTERPOLATIONS, default="bilinear", help="%(default)s")
    add("--train-crop-size", type=int, default=224, help="pixels (%(default)s)")
    add("--val-crop-size", type=int, help="pixels; default: that of training")
    add("--val-resize-size", type=int, help="pixels; default: val-crop-size * 8 / 7, as 256 to 224")

    add = parser.add_argument_group("augmentation").add_argument
    add("--crop-scale", type=float, default=0.08, help="least part of an image that is cropped")
    add("--hflip-prob", type=float, default=0.5, help="%(default)s")
    add("--auto-augment", choices=AUGMENTATIONS, help="ra: RandAugment, ta_wide: TrivialAugment")
    add("--ra-magnitude", type=int, default=9, help="of RandAugment (%(default)s)")
    add("--augmix-severity", type=int, default=3, help="of AugMix (%(default)s)")
    add("--random-erase", type=float, default=0.0, help="probability (%(default)s)")
    add("--mixup-alpha", type=float, default=0.0, help="%(default)s is off")
    add("--cutmix-alpha", type=float, default=0.0, help="%(default)s is off")
    add("--ra-sampler", action="store_true", help="repeated augmentation")
    add("--ra-reps", type=int, default=3, help="how often an image repeats (%(default)s)")

    add = parser.add_argument_group("model").add_argument
    add("--model", default="vit_b_16", help="any classifier of torchvision, or vit_micro")
    add("--weights", help="of torchvision, to fine-tune: DEFAULT, IMAGENET1K_V1, ...")
    add("--weights-path", type=Path, help="a state dict or a checkpoint, to fine-tune")
    add("--sync-bn", action="store_true", help="batch norm over all ranks (GPUs only)")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile")

    add = parser.add_argument_group("optimizer").add_argument
    add("-b", "--batch-size", type=int, default=256, help="of all ranks together (%(default)s)")
    add("--accumulation-steps", type=int, default=1, help="batches of one optimizer step")
    add("--epochs", type=int, default=90, help="%(default)s")
    add("--opt", choices=("sgd", "sgd_nesterov", "rmsprop", "adamw"), default="sgd", help="sgd")
    add("--lr", type=float, default=0.1, help="%(default)s")
    add("--momentum", type=float, default=0.9, help="of SGD and RMSprop (%(default)s)")
    add("--wd", "--weight-decay", dest="weight_decay", type=float, default=1e-4, help="%(default)s")
    add("--norm-weight-decay", type=float, help="of normalisation layers; default: --wd")
    add("--bias-weight-decay", type=float, help="of biases; default: --wd")
    add("--transformer-embedding-decay", type=float, help="of embeddings; default: --wd")
    add("--label-smoothing", type=float, default=0.0, help="%(default)s")
    add("--clip-grad-norm", type=float, help="largest norm of all gradients")
    add("--amp", nargs="?", const="fp16", choices=("bf16", "fp16"), help="alone: fp16, with scaler")
    add("--lr-scheduler", choices=("steplr", "cosineannealinglr", "exponentiallr"))
    add("--lr-warmup-epochs", type=int, default=0, help="%(default)s")
    add("--lr-warmup-method", choices=("constant", "linear"), default="linear", help="%(default)s")
    add("--lr-warmup-decay", type=float, default=0.01, help="first factor of --lr (%(default)s)")
    add("--lr-step-size", type=int, default=30, help="epochs (%(default)s)")
    add("--lr-gamma", type=float, default=0.1, help="%(default)s")
    add("--lr-min", type=float, default=0.0, help="of the cosine (%(default)s)")
    add("--model-ema", action="store_true", help="average the parameters; it is what comes out")
    add("--model-ema-steps", type=int, default=32, help="optimizer steps (%(default)s)")
    add("--model-ema-decay", type=float, default=0.99998, help="torchvision's (%(default)s)")
    parser.set_defaults(lr_scheduler="steplr")

    add = parser.add_argument_group("block sparsity").add_argument
    add("--sparsifier", choices=("none", *SPARSIFIERS), default="none", help="%(default)s")
    add("--sparsity", "--sparsity-linear", dest="sparsity", type=float, default=0.8, help="level")
    add("--blocksize", "--sp-linear-tile-size", dest="blocksize", type=int, default=32, help="side")
    add("--ramp", type=float, help="fraction of the training in which the level rises from 0")
    add("--freeze", type=float, help="fraction of the training after which the masks stay")
    add("--update-every", type=int, help="steps between updates of masks, where they have such")
    add("--layers", nargs="+", default=["mlp"], help=f"{', '.join(LAYERS)}, or globs (mlp)")
    add("--exclude", nargs="+", default=[], metavar="PATTERN", help="globs of weights left dense")
    add("--skip-first-block", "--skip-first-transformer-sparsity", action="store_true")
    add("--skip-last-layer", "--skip-last-layer-sparsity", action="store_true")

    add = parser.add_argument_group("run").add_argument
    add("--output-dir", type=Path, default=Path("output/imagenet"), help="%(default)s")
    add("--resume", nargs="?", const="last", metavar="CHECKPOINT", help="alone: the folder's last")
    add("--keep-every", type=int, default=0, help="also keep the checkpoint of each Nth epoch")
    add("--test-only", action="store_true", help="test, and leave")
    add("--device", help="default: cuda where there is one")
    add("--fsdp", action="store_true", help="shard with FSDP2 (under torchrun)")
    add("--deterministic", "--use-deterministic-algorithms", action="store_true")
    add("--seed", type=int, default=0, help="%(default)s")
    add("--print-freq", type=int, default=10, help="optimizer steps of a row of log.csv")
    return parser


def parse(
    argv: Sequence[str] | None,
    known: argparse.Namespace | None = None,
    description: str | None = None,
) -> argparse.Namespace:
    """Parses and checks what can be checked without data or model.

    Args:
        argv: the command line; None for the program's own.
        known: options that stand where the command line does not give them.
        description: for the help.
    """
    command_line = parser(description)
    args = command_line.parse_args(argv, known)
    error = command_line.error
    at_least_one = ("epochs", "batch_size", "accumulation_steps", "print_freq", "model_ema_steps")
    for name in (*at_least_one, "train_crop_size", "ra_reps", "lr_step_size", "blocksize"):
        if getattr(args, name) < 1:
            error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.sparsity < 1:
        error(f"--sparsity {args.sparsity} must be in [0, 1)")
    if not 0 < args.crop_scale <= 1:
        error(f"--crop-scale {args.crop_scale} must be in (0, 1]: it is a part of an image")
    for name in ("ramp", "freeze"):
        fraction = getattr(args, name)
        if fraction is not None and not 0 < fraction <= 1:
            error(f"--{name} {fraction} must be in (0, 1]: it is a fraction of the training")
    if args.lr_warmup_epochs >= args.epochs and args.lr_warmup_epochs:
        error(f"--lr-warmup-epochs {args.lr_warmup_epochs} leave nothing of --epochs {args.epochs}")
    if args.weights and args.weights_path:
        error("--weights and --weights-path: give one of them")
    if args.data == "folder" and args.data_path is None:
        error("--data-path is needed; or --data fake, or --data digits, to try things")
    if args.val_crop_size is None:
        args.val_crop_size = args.train_crop_size
    if args.val_resize_size is None:
        args.val_resize_size = round(args.val_crop_size * 8 / 7)
    return args
