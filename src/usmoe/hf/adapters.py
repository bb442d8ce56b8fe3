"""Routers of a model that has an adapter of peft: beside the adapter, since its folder holds no configuration of the
model.

peft writes an adapter without asking the model that carries it, and loads it so. What saves and loads in peft is
therefore followed by what is done here, for models that are patched, and for folders that hold routers; nothing else
changes in peft.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from usmoe._autoregister import when_imported
from usmoe.hf.saved import as_data
from usmoe.layers.cut import MovingCut
from usmoe.report.whole import whole_json

ADAPTER, BESIDE = "adapter_config.json", "usmoe_routers.json"
"""What peft writes, and what we write beside it."""

PatchOf = Callable[[Any], Any]

_FOLLOWED = "_usmoe_follows"


def write_beside_adapter(folder: Path, routers: Mapping[str, Any], cuts: Mapping[str, MovingCut]) -> None:
    """Write the routers beside the adapter in a folder, and beside those of other names in folders of it."""
    for place in {file.parent for file in (*folder.glob(ADAPTER), *folder.glob(f"*/{ADAPTER}"))}:
        whole_json(as_data(routers, cuts), place / BESIDE)


def adapter_in(folder: Path) -> dict[str, Any] | None:
    """The configuration of the adapter in a folder that holds no whole model; None where there is none. Raises
    ValueError, naming the file, where it is damaged."""
    path = folder / ADAPTER
    if (folder / "config.json").is_file() or not path.is_file():
        return None
    return _json_object(path)


def routers_beside(folder: Path) -> Any:
    """What was written beside an adapter; None where nothing was."""
    path = folder / BESIDE
    return _json_object(path) if path.is_file() else None


def _json_object(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Save the adapter again.") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} is no JSON object. Save the adapter again.")
    return said


def follow_peft(patch_of: PatchOf) -> None:
    """Let what peft saves and loads be followed by what is said of routers: now where peft is there already, else when
    it is imported. Twice is once.

    patch_of  the patch of a model, None where there is none
    """
    when_imported("peft.peft_model", functools.partial(_follow, patch_of))


def _follow(patch_of: PatchOf, peft: Any) -> None:
    kind = peft.PeftModel
    if not hasattr(kind, _FOLLOWED):
        setattr(kind, _FOLLOWED, True)
        kind.save_pretrained = _saving(kind.save_pretrained, patch_of)
        kind.load_adapter = _loading(kind.load_adapter, patch_of)


def _saving(theirs: Any, patch_of: PatchOf) -> Any:
    @functools.wraps(theirs)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        said = theirs(self, save_directory, *args, **kwargs)
        state = _patch_inside(self, patch_of)
        if state is not None and kwargs.get("is_main_process", True):
            names = [layer.name for layer in state.layers]
            routers = dict(zip(names, state.routers, strict=True))
            write_beside_adapter(Path(save_directory), routers, dict(zip(names, state.cuts, strict=True)))
        return said

    return save_pretrained


def _loading(theirs: Any, patch_of: PatchOf) -> Any:
    @functools.wraps(theirs)
    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        said = theirs(self, model_id, *args, **kwargs)
        place = Path(str(model_id)) / (kwargs.get("subfolder") or "")
        if _patch_inside(self, patch_of) is None and routers_beside(place) is not None:
            warnings.warn(
                f"The adapter in {place} was trained under routers of usmoe ({BESIDE}), which peft leaves out. "
                f"Load it by usmoe.from_pretrained({str(place)!r}), or patch the model.",
                stacklevel=2,
            )
        return said

    return load_adapter


def _patch_inside(model: Any, patch_of: PatchOf) -> Any:
    """The patch of the model inside; None for a model of another library, too."""
    try:
        return patch_of(model)
    except (TypeError, ValueError):
        return None
