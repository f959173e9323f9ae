"""Copies of loaded weights on an accelerator: from pinned memory, on a stream of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from modelcache.dtypes import as_parameter
from modelcache.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["copier"]


def copier(device: str | torch.device) -> Callable[[list[torch.Tensor]], list[torch.Tensor]] | None:
    """What moves a component's tensors to a device, from a background thread; None: they stay where they are.

    Raises:
        UnsupportedModel: the device is neither the CPU nor a CUDA GPU that torch can use.
    """
    wanted = torch.device(device)
    if wanted.type == "cpu":
        return None
    if wanted.type != "cuda" or not torch.cuda.is_available():
        raise UnsupportedModel(f"Models can be streamed to cpu or cuda; {wanted} is not available here.")
    stream = torch.cuda.Stream(wanted)  # type: ignore[no-untyped-call]

    def move(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        # The forward pass goes on meanwhile on its own stream; what it gets here has arrived.
        with torch.cuda.stream(stream):
            moved = [_to(tensor, wanted) for tensor in tensors]
        stream.synchronize()
        return moved

    return move


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    moved = tensor.detach().pin_memory().to(device, non_blocking=True)
    return as_parameter(moved) if isinstance(tensor, nn.Parameter) else moved
