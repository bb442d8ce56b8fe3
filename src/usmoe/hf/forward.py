"""What a patched model does in a forward: the hooks that `patch` installs.

On the way in, the model's mask says which tokens are padding, and its cache what the routers remember. In each MoE
layer, what the router module returns is replaced by our pairs, which the block hands on, untouched, to our function in
transformers' experts interface. On the way out, the cache takes what the routers will remember, and a balance loss that
was asked for is computed of the pairs that were routed.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from usmoe.hf.layers import Layer
from usmoe.hf.masks import MisshapenMaskError, UnreadableMaskError, real_tokens
from usmoe.hf.memory import cached_length, is_cache, recall, remember
from usmoe.layers.balance import pooled_balance_loss
from usmoe.layers.cut import MovingCut
from usmoe.routing import OwnChoice
from usmoe.routing.router import call
from usmoe.types import RouterOutput, Routing, is_causal

Listener = Callable[[str, RouterOutput], None]
"""Called with the name of a layer and what its router said."""


@dataclass(kw_only=True, eq=False)
class Forward:
    """The forward in progress, or the last one: gradient checkpointing runs layers again after it."""

    shape: tuple[int, int] | None = None
    """(B, L) of its tokens."""
    valid: Tensor | None = None
    """(B, L), False for padding."""
    around: list[tuple[tuple[int, int] | None, Tensor | None]] = field(default_factory=list)
    """Shape and padding around each of the models that are running, from the outermost."""
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(B, L) of each block's input, where it has that shape."""
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    """The block of each layer that runs: the layer's own, or a copy of it that peft keeps."""
    past: int | None = 0
    """Tokens in its cache; None where the cache does not count."""
    segments: Tensor | None = None
    """(B, L): the example of each token, where several are packed into a sequence."""
    thread: int = field(default_factory=threading.get_ident)
    remembered: Mapping[str, Any] = field(default_factory=dict)
    """The states with which the layers' routers begin."""
    states: dict[str, Any] = field(default_factory=dict)
    """Those with which they end."""
    said: list[RouterOutput] | None = None
    """Kept where a balance loss is to be computed."""

    @property
    def running(self) -> bool:
        """Whether a model's forward is in progress, and not a block by itself."""
        return bool(self.around)

    @property
    def elsewhere(self) -> bool:
        """Whether it is in progress in another thread."""
        return self.running and self.thread != threading.get_ident()


@dataclass(kw_only=True, eq=False)
class Patch:
    """What a patched model carries: enough to route, to listen, and to undo it all."""

    layers: list[Layer]
    routers: list[Any]
    token: object
    """Who made it: a patch that is put back has the token that it had."""
    model: nn.Module
    """Who carries it."""
    methods: dict[str, Any] = field(default_factory=dict)
    """Attributes of the model that were set, each with what it was, or None."""
    listeners: list[Listener] = field(default_factory=list)
    cuts: list[MovingCut] = field(default_factory=list)
    """Of each layer: where its selections fell in training."""
    forward: Forward = field(default_factory=Forward)
    warned: bool = False
    """Whether generate() has said that a router looks ahead."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        """With a copy of the whole model, a patch of its own; a copy of a part (peft makes some) shares it."""
        if id(self.model) not in memo:
            return self
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    @property
    def others(self) -> list[Any]:
        """The routers that are not the model's own choice, as it is."""
        return [router for router in self.routers if router != OwnChoice()]


@torch.compiler.disable
def enter(
    state: Patch, signature: inspect.Signature, outermost: bool, module: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, Any] | None:
    """Before a model's forward. An inner model that is handed no mask (or one that the outer has already worked into
    another form) leaves what the outer said."""
    if state.forward.elsewhere:
        raise RuntimeError(
            "This patched model is in the middle of a forward in another thread. It serves one at a time: take a lock, "
            "or give each thread a copy.deepcopy() of it."
        )
    arguments = signature.bind_partial(*args, **kwargs).arguments
    begins = outermost or not state.forward.running
    if begins:  # the model, or an inner one that is called by itself
        state.forward = Forward()
    now = state.forward
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
    tokens = next((arguments[name] for name in names if isinstance(arguments.get(name), Tensor)), None)
    mask = arguments.get("attention_mask")
    cache = arguments.get("past_key_values")
    shape = now.shape if tokens is None else (tokens.shape[0], tokens.shape[1])
    now.around.append((now.shape, now.valid))
    if begins:
        now.past = cached_length(cache)
        now.valid = _real(state, mask, shape, now.past)
        now.segments = _segments(arguments.get("position_ids"), mask, shape, now.past)
        now.remembered = recall(cache, state.routers) if is_cache(cache) else {}
    elif isinstance(mask, Tensor) and mask.ndim == 2:
        now.valid = _real(state, mask, shape, now.past if shape == now.shape else None)
    elif shape != now.shape and now.shape is not None:  # a decoder with tokens of its own
        now.valid = None
    now.shape = shape
    every = arguments | arguments.get("kwargs", {})
    if outermost and _their_balance_loss(state, module, every):
        if every.get("return_dict") is False:
            raise ValueError(
                f"output_router_logits with return_dict=False leaves no place for the balance loss under "
                f"{state.others[0]}. Leave return_dict out."
            )
        now.said = []
        return args, kwargs | {"output_router_logits": False}
    return None


def _real(state: Patch, mask: Any, shape: tuple[int, int] | None, past: int | None) -> Tensor | None:
    """Which tokens are real. Where tokens compete, padding must be known; a router that looks at one token alone may do
    without."""
    if mask is None:
        return None
    try:
        if shape is None:
            if isinstance(mask, Tensor) and mask.ndim == 2:
                return mask.bool()
            raise UnreadableMaskError("without input_ids or inputs_embeds beside it")
        return real_tokens(mask, *shape, past)
    except MisshapenMaskError as error:
        raise ValueError(
            f"usmoe cannot tell from an attention mask {error} which tokens are padding. Give attention_mask "
            "(sequences, tokens), those in the cache included, 0 for padding."
        ) from None
    except UnreadableMaskError as error:
        for router in state.routers:
            if not _looks_at_one_token(router):
                raise ValueError(
                    f"usmoe cannot tell from an attention mask {error} which tokens are padding, and under {router} "
                    "padding would compete. Give attention_mask (sequences, tokens), 0 for padding."
                ) from None
        return None


def _looks_at_one_token(router: Any) -> bool:
    """Whether the route of a token is its own matter, so that nothing need be known of the others."""
    return is_causal(router) and not getattr(router, "remembers", False)


def _segments(positions: Any, mask: Any, shape: tuple[int, int] | None, past: int | None) -> Tensor | None:
    """The example of each token, where positions begin anew within a sequence: so transformers, too, knows packed
    examples, and keeps them apart, where it is given neither a mask nor a cache with tokens in it."""
    if shape is None or mask is not None or past or not isinstance(positions, Tensor):
        return None
    if positions.ndim != 2 or positions.shape[1] != shape[1]:  # positions of images have three
        return None
    breaks = positions.diff(dim=1) != 1
    if not bool(breaks.any()):
        return None
    return torch.nn.functional.pad(breaks.long().cumsum(1), (1, 0)).expand(shape)


def _their_balance_loss(state: Patch, module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether the model would compute a balance loss that assumes token choice, while another router routes."""
    asked = arguments.get("output_router_logits")
    asked = getattr(module.config, "output_router_logits", False) if asked is None else asked
    return bool(asked and state.others and _coefficient(module) is not None)


def _coefficient(module: Any) -> float | None:
    """What the model's own balance loss is multiplied by; None for a model that has none."""
    text = getattr(module.config, "text_config", None)
    for holder in (module, module.config, text):
        found = getattr(holder, "router_aux_loss_coef", None)
        if isinstance(found, int | float):
            return float(found)
    return None


@torch.compiler.disable
def leave(state: Patch, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """After a model's forward, also one that failed (then there is no output)."""
    now = state.forward
    if now.elsewhere:
        return output
    if len(now.around) > 1:
        now.shape, now.valid = now.around.pop()
        return output
    now.around.clear()  # what the tokens were stays known: gradient checkpointing runs the layers again
    if output is None:
        return None
    if now.states:
        given = (*kwargs.values(), *args)
        made = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        cache = next((value for value in (*given, *made) if is_cache(value)), None)
        if cache is not None:
            remember(cache, state.routers, {**now.remembered, **now.states})
    if now.said is not None and isinstance(output, Mapping):
        output = _with_our_balance_loss(output, now.said, _coefficient(module) or 0.0)
        now.said = None
    return output


def _with_our_balance_loss(output: Any, said: list[RouterOutput], coefficient: float) -> Any:
    loss = pooled_balance_loss(said)
    output["router_logits"] = tuple(one.logits.flatten(0, 1) for one in said)
    output["aux_loss"] = loss
    if output.get("loss") is not None:
        output["loss"] = output["loss"] + coefficient * loss.to(output["loss"].device)
    return output


@torch.compiler.disable
def learn_grid(state: Patch, name: str, block: nn.Module, args: Any, kwargs: Any) -> None:
    """Before a block: which it is, and how many sequences of how many tokens it is given."""
    state.forward.blocks[name] = block
    hidden = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    if isinstance(hidden, Tensor) and hidden.ndim == 3:
        state.forward.grids[name] = (hidden.shape[0], hidden.shape[1])
    else:
        state.forward.grids.pop(name, None)


@torch.compiler.disable  # the pairs are data: compiled code breaks its graph here
def reroute(state: Patch, index: int, module: nn.Module, args: Any, output: tuple) -> tuple:
    """After a router module: our pairs in place of its own."""
    layer, router, now = state.layers[index], state.routers[index], state.forward
    rule = layer.rule
    assert rule is not None
    flat = rule.outputs.read_logits(output)
    (batch, length), valid = _grid(state, layer, router, len(flat))
    logits = flat.view(batch, length, -1)
    valid = None if valid is None else valid.to(logits.device)
    # a model routes its padding, too, and in some it reaches the real tokens: under its own rule, all is as it was
    competes = None if isinstance(router, OwnChoice) else valid
    host = rule.live(module, now.blocks.get(layer.name, layer.block))
    segments = now.segments if now.segments is not None and now.segments.shape == (batch, length) else None
    routing = call(
        router,
        logits,
        competes,
        host=host,
        segments=None if segments is None else segments.to(logits.device),
        state=now.remembered.get(layer.name),
    )
    if routing.state is not None:
        now.states[layer.name] = routing.state
    if module.training and not is_causal(router):
        state.cuts[index].update(routing.cut, router)
    routing, output = rule.hand_on(output, routing, flat)
    if valid is not None and competes is None:
        routing = _of_real_tokens(routing, valid.reshape(-1))
    said = RouterOutput(routing=routing, logits=logits)
    if now.said is not None and now.running:
        now.said.append(said)
    for listener in state.listeners:
        listener(layer.name, said)
    return output


def _of_real_tokens(routing: Routing, valid: Tensor) -> Routing:
    kept = valid[routing.token]
    pairs = {name: getattr(routing, name)[kept] for name in ("token", "expert", "weight")}
    return dataclasses.replace(routing, **pairs, valid=valid)


def _grid(state: Patch, layer: Layer, router: Any, tokens: int) -> tuple[tuple[int, int], Tensor | None]:
    """(B, L) of the tokens that a layer sees, and which are real. Some blocks flatten their tokens, or see but some of
    them (a vision tower's, say)."""
    now = state.forward
    shapes = [now.shape] if now.running or now.valid is not None else []
    shapes += [now.grids.get(layer.name), now.shape]
    known = next((shape for shape in shapes if shape is not None and shape[0] * shape[1] == tokens), None)
    found = (1, tokens) if known is None else known
    partly = known is None and now.shape is not None and now.shape[0] > 1  # whose tokens are they?
    if (now.valid is None and not partly) or (now.valid is not None and tuple(now.valid.shape) == found):
        return found, now.valid
    if _looks_at_one_token(router):
        return found, None
    raise ValueError(
        f"{layer.name} sees {found[0]} x {found[1]} tokens, but the model was given {now.shape}, and "
        f"usmoe cannot tell which of them they are. Under {router} they compete: use a threshold, which looks at each "
        "by itself."
    )
