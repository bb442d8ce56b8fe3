"""`install`: after `import usmoe`, transformers' Auto classes know the families that usmoe brings, without an import of
transformers by `import usmoe`, nor of ours before a model of such a family is asked for."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from typing import Any

_AUTO = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Register now where transformers' AutoConfig is there already, else when it is imported. Twice is once."""
    when_imported(_AUTO, _register)


def when_imported(name: str, then: Callable[[Any], None]) -> None:
    """Call then(module) now where a module is there already, else when it has been imported. Twice is once, as long as
    it has not been imported."""
    if name in sys.modules:
        then(importlib.import_module(name))  # waits for a thread that is at it
    elif not any(_waits_for(finder, name) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, then))


def _waits_for(finder: Any, name: str) -> bool:
    return type(finder).__module__ == __name__ and getattr(finder, "name", None) == name


def _register(auto: Any) -> None:
    try:
        if "deepseek" not in auto.CONFIG_MAPPING:
            auto.AutoConfig.register("deepseek", DeepseekConfig)
    except Exception as error:  # whatever it is: transformers was asked for, and is to be had without us
        logging.getLogger("usmoe").warning("usmoe could not register its models with transformers: %r", error)


class _Later(type):
    """Of a class that stands for the one of its name in usmoe.hf.deepseek. Every model begins with its configuration,
    and that module registers the rest; it cannot be imported earlier, while transformers itself is half imported."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(getattr(importlib.import_module("usmoe.hf.deepseek"), cls.__name__), name)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module("usmoe.hf.deepseek"), cls.__name__)(*args, **kwargs)


class DeepseekConfig(metaclass=_Later):
    pass


class _Finder(MetaPathFinder):
    """Finds a module as it would be found without it, and says so when that has run."""

    def __init__(self, name: str = _AUTO, then: Callable[[Any], None] = _register) -> None:
        self.name, self._then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec: Any = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._then)
        return spec


class _Loader:
    """Stands in for a loader until its module runs."""

    def __init__(self, loader: Any, then: Callable[[Any], None]) -> None:
        self._loader, self._then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._then(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if not _waits_for(finder, module.__name__)]
