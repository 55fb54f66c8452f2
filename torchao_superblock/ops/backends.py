"""Which kernel serves which device here, and why."""

import torch

from torchao_superblock.ops.bsr_linear import cpu_backend, cuda_backend


class Backends(dict[str, dict[str, object]]):
    """`device type -> {"name", "reason", ...}`; prints as a list."""

    def __str__(self) -> str:
        lines = []
        for device_type, info in self.items():
            lines.append(f"{device_type}: {info['name']} ({info['reason']})")
            lines += [
                f"    {key}: {value}"
                for key, value in info.items()
                if key not in ("name", "reason")
            ]
        return "\n".join(lines)


def backends() -> Backends:
    """Say which kernels `bsr_linear` uses on this machine.

    Returns:
        A dict `device type -> info` that prints readably. Each info holds at least `name` (for example
        `"pytorch"`) and `reason` (a sentence), and what else the backend has to say of itself, such as its
        instruction set.

    Example:
        >>> print(backends())  # doctest: +SKIP
        cpu: c-avx2 (the compiled kernel is built from this very source)
        cuda: none (torch.cuda.is_available() is False)
    """
    found = Backends(cpu=cpu_backend().backend_info())
    if torch.cuda.is_available():
        found["cuda"] = cuda_backend().backend_info()
    else:
        found["cuda"] = {"name": "none", "reason": "torch.cuda.is_available() is False"}
    return found
