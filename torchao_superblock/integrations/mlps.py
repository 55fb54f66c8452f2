"""What tracing cannot know about MLPs of torch, transformers and timm: one line for each class, by name.

Names need no import of their library, so `bsr/dataflow.py` loads this file for any model. A class of your own is a line
of the same kind in your program.
"""

import torch.nn.functional as F
from torch import nn

from torchao_superblock.bsr.dataflow import register_mlp
from torchao_superblock.bsr.folded_activation import register_activation

# The rest of these layers, attention above all, cannot be traced.
for _cls in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
    register_mlp(_cls, method="_ff_block")

_BERT_LIKE = {
    "bert": "Bert",
    "camembert": "Camembert",
    "data2vec": "Data2VecText",
    "electra": "Electra",
    "ernie": "Ernie",
    "layoutlm": "LayoutLM",
    "roberta": "Roberta",
    "roc_bert": "RoCBert",
    "roformer": "RoFormer",
    "splinter": "Splinter",
    "tapas": "Tapas",
    "xlm_roberta": "XLMRoberta",
}
for _folder, _name in _BERT_LIKE.items():
    _file = "modeling_data2vec_text" if _folder == "data2vec" else f"modeling_{_folder}"
    register_mlp(
        f"transformers.models.{_folder}.{_file}.{_name}Layer",
        method="feed_forward_chunk",
        opened=("intermediate", "output"),
    )
register_mlp("transformers.models.distilbert.modeling_distilbert.FFN", method="ff_chunk")


def _is_torch_gelu(module: nn.Module) -> str | None:
    """The op's name for a class of transformers that holds what it applies: torch's function, or a formula."""
    return "gelu" if module.act is F.gelu else None


for _name, _activation, _to_rounding in (
    ("GELUActivation", _is_torch_gelu, False),
    ("GELUTanh", "gelu_tanh", True),
    ("PytorchGELUTanh", "gelu_tanh", False),
    ("NewGELUActivation", "gelu_tanh", True),
    ("FastGELUActivation", "gelu_tanh", True),
    ("SiLUActivation", "silu", False),
    ("QuickGELUActivation", "quick_gelu", True),
):
    register_activation(f"transformers.activations.{_name}", _activation, to_rounding=_to_rounding)
for _name, _activation, _to_rounding in (
    ("GELU", "gelu", False),
    ("GELUTanh", "gelu_tanh", False),
    ("Swish", "silu", True),
    ("QuickGELU", "quick_gelu", True),
):
    register_activation(f"timm.layers.activations.{_name}", _activation, to_rounding=_to_rounding)
