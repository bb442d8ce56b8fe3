"""Sparse mixture-of-experts routing as one problem: the best (token, expert) pairs under a budget.

    import torch, usmoe
    routing = usmoe.route(torch.randn(2, 8, 4), usmoe.USMoE(k=1.5))

`import usmoe` needs torch, numpy and jaxtyping alone; what needs more is loaded when it is first named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from usmoe import _autoregister, lp, metrics
from usmoe.layers import MoE, SoftMoE, to_causal
from usmoe.routing import (
    ROUTERS,
    BoundedChoice,
    ExpertChoice,
    OwnChoice,
    ReLUChoice,
    TokenChoice,
    USMoE,
    parse_router,
    route,
)
from usmoe.types import Promises, RouterOutput, Routing

if TYPE_CHECKING:
    from usmoe.embed.encoder import Encoder
    from usmoe.hf.calibrate import calibrate
    from usmoe.hf.load import from_pretrained
    from usmoe.hf.packed import quantize_experts
    from usmoe.hf.patch import patch, patched, routers, unpatch
    from usmoe.hf.record import record
    from usmoe.hf.supported import supported
    from usmoe.hf.tune import tune

__version__ = "0.1.0"

_LAZY = {
    "Encoder": "usmoe.embed.encoder",
    "calibrate": "usmoe.hf.calibrate",
    "from_pretrained": "usmoe.hf.load",
    "patch": "usmoe.hf.patch",
    "patched": "usmoe.hf.patch",
    "quantize_experts": "usmoe.hf.packed",
    "record": "usmoe.hf.record",
    "routers": "usmoe.hf.patch",
    "supported": "usmoe.hf.supported",
    "tune": "usmoe.hf.tune",
    "unpatch": "usmoe.hf.patch",
}

__all__ = [
    "ROUTERS",
    "BoundedChoice",
    "Encoder",
    "ExpertChoice",
    "MoE",
    "OwnChoice",
    "Promises",
    "ReLUChoice",
    "RouterOutput",
    "Routing",
    "SoftMoE",
    "TokenChoice",
    "USMoE",
    "__version__",
    "calibrate",
    "from_pretrained",
    "lp",
    "metrics",
    "parse_router",
    "patch",
    "patched",
    "quantize_experts",
    "record",
    "route",
    "routers",
    "supported",
    "to_causal",
    "tune",
    "unpatch",
]


_autoregister.install()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'usmoe' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "usmoe":
            raise
        raise ImportError(f"usmoe.{name} needs {error.name}. Install it: pip install 'usmoe[hf]'.") from error


def __dir__() -> list[str]:
    return sorted(__all__)
