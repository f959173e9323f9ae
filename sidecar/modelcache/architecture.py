"""A transformers model without its weights, and what to load for each of its parts.

The model is built by transformers itself from sketches of the checkpoint (sketch.py). Its repeated blocks are found in
the module tree, not listed by hand: the outermost ``ModuleList`` of at least two children of one class. Each block is
loaded when it is called; everything else stays in memory.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modelcache.dtypes import as_parameter, torch_dtype
from modelcache.errors import MissingWeights, UnsupportedModel
from modelcache.plan import Fusion, Layout, Stored, lay_out
from modelcache.pretrained import for_its_architecture, without_progress_bar
from modelcache.sketch import Expression, Leaf, Sketch, fusion_sources, leaves, sketch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["Architecture", "Binding", "Component", "Place", "build", "find_blocks"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module keeps a parameter or buffer."""

    module: nn.Module
    attribute: str
    parameter: bool

    def put(self, tensor: torch.Tensor) -> None:
        """Sets it without nn.Module's bookkeeping, which costs more than the swap itself."""
        store = self.module._parameters if self.parameter else self.module._buffers  # noqa: SLF001
        store[self.attribute] = tensor  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class Binding:
    """One parameter or buffer that comes from the checkpoint.

    Attributes:
        name: as the model calls it (the first of its names, if it is tied).
        places: all modules that hold it.
        expression: how to make it from checkpoint tensors.
        fusion: index into the layout's fused tensors; None: it is no fusion.
        meta: what stands in its places while it is not loaded.
    """

    name: str
    places: tuple[Place, ...]
    expression: Expression
    fusion: int | None
    meta: torch.Tensor

    @property
    def parameter(self) -> bool:
        """Whether modules hold it as a parameter, not as a buffer."""
        return any(place.parameter for place in self.places)


@dataclass(frozen=True, slots=True)
class Component:
    """What is loaded at once.

    Attributes:
        name: path of its module in the model.
        module: whose call needs it; None: it is resident.
        bindings: its parameters and buffers.
        layout: of what the parameters look at directly.
        scratch: of what they are computed from; its memory is free again after the load.
        nbytes: memory it holds once loaded.
    """

    name: str
    module: nn.Module | None
    bindings: tuple[Binding, ...]
    layout: Layout
    scratch: Layout
    nbytes: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model whose weights are on meta, and its parts.

    Attributes:
        model: in eval mode; buffers that no checkpoint holds are real.
        blocks: loaded when called, in module order.
        resident: loaded before the first call and kept.
        buffers: what no checkpoint holds, and where it is kept.
    """

    model: PreTrainedModel
    blocks: tuple[Component, ...]
    resident: tuple[Component, ...]
    buffers: tuple[tuple[Place, torch.Tensor], ...]


def build(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    tensors: Sequence[Stored],
    *,
    model_args: dict[str, Any],
    block_limit: int | None = None,
) -> Architecture:
    """Has transformers build the model, and plans what to load for each component.

    Args:
        model_class: a concrete class, such as BertModel.
        config: of the checkpoint.
        tensors: of the checkpoint.
        model_args: further arguments of ``from_pretrained`` (dtype, attn_implementation) or of the model.
        block_limit: a block of more bytes than this is taken apart, if there are blocks in it.

    Raises:
        MissingWeights: the model has parameters that the checkpoint lacks.
        UnsupportedModel: transformers cannot convert the checkpoint without its bytes.
    """
    model = _sketch_model(model_class, config, tensors, model_args)
    _refuse_random(model, lambda: _sketch_model(model_class, config, tensors, model_args))
    _tie_equal(model)
    owners: dict[int, list[tuple[str, Place]]] = defaultdict(list)
    sketches: dict[int, Sketch] = {}
    buffers = []
    for name, place, tensor in _places(model):
        if not isinstance(tensor, Sketch):
            buffers.append((place, tensor))
        if isinstance(tensor, Sketch):
            sketches[id(tensor)] = tensor
            if place not in [known for _, known in owners[id(tensor)]]:
                owners[id(tensor)].append((name, place))
    if block_limit is None:
        blocks = dict(find_blocks(model))
    else:
        sizes = _module_sizes(model)
        blocks = dict(find_blocks(model, lambda name: sizes[name] <= block_limit))
    grouped: dict[str, list[tuple[Sketch, list[tuple[str, Place]]]]] = {name: [] for name in blocks}
    ancestors = {prefix for name in blocks for prefix in _prefixes(name)[:-1]} | {""}
    for key, found in owners.items():
        homes = {_home(name, blocks, ancestors) for name, _ in found}
        home = homes.pop() if len(homes) == 1 else _resident_home(found[0][0], ancestors, blocks)
        grouped.setdefault(home, []).append((sketches[key], found))
    components = {name: _component(name, blocks.get(name), members) for name, members in grouped.items()}
    return Architecture(
        model=model,
        blocks=tuple(components[name] for name in blocks if components[name].bindings),
        resident=tuple(component for name, component in components.items() if name not in blocks),
        buffers=tuple(buffers),
    )


def find_blocks(model: nn.Module, fits: Callable[[str], bool] = lambda _: True) -> Iterator[tuple[str, nn.Module]]:
    """The repeated blocks of a model, in module order.

    Args:
        model: any module tree.
        fits: whether the block of this name may be loaded at once; else it is taken apart, if there are blocks in it.

    Yields:
        Qualified name and module of each block.
    """
    yield from _find_blocks("", model, fits)


def _find_blocks(prefix: str, module: nn.Module, fits: Callable[[str], bool]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if not _is_block_list(child):
            yield from _find_blocks(f"{path}.", child, fits)
            continue
        for index, block in child.named_children():
            inner = [] if fits(f"{path}.{index}") else list(_find_blocks(f"{path}.{index}.", block, fits))
            yield from inner or [(f"{path}.{index}", block)]


def _is_block_list(module: nn.Module) -> bool:
    children = list(module.children())
    return (
        isinstance(module, nn.ModuleList)
        and len(children) >= 2
        and len({type(child) for child in children}) == 1
        and not isinstance(children[0], (nn.ModuleList, nn.ModuleDict))
    )


def _sketch_model(
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    tensors: Sequence[Stored],
    model_args: dict[str, Any],
) -> PreTrainedModel:
    state = {tensor.name: sketch(tensor, torch_dtype(tensor)) for tensor in tensors}
    with _quiet_transformers(), for_its_architecture(model_class, config):
        loaded: Any = model_class.from_pretrained(
            None, config=config, state_dict=state, output_loading_info=True, **model_args
        )
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    missing = sorted(info["missing_keys"])
    if missing:
        raise MissingWeights(
            f"The snapshot has no weights for {_listed(missing)} of {model_class.__name__}; transformers would fill "
            "them with random numbers. Use a class whose weights are in the snapshot, or another snapshot.",
            names=tuple(missing),
        )
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise UnsupportedModel(
            f"{name} has shape {tuple(found)} in the snapshot and {tuple(wanted)} in {model_class.__name__}: "
            "the config does not belong to these weights."
        )
    return model


def _refuse_random(model: PreTrainedModel, build_again: Callable[[], PreTrainedModel]) -> None:
    """Of weights that a checkpoint need not have (sinusoidal positions), those that come out random are missing."""
    made = {
        name: tensor for name, place, tensor in _places(model) if place.parameter and not isinstance(tensor, Sketch)
    }
    if not made:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() ^ 1)
        again = {name: tensor for name, _, tensor in _places(build_again())}
    random = sorted(name for name, tensor in made.items() if not torch.equal(tensor, again[name]))
    if random:
        raise MissingWeights(
            f"The snapshot has no weights for {_listed(random)}; transformers would fill them with random numbers.",
            names=tuple(random),
        )


def _tie_equal(model: PreTrainedModel) -> None:
    """Ties weights that the config ties and the checkpoint holds twice, if they are equal, as transformers does.

    transformers compares their values; here, their types, shapes and all of their checksums.
    """
    places = {name: (place, tensor) for name, place, tensor in _places(model)}
    for target, source in model.all_tied_weights_keys.items():
        (place, left), (_, right) = places[target], places[source]
        if left is right or not (isinstance(left, Sketch) and isinstance(right, Sketch)):
            continue
        if isinstance(left.expression, Leaf) and isinstance(right.expression, Leaf):
            one, other = left.expression.stored, right.expression.stored
            if (one.dtype, one.shape, one.crc) == (other.dtype, other.shape, other.crc):
                place.put(right)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences the progress bar and the report of a load that reads nothing; what matters of it is raised."""
    report = logging.getLogger("transformers.modeling_utils")
    here = threading.get_ident()

    def from_elsewhere(_: logging.LogRecord) -> bool:
        return threading.get_ident() != here

    report.addFilter(from_elsewhere)
    try:
        with without_progress_bar():
            yield
    finally:
        report.removeFilter(from_elsewhere)


def _places(model: nn.Module) -> Iterator[tuple[str, Place, torch.Tensor]]:
    """Every parameter and buffer under each of its names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for parameter, store in ((True, module._parameters), (False, module._buffers)):  # noqa: SLF001
            for attribute, tensor in store.items():
                if tensor is not None:
                    name = f"{prefix}.{attribute}" if prefix else attribute
                    yield name, Place(module, attribute, parameter), tensor


def _module_sizes(model: nn.Module) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for name, _, tensor in _places(model):
        for prefix in _prefixes(name)[:-1]:
            sizes[prefix] += tensor.numel() * tensor.element_size()
    return sizes


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: index + 1]) for index in range(len(parts))]


def _home(name: str, blocks: dict[str, nn.Module], ancestors: set[str]) -> str:
    block = next((prefix for prefix in _prefixes(name) if prefix in blocks), None)
    return block if block is not None else _resident_home(name, ancestors, blocks)


def _resident_home(name: str, ancestors: set[str], blocks: dict[str, nn.Module]) -> str:
    """The outermost module on the way to a parameter that holds no block; for a parameter of its own, that module."""
    prefixes = _prefixes(name)[:-1]
    home = next((prefix for prefix in prefixes if prefix not in ancestors and prefix not in blocks), None)
    if home is not None:
        return home
    return f"{prefixes[-1]}.*" if prefixes else "*"


def _component(name: str, module: nn.Module | None, members: list[tuple[Sketch, list[tuple[str, Place]]]]) -> Component:
    direct: list[Stored] = []
    computed: list[Stored] = []
    fusions: list[Fusion] = []
    bindings = []
    extra = 0
    for tensor, found in members:
        expression = tensor.expression
        fusion = None
        if isinstance(expression, Leaf):
            direct.append(expression.stored)
        elif (sources := fusion_sources(expression, tensor)) is not None:
            fusion = len(fusions)
            fusions.append(Fusion(sources))
        else:
            computed.extend(leaves(expression))
            extra += tensor.numel() * tensor.element_size()
        meta = _meta(tensor, parameter=found[0][1].parameter)
        for _, place in found:
            place.put(meta)
        bindings.append(Binding(found[0][0], tuple(place for _, place in found), expression, fusion, meta))
    layout = lay_out(direct, fusions)
    scratch = lay_out(computed)
    return Component(name, module, tuple(bindings), layout, scratch, layout.nbytes + extra)


def _meta(tensor: Sketch, *, parameter: bool) -> torch.Tensor:
    with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
        plain = tensor.as_subclass(torch.Tensor)
    return as_parameter(plain) if parameter else plain


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
