"""safetensors' names of element types, as torch has them, and what transformers makes of tensors of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from modelcache.errors import UnsupportedModel

if TYPE_CHECKING:
    from modelcache.plan import Stored

__all__ = ["as_parameter", "torch_dtype", "torch_shape"]

_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "C64": "complex64",
    "C128": "complex128",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def torch_dtype(stored: Stored) -> torch.dtype:
    """The dtype of a stored tensor.

    Raises:
        UnsupportedModel: the installed torch has no such dtype.
    """
    dtype = getattr(torch, _NAMES.get(stored.dtype, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedModel(
            f"Tensor {stored.name!r} is of type {stored.dtype}, which torch {torch.__version__} does not have; "
            "modelcache.snapshot() gives the files themselves."
        )
    return dtype


def torch_shape(stored: Stored) -> tuple[int, ...]:
    """The shape that torch gives a stored tensor: two neighbours of 4 bits are one element of its dtype."""
    if stored.dtype == "F4":
        return *stored.shape[:-1], stored.shape[-1] // 2
    return stored.shape


def as_parameter(tensor: torch.Tensor) -> nn.Parameter:
    """A parameter as transformers makes it.

    It says that it wants a gradient, though none is computed: torch's matmul asks for that when it chooses a kernel,
    and other kernels give other bits.
    """
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
