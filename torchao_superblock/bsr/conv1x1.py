"""`BSRConv1x1`: a 1x1 convolution, which is a linear layer over the channels of each pixel, in BSR format.

Legend: B images, K in channels, N out channels, H x W pixels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from torchao_superblock.bsr.linear import BSRLinear

# Where the break-even points below were measured: one thread of a server with AVX-512 in float32, all shapes of a
# ResNet-50, 1 and 8 images. Channels-last, half of the blocks stored, blocks of 16 reach 1.13x to 3.4x of the dense
# speed and blocks of 32 1.26x to 3.1x; a tenth stored 1.6x to 17x. Contiguous images take 0.17x to 4.9x.
_MEASURED = ("cpu",)
_PLAIN = {"kernel_size": (1, 1), "dilation": (1, 1), "groups": 1}


def conv_obstacle(conv: nn.Module) -> str | None:
    """Why a convolution is no linear layer over its channels: a sentence, or None."""
    settings = [
        f"{name}={getattr(conv, name)}"
        for name, value in _PLAIN.items()
        if getattr(conv, name) != value
    ]
    # "same" and "valid" add nothing around a kernel of one pixel.
    if not isinstance(conv.padding, str) and any(conv.padding):
        settings.append(f"padding={conv.padding}")
    if not settings:
        return None
    return (
        f"it has {', '.join(settings)}; of convolutions, 1x1 ones with groups=1 and nothing around the image have a "
        "block-sparse twin"
    )


def _is_channels_last(x: Tensor) -> bool:
    """Whether torch takes a tensor `(..., K, H, W)` for one; of a single pixel it goes by the strides, too."""
    if x.is_contiguous():
        return x.stride(-1) > 1 and x.stride(-3) == 1
    return x.stride(-3) == 1


class BSRConv1x1(BSRLinear):
    """An `nn.Conv2d` of kernel size 1, `groups=1` and no padding, with its weight in BSR format; any stride.

    Channels-last input, as `x.to(memory_format=torch.channels_last)` gives it, is multiplied as it lies in memory (with
    a stride, the pixels that are read are copied first). Contiguous input is copied to that order, and the output back.
    As that of `nn.Conv2d`, the output is channels-last if the input is, or if the dense weight was.

    On a CPU that reordering takes longer than the dense product of most shapes, so :func:`swap_to_bsr` leaves a
    convolution alone whose weight is contiguous, unless it is given `min_sparsity` or `measure`: call
    `model.to(memory_format=torch.channels_last)` first, as for any convolution that is to be fast.

    Parameters, buffers, `state_dict` and what raises are those of :class:`BSRLinear`, which this is over the channels
    of each pixel: `in_features` are the channels that come in. `padding` of `"same"` or `"valid"`, which add nothing
    to a kernel of one pixel, is 0 after :func:`swap_to_dense`.

    Args:
        in_channels: K.
        out_channels: N.
        blocksize: as in :class:`BSRLinear`.
        crow_indices: `(R + 1,)` int32, R = ceil(N / rows).
        col_indices: `(nnz,)` int32, sorted and unique in each block row.
        values: `(nnz, rows, cols)`, float32, float64, float16 or bfloat16. A Parameter is taken as it is.
        bias: `(N,)` of the same dtype, or None. A Parameter is taken as it is.
        stride: of the pixels that are read, `(rows, columns)` of the image.
        channels_last: whether the output is channels-last whatever the input.
        activation: as in :class:`BSRLinear`.
        dense_shape: as in :class:`BSRLinear`.

    Attributes:
        weight: a stand-in for the `(N, K)` weight, that `F.linear` can be called with.

    Raises:
        ValueError, TypeError: the arguments break an invariant; the message says which.

    Example:
        >>> conv = torch.nn.Conv2d(128, 64, 1, stride=2)
        >>> with torch.no_grad():
        ...     _ = conv.weight[:, 32:].zero_()
        >>> layer = BSRConv1x1.from_dense(conv, blocksize=32)
        >>> layer
        BSRConv1x1(128, 64, stride=(2, 2), bias=True, blocksize=(32, 32), sparsity=0.7500)
        >>> layer(torch.ones(2, 128, 7, 7)).shape
        torch.Size([2, 64, 4, 4])
    """

    DENSE = "nn.Conv2d"
    LEAST_SPARSITY = 0.5

    kernel_size, padding, dilation, groups = (1, 1), (0, 0), (1, 1), 1
    padding_mode = "zeros"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocksize: int | tuple[int, int],
        crow_indices: Tensor,
        col_indices: Tensor,
        values: Tensor,
        bias: Tensor | None = None,
        *,
        stride: tuple[int, int] = (1, 1),
        channels_last: bool = False,
        activation: str = "none",
        dense_shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            blocksize,
            crow_indices,
            col_indices,
            values,
            bias,
            activation=activation,
            dense_shape=dense_shape,
        )
        if len(stride) != 2 or not all(type(step) is int and step > 0 for step in stride):
            raise ValueError(f"BSRConv1x1: stride must be a pair of positive ints, got {stride!r}")
        self.stride = tuple(stride)
        self.channels_last = channels_last

    @staticmethod
    def features_of(module: nn.Module) -> tuple[int, int]:
        return module.out_channels, module.in_channels

    @staticmethod
    def settings_of(module: nn.Module) -> dict[str, Any]:
        if isinstance(module, BSRConv1x1):
            return {"stride": module.stride, "channels_last": module.channels_last}
        return {"stride": module.stride, "channels_last": _is_channels_last(module.weight)}

    @staticmethod
    def loss_of(module: nn.Module) -> str | None:
        weight = module.weight
        if weight.device.type not in _MEASURED:
            return (
                f"nobody has measured 1x1 convolutions on {weight.device.type}; pass measure=example_input to time "
                "it, or min_sparsity"
            )
        if _is_channels_last(weight):
            return None
        return (
            "contiguous images would be reordered, which takes longer than most dense 1x1 convolutions; call "
            "model.to(memory_format=torch.channels_last) first, or pass measure=example_input or min_sparsity"
        )

    @staticmethod
    def matrix_of(weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @staticmethod
    def weight_of(matrix: Tensor) -> Tensor:
        return matrix[:, :, None, None]

    def dense_module(self, matrix: Tensor, bias: nn.Parameter | None) -> nn.Module:
        N, K = matrix.shape
        conv = nn.Conv2d(K, N, 1, self.stride, bias=bias is not None, device="meta")
        weight = self.weight_of(matrix)
        if self.channels_last:
            weight = weight.to(memory_format=torch.channels_last)
        conv.weight = nn.Parameter(weight, self.values.requires_grad)
        conv.bias = bias
        return conv.train(self.training)

    @property
    def in_channels(self) -> int:
        return self.in_features

    @property
    def out_channels(self) -> int:
        return self.out_features

    def to_dense(self) -> Tensor:
        """The dense `(out_channels, in_channels, 1, 1)` weight; differentiable in `values`."""
        return self.weight_of(super().to_dense())

    def forward(self, x: Tensor) -> Tensor:
        """`(B, K, H, W)` -> `(B, N, ceil(H / stride), ceil(W / stride))`; both may lack B."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_features:
            raise ValueError(
                f"BSRConv1x1: x must have shape (images, {self.in_features}, height, width), or lack the images, got "
                f"{tuple(x.shape)}"
            )
        channels_last = self.channels_last or _is_channels_last(x)
        rows, columns = self.stride
        if self.stride != (1, 1):
            x = x[..., ::rows, ::columns]
        y = super().forward(x.movedim(-3, -1)).movedim(-1, -3)
        return y if channels_last else y.contiguous()

    def extra_repr(self) -> str:
        _, _, rest = super().extra_repr().partition(", bias=")
        stride = "" if self.stride == (1, 1) else f", stride={self.stride}"
        return f"{self.in_channels}, {self.out_channels}{stride}, bias={rest}"
