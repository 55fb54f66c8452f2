"""Decode with a block-sparse Llama: `generate` with a static cache, and on a GPU with CUDA graphs.

    python examples/decode_llama.py                                  # small: seconds on a CPU
    python examples/decode_llama.py --hidden 4096 --layers 8 --new 256   # on a GPU: shapes of a 7B model

1. A Llama with random weights is made from a config; nothing is downloaded.
2. Random blocks of its linear layers become zero. In earnest a sparsifier or `prune_one_shot` chooses them.
3. A copy is swapped. Both generate from the same prompt with a cache of fixed size, so that every step
   but the first has the same shapes: `torch.compile(mode="reduce-overhead")` records it once as a CUDA
   graph, and replaying that costs the host next to nothing. On a CPU both run as they are.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from torch import nn

from torchao_superblock import swap_to_bsr

try:
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as error:
    raise SystemExit(
        f"this example needs {error.name}: pip install 'torchao_superblock[transformers]'"
    ) from error


def zero_random_blocks(model: nn.Module, blocksize: int, sparsity: float) -> None:
    """Prunes the linear layers of the decoder, in place."""
    for linear in model.model.layers.modules():
        if isinstance(linear, nn.Linear):
            blocks = linear.weight.data.unfold(0, blocksize, blocksize).unfold(
                1, blocksize, blocksize
            )
            blocks[torch.rand(blocks.shape[:2], device=blocks.device) < sparsity] = 0


def generate(model: nn.Module, prompt: torch.Tensor, new: int) -> tuple[torch.Tensor, float]:
    """Greedy tokens behind the prompt, and how many of them a second; compilation is not counted."""
    options = {"cache_implementation": "static", "do_sample": False, "min_new_tokens": new}
    if prompt.is_cuda:
        # One step compiled as a whole; the prompt, whose length changes, runs as it is.
        from transformers import CompileConfig

        options["compile_config"] = CompileConfig(mode="reduce-overhead", fullgraph=True)
    for timed in (False, True):
        start = time.perf_counter()
        tokens = model.generate(prompt, max_new_tokens=new, **options)[:, prompt.shape[1] :]
        tokens = tokens.cpu()  # waits for the GPU
        seconds = time.perf_counter() - start
        if not (timed or prompt.is_cuda):
            break  # nothing was compiled
    return tokens, tokens.numel() / seconds


def main(arguments: list[str] | None = None) -> dict[str, object]:
    """Generates with both models, and returns their tokens and tokens a second."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=256, help="features (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--blocksize", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    heads = max(1, options.hidden // 128)
    if options.hidden % (heads * options.blocksize):
        parser.error(f"--hidden {options.hidden} is no multiple of {heads * options.blocksize}")
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        vocab_size=1000,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    device = torch.device(options.device)
    with device:
        dense = LlamaForCausalLM(config).eval().requires_grad_(False)
        prompt = torch.randint(1, config.vocab_size, (1, 16))
    dense.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    zero_random_blocks(dense, options.blocksize, options.sparsity)
    sparse = copy.deepcopy(dense)
    # min_sparsity: swap them all, for the table of break-even points is about many tokens.
    report = swap_to_bsr(sparse, options.blocksize, min_sparsity=0.5, fuse_activations=True)
    print(report)

    result: dict[str, object] = {"swapped": len(report.swapped)}
    for name, model in (("dense", dense), ("sparse", sparse)):
        torch.compiler.reset()
        tokens, rate = generate(model, prompt, options.new)
        result[f"{name} tokens"], result[f"{name} tokens/s"] = tokens, rate
        print(f"{name}: {rate:.1f} tokens/s")
    same = (result["dense tokens"] == result["sparse tokens"]).float().mean().item()
    # In bfloat16 two sums of the same numbers differ, and random weights have many a near tie.
    print(f"{same:.0%} of the tokens are the same")
    return result


if __name__ == "__main__":
    main()
