"""Routing: logits -> scores -> mask -> weight -> Routing."""

from usmoe.routing.host import ROUTE, Host
from usmoe.routing.route import route
from usmoe.routing.router import Router
from usmoe.routing.routers import ExpertChoice, OwnChoice, TokenChoice, USMoE
from usmoe.routing.text import ROUTERS, parse_router

__all__ = [
    "ROUTE",
    "ROUTERS",
    "ExpertChoice",
    "Host",
    "OwnChoice",
    "Router",
    "TokenChoice",
    "USMoE",
    "parse_router",
    "route",
]
