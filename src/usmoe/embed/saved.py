"""An Encoder in a folder: model and tokenizer as transformers writes them, and beside them what makes them an encoder.

usmoe_encoder.json holds the settings, the router of each layer and the dtype; usmoe_encoder.safetensors the statistics
of a sample, where features are standardised.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from usmoe.embed.encoder import Encoder, EncoderSettings
from usmoe.embed.standardize import Statistics
from usmoe.hf.load import DTYPES
from usmoe.hf.packed import packed_experts
from usmoe.hf.saved import as_data, routers_in
from usmoe.hf.wrapped import unwrapped

SCHEMA = 1
"""Version of usmoe_encoder.json. A later one is refused, since its settings may mean something else."""

_SETTINGS, _ARRAYS = "usmoe_encoder.json", "usmoe_encoder.safetensors"


def save(encoder: Encoder, folder: Path) -> None:
    """Write an encoder into a folder, for `load`, `Encoder.load` and usmoe.from_pretrained(), whole or not at all.

    In a folder that is there, files of the same names are replaced, and those of an encoder that was in it are removed.
    Until the last file is in its place, the folder is one that `load` refuses.

    Raises ValueError for a model with an adapter of peft or with experts in 4 bits: transformers cannot write these.
    """
    folder = folder.resolve()
    if folder.is_file():
        raise ValueError(f"{folder} is a file. Give a folder for the encoder.")
    _refuse_what_is_not_written(encoder.model)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write(encoder, part)
        _move(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _refuse_what_is_not_written(model: Any) -> None:
    adapted = next((name for name, one in model.named_modules() if type(one).__module__.startswith("peft.")), None)
    if adapted is not None:
        raise ValueError("This model has an adapter of peft. Merge it before saving the encoder: merge_and_unload().")
    if packed_experts(unwrapped(model)):
        raise ValueError(
            "The experts of this model are in 4 bits, and transformers cannot write them so. Save the encoder before "
            "its experts are quantised."
        )


def _write(encoder: Encoder, folder: Path) -> None:
    model, tokenizer = unwrapped(encoder.model), cast(Any, encoder.tokenizer)
    with encoder.routed() as routed:
        routed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    statistics = encoder.statistics
    if statistics is not None:
        save_file({"mean": statistics.mean, "deviation": statistics.deviation}, folder / _ARRAYS)
    routers = encoder.routers
    data = {
        "schema": SCHEMA,
        "settings": asdict(encoder.settings),
        "routers": as_data(routers) if routers else None,
        "dtype": next((name for name, dtype in DTYPES.items() if dtype == model.dtype), "float32"),
        "statistics": None if statistics is None else {"name": statistics.name, "texts": statistics.texts},
    }
    (folder / _SETTINGS).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _move(part: Path, folder: Path) -> None:
    """Put the files of `part` into the folder, the settings last."""
    if not folder.exists():
        part.rename(folder)
        return
    for old in [folder / _SETTINGS, folder / _ARRAYS, *folder.glob("model*.safetensors*")]:
        old.unlink(missing_ok=True)  # an old single file of weights would be read before new shards
    for file in sorted(part.iterdir(), key=lambda file: file.name == _SETTINGS):
        file.replace(folder / file.name)


def load(folder: Path, *, device: str = "cpu", dtype: str | None = None, router: Any = None) -> Encoder:
    """The encoder that `save` wrote: the same weights, bit for bit, and the same vectors, to float rounding.

    dtype   float32 | bfloat16 | float16; None: that of the model when it was saved
    router  what to patch with instead of the routers that were saved, as in usmoe.patch()

    Raises ValueError, in one sentence, where the folder holds no encoder, a newer schema, a file that is cut short, or
    a router of somebody's own code.
    """
    path = folder / _SETTINGS
    data = _data(path)
    try:
        settings = asdict(EncoderSettings(**data["settings"]))
        kept = None if data["statistics"] is None else _statistics(data["statistics"], folder / _ARRAYS)
        routers, kind = data["routers"], dtype or data["dtype"]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is not as usmoe writes it ({error}). Save the encoder again.") from error
    if router is None and routers is not None:
        router = routers_in(routers, str(path), "usmoe.Encoder.load(folder, router=...)")
    return Encoder(folder, folder, router, standardize=kept, device=device, dtype=kind, **settings)


def refuse_what_is_saved(model: str | Path | None) -> None:
    """Raise ValueError for a folder that holds an encoder: its settings would be lost."""
    if model is not None and (Path(model) / _SETTINGS).is_file():
        raise ValueError(
            f"{model} holds an encoder with settings of its own: usmoe.Encoder.load({str(model)!r}). For its model "
            "alone give the tokenizer, too."
        )


def _data(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no encoder: there is no {path.name}. Give a folder of Encoder.save().")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is cut short, or no JSON: {error}. Save the encoder again.") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if type(schema) is not int or schema < 1:
        raise ValueError(f"{path} is not as usmoe writes it (it has no schema). Save the encoder again.")
    if schema > SCHEMA:
        raise ValueError(
            f"{path} has schema {schema}, and this usmoe reads schema {SCHEMA}. Update usmoe: pip install -U usmoe."
        )
    return data


def _statistics(said: dict[str, Any], path: Path) -> Statistics:
    try:
        arrays = load_file(path)
        return Statistics(**said, mean=arrays["mean"], deviation=arrays["deviation"])
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or cut short: {error}. Save the encoder again.") from error
