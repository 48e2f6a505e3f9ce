"""The places where Transformers looks for files under a model's name, wrapped, so that it may be that of a container.

All loading goes through these few functions: each takes a name and finds files, and everything above them only passes
the name on. So configuration and model keep the name that the user gave. A name that is no `.axm` file is passed on
here, too, and nothing else is done about it.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import wrapt

_SUFFIX = ".axm"  # `srd_modifier.axm.entries` has more to say, and is not imported for other names

_Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


def install(module: ModuleType) -> None:
    """Wrap what is in one of `MODULES`, once it is imported."""
    for name, wrapper in _WRAPPERS[module.__name__].items():
        wrapt.wrap_function_wrapper(module, name, wrapper)


def _on_view(keyword: str) -> _Wrapper:
    """Call with the view of a container in the place of its name, which is the first argument or `keyword`."""

    def on_view(wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = _first(args, kwargs, keyword)
        if not _is_container(name):
            return wrapped(*args, **kwargs)
        from srd_modifier.transformers.containers import view_of

        view = str(view_of(name))
        return wrapped(view, *args[1:], **kwargs) if args else wrapped(**{**kwargs, keyword: view})

    return on_view


_NAME = "pretrained_model_name_or_path"
_read_files = _on_view(_NAME)


def _find_file(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`cached_files`. Where PEFT is installed it is asked for an adapter, too, whose weights PEFT would read itself."""
    found = _find_in_view(wrapped, instance, args, kwargs)
    name = _first(args, kwargs, "path_or_repo_id")
    if found is not None and _is_container(name):
        from srd_modifier.transformers.containers import refuse_adapter

        refuse_adapter(name, found)
    return found


_find_in_view = _on_view("path_or_repo_id")


def _load_tokenizer(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`from_pretrained` of tokenizers, which takes the name for that of a vocabulary file; it keeps the name, too."""
    tokenizer = _read_files(wrapped, instance, args, kwargs)
    name = _first(args, kwargs, _NAME)
    if _is_container(name):
        tokenizer.name_or_path = str(name)
        if "name_or_path" in getattr(tokenizer, "init_kwargs", {}):
            tokenizer.init_kwargs["name_or_path"] = str(name)
    return tokenizer


def _find_weights(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = _first(args, kwargs, _NAME)
    if _is_container(name):
        from srd_modifier.transformers.containers import check_weights

        check_weights(name, use_safetensors=kwargs.get("use_safetensors"))
    return _read_files(wrapped, instance, args, kwargs)


def _open_weights(wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`safe_open`."""
    entry = _entry_of(_first(args, kwargs, "filename"))
    if entry is None:
        return wrapped(*args, **kwargs)
    from srd_modifier.transformers.containers import MappedFile

    return MappedFile(entry, args[2] if len(args) > 2 else kwargs.get("device", "cpu"))


def _load_weights(wrapped: Callable[..., Any], _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`_load_pretrained_model(model, state_dict, checkpoint_files, load_config)`: no other way to read than mapping."""
    files = args[2] if len(args) > 2 else kwargs.get("checkpoint_files")
    entry = _entry_of(files[0]) if files else None
    if entry is None:
        return wrapped(*args, **kwargs)
    from srd_modifier.transformers.containers import refuse_offloading

    settings = args[3] if len(args) > 3 else kwargs["load_config"]
    refuse_offloading(entry, settings.device_map)
    if getattr(settings, "disable_mmap", None):
        settings = replace(settings, disable_mmap=False)
    return wrapped(*args[:3], **{**kwargs, "load_config": settings})


def _first(args: tuple[Any, ...], kwargs: dict[str, Any], keyword: str) -> Any:
    return args[0] if args else kwargs.get(keyword)


def _is_container(name: Any) -> bool:
    if not isinstance(name, str | os.PathLike) or not str(name).endswith(_SUFFIX):
        return False
    from srd_modifier.axm.entries import is_container

    return is_container(name)


def _entry_of(path: Any) -> Any:
    """The file in a container that a path stands for, None for all others: without the module there is no view yet."""
    find = getattr(sys.modules.get("srd_modifier.transformers.containers"), "entry_of", None)
    return None if find is None else find(path)


_WRAPPERS: dict[str, dict[str, _Wrapper]] = {
    "transformers.utils.hub": {"cached_files": _find_file},
    "transformers.configuration_utils": {"PreTrainedConfig.get_config_dict": _read_files},
    "transformers.generation.configuration_utils": {
        "GenerationConfig.from_pretrained": _on_view("pretrained_model_name")
    },
    "transformers.tokenization_utils_base": {"PreTrainedTokenizerBase.from_pretrained": _load_tokenizer},
    "transformers.tokenization_mistral_common": {"MistralCommonBackend.from_pretrained": _load_tokenizer},
    "transformers.processing_utils": {"ProcessorMixin.get_processor_dict": _read_files},
    "transformers.feature_extraction_utils": {"FeatureExtractionMixin.get_feature_extractor_dict": _read_files},
    "transformers.image_processing_base": {"ImageProcessingMixin.get_image_processor_dict": _read_files},
    "transformers.video_processing_utils": {"BaseVideoProcessor.get_video_processor_dict": _read_files},
    "transformers.modeling_utils": {
        "_get_resolved_checkpoint_files": _find_weights,
        "safe_open": _open_weights,
        "PreTrainedModel._load_pretrained_model": _load_weights,
    },
    # it has these under names of its own, wrapped already or not
    "transformers.modeling_layers": {"_get_resolved_checkpoint_files": _find_weights, "safe_open": _open_weights},
}

MODULES = tuple(_WRAPPERS)
"""The modules of Transformers that `install` knows."""
