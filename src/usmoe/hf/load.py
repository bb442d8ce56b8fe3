"""Loading a model and its tokenizer: the shipped one, a folder, or a hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto import modeling_auto

from usmoe.hf.adapters import ADAPTER, BESIDE, adapter_in, routers_beside
from usmoe.hf.patch import patch, patch_of, routers, supported_layers
from usmoe.hf.saved import data_of, routers_in, routers_of, take_cuts, told, without_routers
from usmoe.models import SHIPPED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    model: str | Path | None = None,
    *,
    router: Any = None,
    dtype: str = "float32",
    device: str = "cpu",
    offline: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """A causal language model in evaluation mode, and its tokenizer; `load_model` says what the arguments mean."""
    loaded = load_model(model, router=router, dtype=dtype, device=device, offline=offline)
    return loaded, load_tokenizer(model, offline=offline)


def load_model(
    model: str | Path | None = None,
    *,
    router: Any = None,
    dtype: str = "float32",
    device: str = "cpu",
    offline: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, patched where it was saved with routers. Only safetensors are read,
    and no code that a model brings is run.

    model    None or "shipped" for the one that ships with usmoe; a folder; or a hub id, as allenai/OLMoE-1B-7B-0924
    router   as in `patch()`, in place of those that the model was saved with; {}: none, the model is not patched
    dtype    float32 | bfloat16 | float16
    device   cpu, cuda, cuda:1
    offline  only what is already on this machine

    Raises ValueError, in one sentence, where there is no such folder or the hub does not give the model, and for saved
    routers that cannot be had, as `from_pretrained` does.
    """
    _refuse_dtype(dtype)
    place = _known(device)
    loaded = _from_pretrained(AutoModelForCausalLM, "model", model, offline, dtype=DTYPES[dtype], use_safetensors=True)
    data = data_of(loaded.config)
    chosen = routers_of(loaded.config, str(model)) if router is None else router
    chosen = None if router == {} else chosen
    return _routed(loaded, chosen, data, str(model), given=router is not None).to(place).eval()


def saved_with(model: str | Path | None = None, *, offline: bool = False) -> dict[str, str]:
    """{layer name: router as text} that a model was saved with; code of its author's own by its name; empty where it
    was saved without routers. Only its configuration is read."""
    return told(data_of(_from_pretrained(AutoConfig, "configuration", model, offline)))


def load_as_saved(
    model: str | Path | None = None,
    router: Any = None,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    offline: bool = False,
) -> PreTrainedModel:
    """A model of the class that it was saved as, dense or MoE, under `router`, or with the routers that it was saved
    with, in evaluation mode; `load_model` says what the other arguments mean, and what is raised."""
    _refuse_dtype(dtype)
    place = _known(device)
    loaded: Any = from_pretrained(
        "shipped" if model is None else model, router, dtype=DTYPES[dtype], local_files_only=offline
    )
    return loaded.to(place).eval()


def load_tokenizer(model: str | Path | None = None, *, offline: bool = False) -> Any:
    """The tokenizer of the shipped model (None), of a folder, or of a hub id. Raises ValueError where there is none."""
    tokenizer = _from_pretrained(AutoTokenizer, "tokenizer", model, offline)
    refuse_empty(tokenizer, "The shipped model" if model is None else str(model))
    return tokenizer


def refuse_empty(tokenizer: Any, source: str) -> None:
    """Raise ValueError for a tokenizer that has none but special tokens, or gives a text no token: of a folder without
    the files of a tokenizer, transformers makes an empty one for some families, in silence. A callable that does not
    say how many tokens it knows is none of these."""
    if not hasattr(tokenizer, "__len__"):
        return
    special = set(getattr(tokenizer, "all_special_ids", ()))
    if len(tokenizer) > len(special) and tokenizer("a text", add_special_tokens=False, verbose=False)["input_ids"]:
        return
    raise ValueError(
        f"{source} has no tokenizer: what transformers makes of it knows {len(tokenizer)} special tokens and no text. "
        "Put the model's tokenizer files (tokenizer.json, tokenizer_config.json) beside its config.json, or give "
        "another folder that has them."
    )


def from_pretrained(path: str | Path, router: Any = None, **options: Any) -> PreTrainedModel:
    """A model that was saved while it was patched, patched again: the same weights and routers, bit for bit, and the
    same logits to float rounding (weights from a file lie elsewhere in memory, and products may add up otherwise).

    path     a folder that save_pretrained() wrote, that of an adapter of peft too, or a hub id
    router   what to patch with instead of what config.usmoe says, as in `patch()`
    options  for transformers' from_pretrained: dtype, device_map, quantization_config, ...

    The class is the one that the model was saved as, the dtype the saved one. A model that was saved without routers
    comes as it is, unless `router` is given. What the layers tracked in training (usmoe.to_causal) comes with their
    routers. Of an adapter's folder: the model that it is of, under the routers beside the adapter, as a PeftModel with
    it; `options` are then the model's. Only safetensors are read, and no code that a model brings is run.

    Raises ValueError, in one sentence: for a newer schema of config.usmoe, for routers of other layers than the model
    has, for a router of somebody's own code, and where the model cannot be loaded.
    """
    if options.pop("output_loading_info", False):
        raise ValueError(
            "usmoe.from_pretrained() gives the model alone, so output_loading_info=True has no place in it."
        )
    offline = bool(options.pop("local_files_only", False))
    adapter = adapter_in(Path(path) / options.get("subfolder", ""))
    if adapter is not None:
        return _with_adapter(Path(path) / options.pop("subfolder", ""), adapter, router, offline, options)
    hub = {name: options.pop(name) for name in _HUB if name in options}
    config = _from_pretrained(AutoConfig, "configuration", path, offline, **hub)
    chosen = routers_of(config, str(path)) if router is None else router
    for name in [name for name in options if hasattr(config, name) and name not in _OF_THE_MODEL]:
        setattr(config, name, options.pop(name))  # as transformers' own from_pretrained takes them
    options = {"use_safetensors": True, "config": config} | hub | options
    data = data_of(config)
    model = _from_pretrained(_class_of(config), "model", path, offline, **options)
    return _routed(model, chosen, data, str(path), given=router is not None)


def _routed(model: Any, router: Any, data: Any, source: str, *, given: bool) -> Any:
    """The model under a router, or as it is; with the cuts that were saved of it.

    data   what the source says of routers
    given  whether the router was given in place of those
    """
    without_routers(model.config)
    if router is None:
        return model
    if not given:
        _refuse_other_layers(model, router, source)
    patch(model, router)
    state = patch_of(model)
    assert state is not None
    take_cuts(data, routers(model), {layer.name: cut for layer, cut in zip(state.layers, state.cuts, strict=True)})
    return model


def _with_adapter(folder: Path, adapter: dict[str, Any], router: Any, offline: bool, options: dict[str, Any]) -> Any:
    """The model that an adapter is of, under the routers that were written beside it, with the adapter."""
    from peft import PeftModel

    base, data = adapter.get("base_model_name_or_path"), routers_beside(folder)
    if not base:
        raise ValueError(
            f"{folder / ADAPTER} does not name the model that the adapter is of. Load that, patch it, and give both to "
            "peft.PeftModel.from_pretrained(model, folder)."
        )
    found = routers_in(data, str(folder / BESIDE)) if router is None and data is not None else router
    model = from_pretrained(base, found, local_files_only=offline, **options)
    if found is not None:
        _routed(model, found, data, str(folder / BESIDE), given=router is not None)
    return PeftModel.from_pretrained(model, str(folder))  # pyright: ignore[reportArgumentType]


_HUB = ("revision", "token", "cache_dir", "subfolder", "force_download", "proxies", "code_revision")
"""Options that say where on the hub a model lies: for its configuration, too."""

_OF_THE_MODEL = ("dtype", "torch_dtype", "quantization_config")
"""Options that a configuration knows, and that from_pretrained() of a model reads by itself."""


def _class_of(config: Any) -> Any:
    """The class that a configuration names, where transformers has it, or it is registered with an Auto class; else the
    causal language model of its type."""
    name = str(next(iter(getattr(config, "architectures", None) or ()), None))
    candidates = [getattr(transformers, name, None)]
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        found = mapping.get(type(config), None) if mapping is not None else None
        candidates += found if isinstance(found, list | tuple) else [found]
    for found in candidates:
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.__name__ == name:
            return found
    return AutoModelForCausalLM


def _refuse_other_layers(model: PreTrainedModel, routers: dict[str, Any], source: str) -> None:
    names = [layer.name for layer in supported_layers(model)]
    if set(names) != set(routers):
        raise ValueError(
            f"config.usmoe of {source} has routers for {len(routers)} layers, {min(routers, default='none')} among "
            f"them, and the model has {len(names)} MoE layers, {names[0]} to {names[-1]}. Give a router instead: "
            "usmoe.from_pretrained(path, router=...)."
        )


def _from_pretrained(auto: Any, what: str, model: str | Path | None, offline: bool, **options: Any) -> Any:
    source = str(SHIPPED if model is None or str(model) == "shipped" else model)
    folder = Path(source)
    if folder.is_file() and folder.suffix == ".gguf":
        options["gguf_file"] = folder.name
        options.pop("use_safetensors", None)
        folder = folder.parent
    elif not source or folder.is_file():
        raise ValueError(
            f"{source!r} is no folder of a model. Give a folder that save_pretrained() wrote, a .gguf file, or a hub "
            "id."
        )
    elif folder.exists():
        if adapter_in(folder) is not None:
            raise ValueError(
                f"{source} holds an adapter of peft alone. Load it with its model, usmoe.from_pretrained({source!r}), "
                "merge it (merge_and_unload()) and save the whole."
            )
        if not (folder / options.get("subfolder", "") / "config.json").is_file():
            raise ValueError(f"{source} has no config.json, so it is not a transformers model. Give a model's folder.")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"There is no folder {source}. Give a folder that save_pretrained() wrote, or a hub id.")
    options |= {"local_files_only": offline or folder.exists(), "trust_remote_code": False}
    try:
        return auto.from_pretrained(str(folder) if folder.exists() else source, **options)
    except Exception as error:  # whatever transformers, the hub or safetensors raise: the user's model is the matter
        where = (
            "cannot be loaded from its folder" if folder.exists() else "is no folder here, and the hub did not give it"
        )
        raise ValueError(f"The {what} of {source} {where}: {error}") from error


def _refuse_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown. Choose one of: {', '.join(DTYPES)}.")


def _known(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"The device {device!r} is not available here. Choose cpu, or see torch.cuda.is_available()."
        ) from error
