"""Gates: modules that own parameters and map tokens to logits. Everything after them is a function."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from usmoe.routing.host import Host
from usmoe.routing.scores import in_float32_at_least
from usmoe.types import Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class GateOutput:
    """What a gate says that has more to say than logits."""

    logits: Float[Tensor, "*tokens E"]
    """What the router ranks."""
    weights: Float[Tensor, "*tokens E"] | None = None
    """Weights that replace the router's own at the pairs it chooses; None: the router weighs."""
    distilled: Float[Tensor, "*tokens E"] | None = None
    """Logits of a second router that learns the route of the first; None where nothing is distilled."""
    host: Host | None = None
    """The rule by which the router reads the logits where its own fields say nothing; None: that of `route()`."""
    fixed: bool = False
    """Whether the route is to stay what it is: a layer adds no noise to such logits."""


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map in the wider of both dtypes, also under autocast: rounded logits are another route, and unstable in
    training (Fedus et al. 2022, arXiv 2101.03961, section 2.4)."""
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, weight.dtype)
        return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


class LinearGate(nn.Module):
    """logits = x W: the gate of nearly all MoE layers."""

    def __init__(self, d_model: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        nn.init.normal_(self.weight, std=d_model**-0.5)

    def forward(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens E"]:
        """Logits of each token for each expert."""
        return _linear(x, self.weight, self.bias)


class CosineGate(nn.Module):
    """Cosine similarity of low-dimensional projections, over a learned temperature (XMoE: Chi et al. 2022,
    arXiv 2204.09179, section 3): token and expert vectors are both normalised, so a token's scale does not count."""

    def __init__(self, d_model: int, num_experts: int, *, dim: int | None = None, temperature: float = 0.07) -> None:
        """dim: width of the projection, by default half the number of experts (as in XMoE), at least 2."""
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"A temperature of {temperature} is impossible. Give one above 0.")
        dim = max(2, num_experts // 2) if dim is None else dim
        self.projection = nn.Parameter(torch.empty(dim, d_model))
        self.experts = nn.Parameter(torch.empty(num_experts, dim))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        nn.init.orthogonal_(self.projection)
        nn.init.normal_(self.experts)

    def forward(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens E"]:
        """Logits of each token for each expert."""
        token = F.normalize(in_float32_at_least(_linear(x, self.projection)), dim=-1)
        cosine = _linear(token, F.normalize(self.experts.to(token.dtype), dim=-1))
        return cosine / self.log_temperature.to(token.dtype).exp()


class NoisyGate(nn.Module):
    """A linear gate with learned Gaussian noise in training (Shazeer et al. 2017, arXiv 1701.06538, eq. 4)."""

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.noise = nn.Parameter(torch.zeros(num_experts, d_model))
        nn.init.normal_(self.weight, std=d_model**-0.5)

    def forward(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens E"]:
        """Logits of each token for each expert."""
        logits = _linear(x, self.weight)
        if not self.training:
            return logits
        return logits + torch.randn_like(logits) * F.softplus(_linear(x, self.noise))


class FrozenGate(nn.Module):
    """A random linear gate that is never trained (SMoE-Dropout: Chen et al. 2023, arXiv 2303.01610). Its weight is a
    buffer: no optimiser sees it, and a checkpoint keeps it."""

    weight: Tensor

    def __init__(self, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(num_experts, d_model) * d_model**-0.5)

    def forward(self, x: Float[Tensor, "*tokens D"]) -> Float[Tensor, "*tokens E"]:
        """Logits of each token for each expert."""
        return _linear(x, self.weight)


class StableGate(nn.Module):
    """A gate of two stages (StableMoE: Dai et al. 2022, arXiv 2204.08396, sections 3.1 and 3.2).

    Stage one learns the route: the affinities x W rank, their sigmoids weigh, and a light router, which knows nothing
    of a token but its id, learns where it went (`usmoe.layers.losses.distillation_loss`). Stage two, after `freeze()`:
    the light router ranks and no longer moves, so that the logits of a token id stay what they are; the sigmoids of x W
    go on weighing and learning.

    A MoE layer with this gate needs `tokens` at every call.
    """

    reads_tokens = True
    frozen: Tensor
    """Whether this is stage two; a buffer, so that a checkpoint keeps it."""

    def __init__(self, d_model: int, num_experts: int, vocabulary: int, *, dim: int = 50) -> None:
        """
        vocabulary  number of token ids
        dim         width of the light router's embeddings

        Raises ValueError for a size below 1.
        """
        super().__init__()
        for name, size in {"vocabulary": vocabulary, "dim": dim}.items():
            if size < 1:
                raise ValueError(f"{name}={size} is impossible. Give at least 1.")
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.words = nn.Parameter(torch.randn(vocabulary, dim))
        self.experts = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5)
        self.register_buffer("frozen", torch.tensor(False))
        self._second_stage = False  # the buffer's value, where reading it would stall a GPU
        nn.init.normal_(self.weight, std=d_model**-0.5)

    def freeze(self) -> None:
        """Begin stage two: the light router ranks, and no optimiser moves it any more."""
        self.frozen.fill_(True)
        self._enter(True)

    def _enter(self, second: bool) -> None:
        self._second_stage = second
        for parameter in (self.words, self.experts):
            parameter.requires_grad_(not second)
            if second:
                parameter.grad = None  # a gradient of 0 would still let weight decay and momentum move it

    def forward(self, x: Float[Tensor, "*tokens D"], tokens: Int[Tensor, "*tokens"] | None = None) -> GateOutput:
        """Logits, weights and, in stage one, the distilled logits. Raises ValueError without a token id for each x."""
        if tokens is None or tokens.shape != x.shape[:-1]:
            given = "none" if tokens is None else f"those of shape {tuple(tokens.shape)}"
            raise ValueError(
                f"The stable gate routes by token ids, and was given {given}. "
                f"Call the layer with tokens={tuple(x.shape[:-1])} ids."
            )
        affinity = in_float32_at_least(_linear(x, self.weight))
        light = in_float32_at_least(_linear(F.embedding(tokens, self.words), self.experts))
        if self._second_stage:
            return GateOutput(logits=light.detach(), weights=affinity.sigmoid(), fixed=True)
        return GateOutput(logits=affinity, weights=affinity.sigmoid(), distilled=light)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Enter the stage that is loaded."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        stage = state_dict.get(f"{prefix}frozen")
        if stage is not None:
            self._enter(bool(stage))


class BiasGate(nn.Module):
    """A linear gate that balances the load without a loss (Wang et al. 2024, arXiv 2408.15664, algorithm 1;
    DeepSeek-V3: arXiv 2412.19437, section 2.1.2).

    Each expert has a bias on the score by which it competes, never on its weight. After each batch in training mode it
    rises by `rate` where the expert had fewer tokens than the mean, and falls where it had more. No gradient flows.

    The score is a sigmoid, as in the paper, or a softmax. The router must take its score from the gate (score=None,
    token_score=None); a unified score heeds (1 - alpha) of the bias. In distributed training every process follows its
    own batches, unless the wrapper broadcasts buffers. Not under activation checkpointing: the second pass would see
    the next bias, and route otherwise.
    """

    has_bias = True
    bias: Tensor
    """Added to the scores that compete, one an expert (E,); in float32 at least."""

    def __init__(
        self, d_model: int, num_experts: int, *, rate: float = 1e-3, score: Literal["sigmoid", "softmax"] = "sigmoid"
    ) -> None:
        """
        rate   u, by how much a bias moves a batch, in units of the score
        score  of each logit by itself, or over the experts of a token
        """
        super().__init__()
        if not 0 < rate < math.inf:
            raise ValueError(f"rate={rate} would not balance. Give a number above 0; the paper's is 0.001.")
        if score not in ("sigmoid", "softmax"):
            raise ValueError(f"There is no score {score!r}. Known: sigmoid, softmax.")
        self.rate = rate
        self.score = score
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.register_buffer("bias", torch.zeros(num_experts))
        nn.init.normal_(self.weight, std=d_model**-0.5)

    def forward(self, x: Float[Tensor, "*tokens D"]) -> GateOutput:
        """Logits of each token for each expert, and the biased rule."""
        return GateOutput(logits=_linear(x, self.weight), host=Host(score=self.score, bias=self.bias.clone()))

    @torch.no_grad()
    def observe(self, routing: Routing) -> None:
        """Move each bias by `rate` towards an even load."""
        load = routing.load.to(self.bias)
        self.bias += self.rate * (load.mean() - load).sign()

    def _apply(self, fn: Any, recurse: bool = True) -> BiasGate:
        """Follow the module to a device, and to a wider dtype; steps of `rate` would vanish in a narrower one."""
        kept = self.bias
        super()._apply(fn, recurse)
        if self.bias.dtype.itemsize < kept.dtype.itemsize:
            self.bias = kept.to(self.bias.device)
        return self


GATES: dict[str, type[nn.Module]] = {
    "linear": LinearGate,
    "cosine": CosineGate,
    "noisy": NoisyGate,
    "frozen": FrozenGate,
    "stable": StableGate,
    "bias": BiasGate,
}
"""Gates by name: (d_model, num_experts) -> module, and a vocabulary where it reads token ids."""


def gate_of(gate: str | nn.Module, d_model: int, num_experts: int, vocabulary: int | None = None) -> nn.Module:
    """The gate of a name, or the module itself. `vocabulary` is read by the gates that read token ids alone.

    Raises ValueError for an unknown name, listing the known ones, and where a gate lacks its vocabulary.
    """
    if isinstance(gate, nn.Module):
        return gate
    if gate not in GATES:
        raise ValueError(f"There is no gate {gate!r}. Known: {', '.join(GATES)}; or give a module of your own.")
    if not getattr(GATES[gate], "reads_tokens", False):
        return GATES[gate](d_model, num_experts)
    if vocabulary is None:
        raise ValueError(f"The gate {gate!r} routes by token ids and needs their number. Give vocabulary=50257, say.")
    return GATES[gate](d_model, num_experts, vocabulary)
