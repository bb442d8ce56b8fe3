"""Routing: logits -> scores -> mask -> weight -> Routing."""

from usmoe.routing.bounded import BoundedChoice
from usmoe.routing.expert_choice import ExpertChoice
from usmoe.routing.host import ROUTE, Host
from usmoe.routing.relu_choice import ReLUChoice
from usmoe.routing.route import route
from usmoe.routing.router import Router
from usmoe.routing.text import ROUTERS, parse_router
from usmoe.routing.token_choice import OwnChoice, TokenChoice
from usmoe.routing.unified import USMoE

__all__ = [
    "ROUTE",
    "ROUTERS",
    "BoundedChoice",
    "ExpertChoice",
    "Host",
    "OwnChoice",
    "ReLUChoice",
    "Router",
    "TokenChoice",
    "USMoE",
    "parse_router",
    "route",
]
