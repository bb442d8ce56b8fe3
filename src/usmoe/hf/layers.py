"""Where the MoE layers of a transformers model are, and what each of them does by itself.

Experts are found by transformers' experts interface; the router of each by the model's own declaration of what can be
recorded (`_can_record_outputs["router_logits"]`), or, where that names none, as the module beside the experts that
returns logits, weights and indices. Never by a list of class names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from usmoe.hf.ask import FixedRouteError, UnknownRuleError
from usmoe.hf.packed import shape_of
from usmoe.hf.recognise import own_rule
from usmoe.hf.rule import Rule
from usmoe.hf.wrapped import unwrapped
from usmoe.routing.host import Host


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """One MoE layer of a pretrained model."""

    name: str
    """Name of the block in the model, such as model.layers.0.mlp."""
    block: nn.Module
    """The module that holds router and experts; its input is (B, L, D), or (B*L, D)."""
    router: nn.Module | None
    """The module that chooses; where peft keeps copies of it, the first."""
    experts: nn.Module | None
    """The module that computes; where peft keeps copies of it, the first."""
    rule: Rule | None
    """The layer's own rule, or None where it was not recognised."""
    reason: str | None = None
    """Why no router can be put here; None where one can."""
    copies: tuple[nn.Module, ...] = ()
    """The other blocks of this name: where peft trains the block whole, or what holds it, it keeps copies."""
    fixed: bool = False
    """Whether the layer has nothing to choose (a table says which experts): patch() then leaves it alone."""

    @property
    def num_experts(self) -> int:
        """E; 0 where the experts were not found."""
        return 0 if self.experts is None else int(self.experts.num_experts)  # pyright: ignore[reportArgumentType]

    @property
    def host(self) -> Host:
        """The layer's own rule, with the correction bias that the model has now."""
        assert self.rule is not None, "supported_layers() gives layers whose rule is known"
        assert self.router is not None
        return self.rule.live(self.router, self.block)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The block, and the copies of it that peft keeps beside it."""
        return (self.block, *self.copies)

    @property
    def routers(self) -> list[nn.Module]:
        """The router, and the copies of it that peft keeps beside it."""
        assert self.router is not None
        return [module for block in self.blocks for module in block.modules() if type(module) is type(self.router)]

    @property
    def experts_modules(self) -> list[nn.Module]:
        """The experts, and the copies of them that peft keeps beside them."""
        return [module for block in self.blocks for module in block.modules() if behind_interface(module)]

    @property
    def columns(self) -> int:
        """Logits a token: the experts and, in a few models, null experts."""
        return self.num_experts + (0 if self.rule is None else self.rule.null_experts)

    @property
    def flops_per_gate(self) -> int:
        """Floating-point operations of the router on one token, 2 per multiply-add; forward."""
        assert self.router is not None
        return 2 * sum(p.numel() for p in self.router.parameters() if p.ndim == 2)

    @property
    def flops_per_pair(self) -> int:
        """Floating-point operations of one token in one expert, 2 per multiply-add; forward."""
        assert self.experts is not None
        names = ("gate_up_proj" if self.experts.has_gate else "up_proj", "down_proj")
        return 2 * sum(math.prod(shape_of(self.experts, name)) for name in names) // self.num_experts


def moe_layers(model: nn.Module) -> list[Layer]:
    """Every MoE layer of the model, in order; empty for a model that is not a mixture of experts.

    Raises TypeError for what is not a transformers model, nor wraps one.
    """
    model = unwrapped(model)
    modules = dict(model.named_modules())
    recorded = dict(_recorded(model))
    experts = {plain_name(name): name for name, module in reversed(modules.items()) if behind_interface(module)}
    layers = [_layer(name, modules, recorded) for name in experts.values()]
    covered = {layer.name for layer in layers}
    outside = [name.rpartition(".")[0] for name in recorded]
    outside += [name for name, module in modules.items() if "experts" in module._modules]
    for name in dict.fromkeys(map(plain_name, outside)):
        if not any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in covered):
            covered.add(name)
            layers.append(_outsider(name, modules))
    order = list(dict.fromkeys(map(plain_name, modules)))
    return sorted(layers, key=lambda layer: order.index(layer.name))


_WRAPPERS = re.compile(r"(^|\.)(original_module|modules_to_save\.[^.]+|base_layer|_orig_mod)(?=\.|$)")


def plain_name(name: str) -> str:
    """The name of a module without what peft and torch.compile put into it."""
    return _WRAPPERS.sub("", name).removeprefix(".")


def behind_interface(module: nn.Module) -> bool:
    """Whether a module is experts that transformers' experts interface computes."""
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")


def _recorded(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """(name of a module, index of the logits in its output), as the model and the models inside of it declare."""
    specs = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            recorded = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
            specs += recorded if isinstance(recorded, list | tuple) else [recorded] if recorded is not None else []
    for name, module in model.named_modules():
        for spec in specs:
            target = getattr(spec, "target_class", spec)
            inside = getattr(spec, "layer_name", None)
            if isinstance(target, type) and isinstance(module, target) and (inside is None or inside in name):
                yield name, getattr(spec, "index", 0)
                break


def _layer(name: str, modules: Mapping[str, nn.Module], recorded: Mapping[str, int]) -> Layer:
    """The layer of the experts of that name: the smallest module around them that holds a router, too."""
    experts, parent = modules[name], name.rpartition(".")[0]
    while parent and not isinstance(modules[parent], PreTrainedModel):
        block = modules[parent]
        within = [other for other in recorded if other.startswith(f"{parent}.") and not _holds_experts(modules[other])]
        known = {modules[other]: recorded[other] for other in within}
        others = [m for m in block.children() if m is not experts and not _holds_experts(m)]
        candidates = known or dict.fromkeys(others, 0)
        if len({plain_name(other) for other, m in block.named_modules() if behind_interface(m)}) > 1:
            break
        said = []
        for router, index in candidates.items():
            try:
                rule = own_rule(router, block, experts, index)
                plain = plain_name(parent)
                same = [m for other, m in modules.items() if plain_name(other) == plain and type(m) is type(block)]
                copies = tuple(m for m in same if m is not block)
                return Layer(name=plain, block=block, router=router, experts=experts, rule=rule, copies=copies)
            except FixedRouteError as error:
                return _without_rule(parent, block, experts, str(error), fixed=True)
            except UnknownRuleError as error:
                said.append(str(error))
        if known:
            return _without_rule(parent, block, experts, said[0])
        parent = parent.rpartition(".")[0]
    parent = name.rpartition(".")[0]
    return _without_rule(parent, modules[parent], experts, "no router was found beside its experts")


def _without_rule(name: str, block: nn.Module, experts: nn.Module | None, reason: str, fixed: bool = False) -> Layer:
    plain = plain_name(name)
    return Layer(name=plain, block=block, router=None, experts=experts, rule=None, reason=reason, fixed=fixed)


def _holds_experts(module: nn.Module) -> bool:
    return any(map(behind_interface, module.modules()))


def _outsider(name: str, modules: Mapping[str, nn.Module]) -> Layer:
    """A block with a router, or with experts, that are not behind the interface."""
    block = next(module for other, module in modules.items() if plain_name(other) == name)
    reason = "its experts are not behind transformers' experts interface, so nothing can compute them for other pairs"
    return _without_rule(name, block, None, reason)
