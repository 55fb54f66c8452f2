"""Small models of transformers, made from their configs: nothing is downloaded."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from torchao_superblock import SupermaskSparsifier, swap_to_bsr

WIDTH, VOCABULARY = 64, 96
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
MODELS = {  # class, config
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**DECODER}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 8}),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "image_size": 16,
            "patch_size": 8,
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_labels": 4,
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "d_kv": 16,
            "d_ff": 128,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 32,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
}


def build(name: str, **changes: object) -> nn.Module:
    """A model with random weights, in evaluation mode."""
    model, config, arguments = MODELS[name]
    config = getattr(transformers, config)(**{**arguments, **changes})
    return getattr(transformers, model)(config).eval()


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {
            "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
            "labels": torch.tensor([0, 3]),
        }
    tokens = torch.randint(1, VOCABULARY, (2, 7), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def targets(name: str) -> list[dict[str, str]]:
    """What is masked: linear layers of the blocks; of GPT-2, which has Conv1D there, these by name, and the head."""
    if name != "gpt2":
        return [{"tensor_fqn": "*layer*"}]
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    named = [f"transformer.h.{i}.{matrix}.weight" for i in range(2) for matrix in matrices]
    return [{"tensor_fqn": fqn} for fqn in ("lm_head.weight", *named)]


def train_and_squash(name: str, model: nn.Module, steps: int = 2, blocksize: int = 8) -> None:
    """Leaves a model whose masked weights have four fifths of their blocks at zero."""
    sparsifier = SupermaskSparsifier(0.8, blocksize)
    sparsifier.prepare(model, targets(name))
    optimizer = torch.optim.AdamW(sparsifier.param_groups(model, weight_decay=0.01), lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs_of(name)).loss.backward()
        optimizer.step()
        sparsifier.step()
    sparsifier.squash_mask()
    model.eval()


def sparse(name: str = "llama", **changes: object) -> nn.Module:
    """A swapped model."""
    model = build(name, **changes)
    train_and_squash(name, model, steps=1)
    report = swap_to_bsr(model, 8, min_sparsity=0.5)
    assert report.swapped
    return model
