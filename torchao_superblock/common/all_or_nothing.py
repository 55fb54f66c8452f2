"""All or nothing: what changes a model either succeeds or leaves it as it was."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def all_or_nothing(model: nn.Module, tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put a model back as it was if the block raises, and let the error through.

    Remembered without copies: the attributes, class, children, parameters, buffers and hooks of each module. The state
    of torch's random number generators, of the CPU and of the devices that the model lives on, goes back too.

    Args:
        model: what the block changes; it or a part of it.
        tensors: those whose contents the block overwrites; they are copied.
    """
    registries = [
        name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)
    ]
    modules = [
        (
            module,
            type(module),
            dict(vars(module)),
            [
                (registry, dict(registry) if isinstance(registry, dict) else set(registry))
                for registry in map(vars(module).get, registries)
                if registry is not None
            ],
        )
        for module in model.modules()
    ]
    contents = [(tensor, tensor.detach().clone()) for tensor in tensors]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    generators = [(torch.set_rng_state, (torch.get_rng_state(),))]
    for device in devices - {torch.device("cpu"), torch.device("meta")}:
        namespace = torch.get_device_module(device)
        generators.append((namespace.set_rng_state, (namespace.get_rng_state(device), device)))
    try:
        yield
    except BaseException as error:
        for module, kind, attributes, entries in modules:
            if type(module) is not kind:
                module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            for registry, content in entries:
                registry.clear()
                registry.update(content)
        for tensor, content in contents:
            try:
                overwrite(tensor, content)
            except (
                Exception
            ) as refusal:  # one that cannot be written must not keep the others from it
                if not torch.allclose(tensor, content, 0, 0, equal_nan=True):
                    error.add_note(f"a tensor of the model could not be put back: {refusal}")
        for set_state, arguments in generators:
            set_state(*arguments)
        raise


def overwrite(tensor: Tensor, content: Tensor) -> None:
    """`tensor.copy_(content)`, also for leaves that require gradients and for tensors made in inference mode."""
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(content)
