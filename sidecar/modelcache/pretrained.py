"""From a snapshot to a transformers class and config, without asking any hub."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelcache.deadline import Deadline
from modelcache.errors import FileNotInSnapshot, UnsupportedModel
from modelcache.files import find_file, read_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig, PreTrainedModel

    from modelcache.connection import PinnedSnapshot
    from modelcache.deadline import Cancellation

__all__ = ["Pretrained", "check_class", "for_its_architecture", "load_pretrained", "without_progress_bar"]

_SMALL_FILES = ("config.json", "generation_config.json")
# Arguments of from_pretrained that are no attributes of a config.
_LOAD_ARGS = ("dtype", "torch_dtype", "attn_implementation", "experts_implementation")


class Pretrained:
    """What transformers needs to know before any weight is read.

    Attributes:
        config: of the checkpoint, with the caller's changes.
        model_class: concrete class to build.
        model_args: what is left for its ``from_pretrained``.
        generation_config: of the checkpoint; None: the model takes none, or the caller's.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        model_class: type[PreTrainedModel],
        model_args: dict[str, Any],
        generation_config: Any,
    ) -> None:
        self.config = config
        self.model_class = model_class
        self.model_args = model_args
        self.generation_config = generation_config


def load_pretrained(
    snapshot: PinnedSnapshot,
    auto_class: str | type,
    arguments: dict[str, Any],
    *,
    subfolder: str = "",
    timeout: float = 60.0,
    cancellation: Cancellation | None = None,
) -> Pretrained:
    """Reads the config over the wire and finds the class to build.

    Args:
        snapshot: to read from.
        auto_class: an Auto class or a model class of transformers, or the name of one.
        arguments: as for ``from_pretrained``: dtype, attn_implementation, attributes of the config, of the model.
        subfolder: of the config in the snapshot.
        timeout: seconds.
        cancellation: ends it earlier.

    Raises:
        UnsupportedModel: quantized weights, code that comes with the repo, or an adapter.
        FileNotInSnapshot: there is no config.json.
    """
    import transformers  # noqa: PLC0415 - it takes a second, and whoever only wants files does not need it

    prefix = f"{subfolder.rstrip('/')}/" if subfolder else ""
    if find_file(snapshot.manifest, f"{prefix}adapter_config.json") and not find_file(
        snapshot.manifest, f"{prefix}config.json"
    ):
        raise UnsupportedModel(
            "The snapshot is an adapter, which needs its base model: modelcache.snapshot() gives its files for peft."
        )
    deadline = Deadline(timeout, cancellation)
    with tempfile.TemporaryDirectory(prefix="modelcache-") as folder:
        for name in _SMALL_FILES:
            try:
                content = read_file(snapshot, f"{prefix}{name}", deadline)
            except FileNotInSnapshot:
                if name == "config.json":
                    raise
                continue
            if name == "config.json":
                _check_config(content)
            (Path(folder) / name).write_bytes(content)
        load_args = {key: arguments[key] for key in _LOAD_ARGS if key in arguments}
        others = {key: value for key, value in arguments.items() if key not in load_args}
        config, unused = transformers.AutoConfig.from_pretrained(
            folder, return_unused_kwargs=True, trust_remote_code=False, local_files_only=True, **others
        )
        model_class = _concrete_class(auto_class, config)
        if _is_part(config, model_class):
            if check_class(auto_class) is model_class:
                config, unused = model_class.config_class.from_pretrained(
                    folder, return_unused_kwargs=True, local_files_only=True, **others
                )
            else:
                config = config.get_text_config()
        unused.pop("local_files_only", None)
        generation = None
        if model_class.can_generate() and "generation_config" not in unused:
            # As from_pretrained does, which here gets no folder: older checkpoints have these settings in config.json.
            own = (Path(folder) / "generation_config.json").exists()
            name = "generation_config.json" if own else "config.json"
            generation = transformers.GenerationConfig.from_pretrained(
                folder, config_file_name=name, _from_model_config=not own
            )
    config.name_or_path = config._name_or_path = ""  # noqa: SLF001 - the folder is gone
    return Pretrained(config, model_class, {**load_args, **unused}, generation)


@contextlib.contextmanager
def without_progress_bar() -> Iterator[None]:
    """Has transformers show no progress of what is only put in its place: the bytes are here already, or not yet."""
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415 - importing it takes a second

    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if bar:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def for_its_architecture(model_class: type[PreTrainedModel], config: PretrainedConfig) -> Iterator[None]:
    """Says that a class is another architecture's, where building it from the snapshot's config fails meanwhile."""
    try:
        yield
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(config, model_class.config_class or object):
            raise
        raise UnsupportedModel(
            f"{model_class.__name__} cannot be built from the snapshot's config, which is a {config.model_type!r}: "
            f"{error} Use a class of that architecture, or an Auto class."
        ) from error


def _check_config(content: bytes) -> None:
    config = json.loads(content)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "")
        raise UnsupportedModel(
            f"The weights are quantized ({method or 'quantization_config'}), which cannot be streamed layer by layer: "
            "load them whole from the folder that modelcache.snapshot() gives."
        )
    if config.get("auto_map") and not _known(config.get("model_type", "")):
        raise UnsupportedModel(
            "The model's code comes with its repo, and code from a repo is never run here: check it, and load the "
            "folder that modelcache.snapshot() gives with trust_remote_code=True."
        )


def _known(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415

    return model_type in CONFIG_MAPPING


def _is_part(config: PretrainedConfig, model_class: type[PreTrainedModel]) -> bool:
    """Whether a class is a part of what the config describes (CLIPTextModel of CLIP), and has its own config there."""
    wanted: Any = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return False
    return any(isinstance(getattr(config, name, None), wanted) for name in config.sub_configs)


def check_class(auto_class: str | type) -> Any:
    """The class of that name; it may still be none of a model.

    Raises:
        UnsupportedModel: transformers has none, such as where the model's name was given in its place.
    """
    import transformers  # noqa: PLC0415

    found = getattr(transformers, auto_class, None) if isinstance(auto_class, str) else auto_class
    if found is None:
        raise UnsupportedModel(
            f"The installed transformers has no class {auto_class!r}. Write one such as 'AutoModel'; "
            "from_pretrained() takes it before the model's name."
        )
    return found


def _concrete_class(auto_class: str | type, config: PretrainedConfig) -> type[PreTrainedModel]:
    import transformers  # noqa: PLC0415

    found = check_class(auto_class)
    mapping = getattr(found, "_model_mapping", None)
    if mapping is None:
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise UnsupportedModel(f"{auto_class!r} is no model class of transformers.")
        return found
    if type(config) not in mapping:
        raise UnsupportedModel(f"{found.__name__} has no model for {config.model_type!r}.")
    classes = mapping[type(config)]
    if not isinstance(classes, (list, tuple)):
        classes = (classes,)
    by_name: dict[str, type[PreTrainedModel]] = {each.__name__: each for each in classes}
    wanted = [by_name[name] for name in getattr(config, "architectures", None) or () if name in by_name]
    return wanted[0] if wanted else next(iter(by_name.values()))
