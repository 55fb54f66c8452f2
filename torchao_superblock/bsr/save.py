"""`save_bsr`: a swapped model becomes one safetensors file."""

import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchao_superblock.bsr import tensor_file
from torchao_superblock.bsr.atomic_file import replacing
from torchao_superblock.bsr.format import check_bsr
from torchao_superblock.bsr.linear import BSRLinear
from torchao_superblock.bsr.serialization import describe, to_metadata
from torchao_superblock.common.modules import block_masks_of
from torchao_superblock.common.sharding import is_dtensor


def save_bsr(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model with :class:`BSRLinear` layers to one safetensors file.

    The file holds the `state_dict`; its metadata says which layers are block-sparse, and has a checksum for each
    tensor. Shared tensors are stored once. Equal models give equal files, byte for byte.

    An existing file is replaced only once the new one is complete and on the disk; it keeps its mode, and a symbolic
    link to it stays.

    Args:
        model: a swapped model; a model without a BSRLinear is saved as well. Of one wrapped by `torch.compile`,
            `DistributedDataParallel` or `DataParallel`, the module inside is saved.
        path: the file to write, usually `*.safetensors`.

    Raises:
        TypeError: the `state_dict` holds something that is not a plain dense tensor: another object, or a sharded,
            quantized, sparse-layout or complex tensor.
        ValueError: a tensor is on the meta device, the indices of a layer were overwritten with something that is no
            BSR pattern, or the model is itself a BSRLinear.
        RuntimeError: a block mask is not squashed yet.
        FileNotFoundError: the directory does not exist.
        OSError: the file cannot be written.

    Example:
        >>> save_bsr(model, "model.safetensors")  # doctest: +SKIP
        >>> load_bsr(build_model(), "model.safetensors")  # doctest: +SKIP
    """
    where = f"save_bsr: {os.fspath(path)!r}"
    model = _inside(model)
    if isinstance(model, BSRLinear):
        raise ValueError(
            f"{where}: the model is itself a BSRLinear and has no name in the file; wrap it in nn.Sequential, or save "
            "its state_dict"
        )
    for fqn, module in model.named_modules():
        if any(True for _ in block_masks_of(module)):
            raise RuntimeError(
                f"{where}: the block mask of {fqn or 'the model'!r} is not squashed yet; call "
                "sparsifier.squash_mask(), or torchao_superblock.squash(model), first"
            )
        if isinstance(module, BSRLinear) and not module.values.is_meta:
            shape = (module.out_features, module.in_features)
            indices = module.crow_indices, module.col_indices
            check_bsr(*indices, module.values, shape, module.blocksize, f"{where}: {fqn}")
    try:
        tensors, aliases = _storable(model.state_dict(), where)
        metadata = partial(to_metadata, describe(model, aliases))
        with replacing(path) as file:
            tensor_file.write_tensors(file, tensors, metadata)
    except OSError as error:
        text = f"save_bsr: {error.strerror or error}"
        raise OSError(error.errno, text, os.fspath(path)) from error
    except Exception as error:
        if where not in str(error):
            error.add_note(f"while saving to {os.fspath(path)!r}")
        raise


def _inside(model: nn.Module) -> nn.Module:
    """The module inside of wrappers that only change how it runs: names in files do not depend on them."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile
            model = model._orig_mod
        else:
            return model


def _storable(state: dict[str, Any], where: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state dict, and `name -> name` of those that are another one's memory."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[Any, ...], str] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{where}: {key!r} of the state dict is a {type(value).__name__}, not a tensor; "
                "use torch.save(model.state_dict(), path) for this model"
            )
        obstacle = _obstacle(value)
        if obstacle is not None:
            raise TypeError(
                f"{where}: {key!r} {obstacle}, which safetensors cannot store; make it a plain tensor first, or use "
                "torch.save(model.state_dict(), path) for this model"
            )
        if value.is_meta:
            raise ValueError(f"{where}: {key!r} is on the meta device and has no content to save")
        identity = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and identity in first_name:
            aliases[key] = first_name[identity]
            continue
        first_name[identity] = key
        tensors[key] = value
    return tensors, aliases


def _obstacle(tensor: Tensor) -> str | None:
    """Why a tensor is more than dense numbers of a known kind, or None."""
    if is_dtensor(tensor):
        return "is sharded (a DTensor)"
    if nn.parameter.is_lazy(tensor):
        return "has no shape yet; run the model once"
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"is a {type(tensor).__name__}"
    if tensor.is_quantized:
        return f"is quantized ({tensor.dtype})"
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}"
    if tensor.dtype not in tensor_file.DTYPES.values():
        return f"has the dtype {tensor.dtype}"
    return None
