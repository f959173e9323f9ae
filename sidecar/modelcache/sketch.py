"""What transformers does with a checkpoint's tensors on their way into a model, learned without their bytes.

``from_pretrained(None, config=…, state_dict=…)`` runs on sketches: tensors on the meta device that remember which
checkpoint tensor they came from and what was done to them. Afterwards each parameter of the model is a sketch that says
how to make it, so names, prefixes, merged experts, split or transposed weights, casts and ties are transformers' own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from modelcache.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from modelcache.plan import Stored

__all__ = ["Call", "Expression", "Leaf", "Sketch", "evaluate", "fusion_sources", "leaves", "sketch"]


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """The checkpoint's tensor itself."""

    stored: Stored


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One of the results of a torch function.

    Attributes:
        function: as torch dispatches it.
        args: positional arguments; sketches among them are replaced by their expressions.
        kwargs: keyword arguments, likewise.
        index: which result, where the function gives several; None: it gives one.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None = None


Expression = Leaf | Call


class Sketch(torch.Tensor):
    """A tensor without bytes that knows how it is made.

    Attributes:
        expression: what to compute it from.
    """

    expression: Expression

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        first = args[0] if args else None
        whole = func is torch.Tensor.__getitem__ and args[1:] == (...,)
        if whole or (func in _UNCHANGED and isinstance(first, Sketch)):
            return first
        if func is torch.Tensor.to:
            return _cast(*args, **kwargs)
        if func is torch.Tensor.__setitem__ and isinstance(first, Sketch):
            first.expression = Call(_with_items, _expressions(args), _expressions(kwargs))
            return None
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001 - torch documents it for __torch_function__
            result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            return _wrap(result, Call(func, _expressions(args), _expressions(kwargs)))
        if isinstance(result, (tuple, list)) and any(isinstance(each, torch.Tensor) for each in result):
            given, named = _expressions(args), _expressions(kwargs)
            return type(result)(_wrap(each, Call(func, given, named, index)) for index, each in enumerate(result))
        return result


_UNCHANGED = {torch.Tensor.detach, torch.Tensor.detach_, torch.Tensor.requires_grad_, torch.Tensor.cpu}


def _with_items(tensor: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    result = tensor.clone()
    result[index] = value
    return result


def sketch(stored: Stored, dtype: torch.dtype) -> Sketch:
    """A sketch of a tensor of the snapshot."""
    with torch.device("meta"):
        if stored.strides is None:
            empty = torch.empty(stored.shape, dtype=dtype)
        else:
            empty = torch.empty_strided(stored.shape, stored.strides, dtype=dtype)
    return _wrap(empty, Leaf(stored))


def leaves(expression: Expression) -> Iterator[Stored]:
    """The checkpoint tensors that an expression needs, in the order of their use."""
    if isinstance(expression, Leaf):
        yield expression.stored
        return
    for each in _walk((expression.args, expression.kwargs)):
        yield from leaves(each)


def evaluate(expression: Expression, values: Callable[[Stored], torch.Tensor]) -> torch.Tensor:
    """Computes an expression from real tensors.

    Args:
        expression: of a sketch.
        values: gives the real tensor of a checkpoint tensor.
    """
    if isinstance(expression, Leaf):
        return values(expression.stored)
    args, kwargs = _replace((expression.args, expression.kwargs), lambda each: evaluate(each, values))
    result = expression.function(*args, **kwargs)
    tensor = result if expression.index is None else result[expression.index]
    if not isinstance(tensor, torch.Tensor):
        raise UnsupportedModel(f"{expression.function} gave no tensor while a weight was converted.")
    return tensor


def fusion_sources(expression: Expression, result: torch.Tensor) -> tuple[Stored, ...] | None:
    """The checkpoint tensors whose bytes, one after another, are the result of an expression; None: they are not.

    Understood are stacks and concatenations whose result is row-major with each source in one piece: stack(dim 0),
    cat(dim 0), and cat(dim 1) of such stacks (Mixtral's gate_up_proj).
    """
    blocks = _blocks(expression)
    if blocks is None or len(blocks) < 2:
        return None
    if any(each.strides is not None for each in blocks) or sum(each.length for each in blocks) != (
        result.numel() * result.element_size()
    ):
        return None
    return tuple(blocks)


def _blocks(expression: Expression) -> list[Stored] | None:
    if isinstance(expression, Leaf):
        return [expression.stored]
    if expression.function not in {torch.stack, torch.cat} or not expression.args:
        return None
    dim = expression.kwargs.get("dim", expression.args[1] if len(expression.args) > 1 else 0)
    parts = list(expression.args[0])
    if dim == 0:
        inner = [_blocks(part) for part in parts]
        return None if any(each is None for each in inner) else [leaf for each in inner if each for leaf in each]
    if dim == 1 and expression.function is torch.cat:
        rows = [_rows(part) for part in parts]
        if any(row is None or len(row) != len(rows[0] or ()) for row in rows):
            return None
        return [leaf for group in zip(*(row for row in rows if row), strict=True) for leaf in group]
    return None


def _rows(expression: Expression) -> list[Stored] | None:
    """The tensors of a stack(dim 0), one for each index of its first dimension."""
    if isinstance(expression, Call) and expression.function is torch.stack:
        dim = expression.kwargs.get("dim", expression.args[1] if len(expression.args) > 1 else 0)
        parts = list(expression.args[0])
        if dim == 0 and all(isinstance(part, Leaf) for part in parts):
            return [part.stored for part in parts]
    return None


def _wrap(tensor: torch.Tensor, expression: Expression) -> Sketch:
    result: Sketch = tensor.as_subclass(Sketch)
    result.expression = expression
    return result


def _cast(tensor: Sketch, *args: Any, **kwargs: Any) -> Sketch:
    """``tensor.to(…)``: sketches stay on the meta device, whatever device is asked for; a new dtype is remembered."""
    dtypes = [each for each in (*args, kwargs.get("dtype")) if isinstance(each, torch.dtype)]
    if not dtypes or dtypes[0] == tensor.dtype:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
        result = tensor.to(dtypes[0])
    return _wrap(result, Call(torch.Tensor.to, (tensor.expression, dtypes[0]), {}))


def _expressions(value: Any) -> Any:
    if isinstance(value, Sketch):
        return value.expression
    if isinstance(value, dict):
        return {key: _expressions(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_expressions(each) for each in value)
    return value


def _walk(value: Any) -> Iterator[Expression]:
    if isinstance(value, (Leaf, Call)):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _walk(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _walk(each)


def _replace(value: Any, make: Callable[[Expression], torch.Tensor]) -> Any:
    if isinstance(value, (Leaf, Call)):
        return make(value)
    if isinstance(value, dict):
        return {key: _replace(each, make) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_replace(each, make) for each in value)
    return value
