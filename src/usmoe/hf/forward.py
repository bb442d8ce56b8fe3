"""What a patched model does in a forward: what `patch` puts around it and into it.

On the way in (usmoe.hf.entrance), the model's mask says which tokens are padding, and its cache what the routers
remember. In each MoE layer, what the router module returns is replaced by our pairs, which the block hands on,
untouched, to our function in transformers' experts interface. On the way out, the cache takes what the routers will
remember, and a balance loss that was asked for is computed of the pairs that were routed.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from usmoe.hf.balance import asked, put_real_balance_loss, refuse_cut_off
from usmoe.hf.layers import Layer
from usmoe.hf.masks import MisshapenMaskError, Tokens, UnreadableMaskError, tokens_of_mask
from usmoe.hf.memory import cached_length, is_cache, recall, refuse_continuous_batching, remember
from usmoe.hf.packing import begin_anew, by_flash_attention, by_lengths, is_paged
from usmoe.hf.wrapped import unwrapped
from usmoe.layers.cut import MovingCut
from usmoe.layers.mode import DATA, under_transformation
from usmoe.routing import OwnChoice
from usmoe.routing.router import call
from usmoe.types import RouterOutput, Routing, is_causal, looks_at_one_token

CARRIED = "_usmoe_patch"
"""Attribute of a model that is patched: its Patch."""

_not_compiled: Any = torch.compiler.disable(reason=DATA)

Listener = Callable[[str, RouterOutput], None]
"""Called with the name of a layer and what its router said."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Hears:
    """Who listens, and the thread in which it began to."""

    listener: Listener
    thread: int = field(default_factory=threading.get_ident)


@dataclass(kw_only=True, eq=False)
class Forward:
    """What is known of the tokens of one forward."""

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
    paged: bool = False
    """Whether it is a step of transformers' continuous batching."""
    unmasked: bool = False
    """Whether it was given no mask."""
    unsettled: bool = False
    """Whether its positions begin anew, so that each layer's mask says what attention keeps apart."""
    settled: bool = False
    """Whether a layer's mask has said it."""
    thread: int = field(default_factory=threading.get_ident)
    remembered: Mapping[str, Any] = field(default_factory=dict)
    """The states with which the layers' routers begin."""
    states: dict[str, Any] = field(default_factory=dict)
    """Those with which they end."""
    said: list[RouterOutput] | None = None
    """Kept where a balance loss may have to be computed."""
    as_tuple: bool = False
    """Whether the output is to be a tuple then."""
    cut_off: bool = False
    """Whether a layer then ran without a graph."""

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
    listeners: list[Hears] = field(default_factory=list)
    cuts: list[MovingCut] = field(default_factory=list)
    """Of each layer: where its selections fell in training."""
    forward: Forward = field(default_factory=Forward)
    """The forward in progress; blank where there is none."""
    last: Forward = field(default_factory=Forward)
    """The one before: in backward, gradient checkpointing runs its layers again."""
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

    def __getstate__(self) -> dict[str, Any]:
        """Without the tokens of its forwards: what is saved, or hashed, does not depend on what it last read."""
        return {name: value for name, value in self.__dict__.items() if name not in ("forward", "last")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, forward=Forward(), last=Forward())

    @property
    def idle(self) -> bool:
        """Whether no forward is in progress, nor run again in backward."""
        return not self.forward.running and not _in_backward()

    @property
    def current(self) -> Forward:
        """What is known of the tokens that come now: those of the forward in progress; in backward, of the last one. A
        block that is called by itself is told nothing, whatever was known of the tokens before."""
        return self.last if _in_backward() and not self.forward.running else self.forward

    @property
    def others(self) -> list[Any]:
        """The routers that are not the model's own choice, as it is."""
        return [router for router in self.routers if router != OwnChoice()]


def patch_of(model: nn.Module) -> Patch | None:
    """The Patch that a model carries, itself or inside of what wraps it; None where there is none."""
    return unwrapped(model).__dict__.get(CARRIED)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


@_not_compiled
def enter(state: Patch, module: nn.Module, given: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Before the forward of a model, or of a part of it that is called by itself; `given`: its arguments by name. The
    keyword arguments with which to go on.

    An inner model that is handed no mask (or one that the outer has already worked into another form) leaves what the
    outer said.
    """
    _refuse_another_thread(state)
    begins = not state.forward.running  # the model, or an inner one that is called by itself
    now = state.forward
    if begins:
        whole = isinstance(module, PreTrainedModel)
        now = state.forward = Forward() if whole else Forward(grids=now.grids, blocks=now.blocks)
    names = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
    names = names if isinstance(module, PreTrainedModel) else ("hidden_states", *given)
    tokens = next((given[name] for name in names if isinstance(given.get(name), Tensor) and given[name].ndim > 1), None)
    mask = given.get("attention_mask")
    shape = now.shape if tokens is None else (tokens.shape[0], tokens.shape[1])
    now.around.append((now.shape, now.valid))
    try:
        if begins:
            _begin(state, module, given, shape)
        elif isinstance(mask, Tensor) and mask.ndim == 2:
            now.valid = _tokens(state, mask, shape, now.past if shape == now.shape else None)[0]
        elif shape != now.shape and now.shape is not None:  # a decoder with tokens of its own
            now.valid = None
        elif now.unmasked and mask is None and shape is not None:  # the innermost model knows which attention it is
            now.valid, now.segments = by_flash_attention(module.config, given, *shape) or (now.valid, now.segments)
        now.shape = shape
        if module is state.model and asked(module, given, "output_router_logits"):
            now.said = []
            now.as_tuple = not asked(module, given, "return_dict", otherwise=True)
            return kwargs | {"return_dict": True} if now.as_tuple else kwargs
        return kwargs
    except BaseException:
        now.shape, now.valid = now.around.pop()
        state.forward = now if now.running else Forward()
        raise


def _refuse_another_thread(state: Patch) -> None:
    if state.forward.elsewhere:
        raise RuntimeError(
            "This patched model is in the middle of a forward in another thread. It serves one at a time: take a lock, "
            "or give each thread a copy.deepcopy() of it."
        )


def _begin(state: Patch, module: nn.Module, given: dict[str, Any], shape: tuple[int, int] | None) -> None:
    """Learn which tokens are real, which belong to one example, and what the routers remember of those before."""
    now, mask, cache = state.forward, given.get("attention_mask"), given.get("past_key_values")
    if is_paged(given):
        refuse_continuous_batching(router for router in state.routers if getattr(router, "remembers", False))
        assert shape is not None
        now.paged = True
        now.valid, now.segments = by_lengths(given["cu_seq_lens_q"], shape[1])
        return
    now.past = cached_length(cache, _index(module))
    if mask is not None:
        now.valid, now.segments = _tokens(state, mask, shape, now.past)
    elif shape is not None and isinstance(module, PreTrainedModel):
        now.unmasked = True
        flash = by_flash_attention(module.config, given, *shape)
        now.unsettled = flash is None and begin_anew(given, shape[1])
        now.valid, now.segments = flash or (None, None)
    now.remembered = recall(cache, state.routers) if is_cache(cache) else {}
    if now.segments is not None and is_cache(cache):
        for router in state.routers:
            if getattr(router, "remembers", False):
                raise ValueError(
                    f"Several examples are packed into one row here, and {router} remembers one for each row of the "
                    "cache. Give them without a cache (use_cache=False), or a row to each."
                )


@_not_compiled
def settle(state: Patch, given: Mapping[str, Any]) -> None:
    """Before a layer of a model whose positions begin anew: the mask that its attention is handed says whether they are
    those of several examples. Without a mask, all of a row is one to it."""
    now = state.current
    if "attention_mask" in given:
        mask, now.settled = given["attention_mask"], True
        now.segments = None if mask is None else _tokens(state, mask, now.shape, now.past)[1]


def _index(part: nn.Module) -> int:
    """Which layer of a cache the keys and values of a part are; 0 for a whole model."""
    if isinstance(part, PreTrainedModel):
        return 0
    known = (getattr(module, "layer_idx", None) for module in part.modules())
    return next((index for index in known if isinstance(index, int)), 0)


def _tokens(state: Patch, mask: Any, shape: tuple[int, int] | None, past: int | None) -> Tokens:
    """Which tokens are real, and which belong to one example. Where tokens compete, that must be known; a router that
    looks at one token alone may do without."""
    try:
        if shape is None:
            if isinstance(mask, Tensor) and mask.ndim == 2:
                return mask.bool(), None
            raise UnreadableMaskError("without input_ids or inputs_embeds beside it")
        return tokens_of_mask(mask, *shape, past)
    except MisshapenMaskError as error:
        raise ValueError(
            f"usmoe cannot tell from an attention mask {error} which tokens are padding. Give attention_mask "
            "(sequences, tokens), those in the cache included, 0 for padding."
        ) from None
    except UnreadableMaskError as error:
        for router in state.routers:
            if not looks_at_one_token(router):
                raise ValueError(
                    f"usmoe cannot tell from an attention mask {error} which tokens are padding and which belong "
                    f"together, and under {router} they would compete. Give attention_mask (sequences, tokens), 0 for "
                    "padding, or use a threshold, which looks at each token by itself."
                ) from None
        return None, None


@_not_compiled
def leave(state: Patch, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """After a model's forward, also one that failed (then there is no output)."""
    now = state.forward
    if len(now.around) > 1:
        now.shape, now.valid = now.around.pop()
        return output
    now.around.clear()
    state.last, state.forward = now, Forward()
    if output is None:
        return None
    if now.states:
        given = (*kwargs.values(), *args)
        made = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        cache = next((value for value in (*given, *made) if is_cache(value)), None)
        if cache is not None:
            remember(cache, state.routers, {**now.remembered, **now.states})
    if now.said is not None and isinstance(output, Mapping):
        if output.get("aux_loss") is not None:  # a head that has a balance loss; others have none, and get none
            refuse_cut_off(output, now.cut_off)
            if state.others:
                put_real_balance_loss(module, output, now.said, state.others[0])
        if now.as_tuple:
            output = output.to_tuple()  # pyright: ignore[reportAttributeAccessIssue]
    now.said = None
    return output


@_not_compiled
def learn_grid(state: Patch, name: str, block: nn.Module, args: Any, kwargs: Any) -> None:
    """Before a block: which it is, and how many sequences of how many tokens it is given."""
    _refuse_another_thread(state)
    now = state.current
    now.blocks[name] = block
    hidden = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
    if isinstance(hidden, Tensor) and hidden.ndim == 3:
        now.grids[name] = (hidden.shape[0], hidden.shape[1])
    else:
        now.grids.pop(name, None)


@_not_compiled
def reroute(state: Patch, index: int, module: nn.Module, args: Any, output: tuple) -> tuple:
    """After a router module: our pairs in place of its own."""
    layer, router, now = state.layers[index], state.routers[index], state.current
    rule = layer.rule
    assert rule is not None
    flat = rule.outputs.read_logits(output)
    if flat.is_meta:  # shapes alone are asked for
        return output
    (batch, length), valid = _grid(state, layer, router, len(flat))
    logits = flat.view(batch, length, -1)
    valid = None if valid is None else valid.to(logits.device)
    # a model routes its padding, too, and in some it reaches the real tokens: under its own rule, all is as it was
    competes = None if isinstance(router, OwnChoice) else valid
    if now.unsettled and not now.settled and not looks_at_one_token(router):
        raise ValueError(
            f"The positions begin anew within a row, and usmoe cannot tell whether the attention before {layer.name} "
            f"keeps apart what they part. Under {router} tokens compete: give each example a row of its own."
        )
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
        if now.paged:
            refuse_continuous_batching([router])
        now.states[layer.name] = routing.state
    if not under_transformation():
        cut = state.cuts[index]
        if not module.training:
            cut.observe(routing, router)
        elif not is_causal(router):
            cut.update(routing.cut, router)
    routing, output = rule.hand_on(output, routing, flat)
    if valid is not None and competes is None:
        routing = _of_real_tokens(routing, valid.reshape(-1))
    said = RouterOutput(routing=routing, logits=logits)
    if now.said is not None and now.running:
        now.said.append(said)
        now.cut_off = now.cut_off or not torch.is_grad_enabled()
    for one in state.listeners:
        one.listener(layer.name, said)
    return output


def _of_real_tokens(routing: Routing, valid: Tensor) -> Routing:
    kept = valid[routing.token]
    pairs = {name: getattr(routing, name)[kept] for name in ("token", "expert", "weight")}
    return dataclasses.replace(routing, **pairs, valid=valid)


def _grid(state: Patch, layer: Layer, router: Any, tokens: int) -> tuple[tuple[int, int], Tensor | None]:
    """(B, L) of the tokens that a layer sees, and which are real. Some blocks flatten their tokens, or see but some of
    them (a vision tower's, say)."""
    now = state.current
    shapes = [now.shape] if now.running or now.valid is not None else []
    shapes += [now.grids.get(layer.name), now.shape]
    known = next((shape for shape in shapes if shape is not None and shape[0] * shape[1] == tokens), None)
    found = (1, tokens) if known is None else known
    partly = known is None and now.shape is not None and now.shape[0] > 1  # whose tokens are they?
    if (now.valid is None and not partly) or (now.valid is not None and tuple(now.valid.shape) == found):
        return found, now.valid
    if looks_at_one_token(router):
        return found, None
    raise ValueError(
        f"{layer.name} sees {found[0]} x {found[1]} tokens, but the model was given {now.shape}, and "
        f"usmoe cannot tell which of them they are. Under {router} they compete: use a threshold, which looks at each "
        "by itself."
    )
