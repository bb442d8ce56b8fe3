"""The vocabulary of a language model as parameters: from tokens to vectors, and from vectors back to likelihoods."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from usmoe.models.config import LanguageConfig

CHUNK = 1024
"""Tokens whose (tokens, vocabulary) logits are held at once."""


class Words(nn.Module):
    """An embedding and a full softmax over it, or over a matrix of its own."""

    def __init__(self, config: LanguageConfig, std: float = 0.02) -> None:
        super().__init__()
        assert config.vocabulary is not None
        self.vectors = nn.Parameter(torch.empty(config.vocabulary, config.d_model))
        self.output = None if config.tied else nn.Parameter(torch.empty(config.vocabulary, config.d_model))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)

    @property
    def _head(self) -> Tensor:
        return self.vectors if self.output is None else self.output

    def embed(self, tokens: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        return F.embedding(tokens, self.vectors)

    def logits(self, hidden: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape V"]:
        return F.linear(hidden, self._head)

    def nats(self, hidden: Float[Tensor, "T D"], targets: Int[Tensor, " T"]) -> Float[Tensor, " T"]:
        """Negative log-likelihood of each target, in float32; without gradients."""
        with torch.no_grad():
            parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
            rows = [F.cross_entropy(self.logits(part).float(), goal, reduction="none") for part, goal in parts]
        return torch.cat(rows) if rows else hidden.new_zeros(0)

    def loss(
        self, hidden: Float[Tensor, "T D"], targets: Int[Tensor, " T"], z_loss: float = 0.0
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean negative log-likelihood plus z_loss times the mean squared log-partition (differentiable), and the first
        alone."""
        head = self._head
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, head = hidden.to(dtype), head.to(dtype)
        return HeadLoss.apply(hidden, head, targets, z_loss)  # pyright: ignore[reportReturnType]


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy and squared log-partition of a linear head, a chunk of tokens at a time.

    The (T, V) logits are never held: each chunk leaves its gradients behind at once, which on a CPU halves the time of
    head and loss, and with 267,735 words is the difference between 300 MB and 12 GB.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, target: Tensor, z_loss: float):  # pyright: ignore[reportIncompatibleMethodOverride]
        slopes = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        nats, squares = torch.zeros(2, device=hidden.device).unbind()
        for part, goal, grad in zip(hidden.split(CHUNK), target.split(CHUNK), grad_hidden.split(CHUNK), strict=True):
            logits = (part @ head.T).float()
            log_partition = logits.logsumexp(-1)
            nats = nats + (log_partition - logits.gather(1, goal[:, None])[:, 0]).sum()
            squares = squares + log_partition.square().sum()
            if slopes:
                slope = logits.sub_(log_partition[:, None]).exp_().mul_((1 + 2 * z_loss * log_partition)[:, None])
                slope.scatter_add_(1, goal[:, None], torch.full_like(slope[:, :1], -1.0))
                slope = slope.to(head.dtype)
                torch.mm(slope, head, out=grad)
                grad_head += slope.T @ part
        tokens = ctx.tokens = max(len(hidden), 1)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.dtype = head.dtype
        ctx.mark_non_differentiable(nats := nats / tokens)
        return nats + z_loss * squares / tokens, nats

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grad_loss / ctx.tokens
        return grad_hidden * scale.to(grad_hidden.dtype), (grad_head * scale).to(ctx.dtype), None, None


class AdaptiveWords(nn.Module):
    """Words in clusters by frequency: a frequent word costs one small softmax, a rare one two, and has fewer numbers
    (adaptive softmax: Grave et al. 2017, arXiv 1609.04309; adaptive input, tied: Baevski and Auli 2019,
    arXiv 1809.10853).

    Cluster c holds the words cutoffs[c-1] to cutoffs[c]-1, in vectors of width D / shrink^c that a projection brings to
    D. Its words' logits are those of their own vectors; the probability of a rare word is that of its cluster, one more
    class of the first softmax, times its own within it.
    """

    def __init__(self, config: LanguageConfig, std: float = 0.02) -> None:
        super().__init__()
        assert config.vocabulary is not None
        edges = (0, *config.cutoffs, config.vocabulary)
        self.edges = edges
        widths = [max(1, config.d_model // config.shrink**number) for number in range(len(edges) - 1)]
        self.vectors = nn.ParameterList(
            torch.randn(high - low, width) * std for low, high, width in zip(edges[:-1], edges[1:], widths, strict=True)
        )
        self.projections = nn.ParameterList(torch.randn(config.d_model, width) * width**-0.5 for width in widths[1:])
        self.clusters = nn.Parameter(torch.randn(len(edges) - 2, config.d_model) * std)

    def embed(self, tokens: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        flat = tokens.reshape(-1)
        found = self.vectors[0].new_zeros(len(flat), self.vectors[0].shape[1])
        for number, vectors in enumerate(self.vectors):
            rows = self._rows(flat, number)
            part = F.embedding(flat[rows] - self.edges[number], vectors)
            part = part if number == 0 else F.linear(part, self.projections[number - 1])
            found = found.index_copy(0, rows, part.to(found.dtype))
        return found.view(*tokens.shape, -1)

    def logits(self, hidden: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape V"]:
        """Log-probabilities, which are logits of themselves."""
        first = self._first(hidden).log_softmax(-1)
        parts = [first[..., : self.edges[1]]]
        for number in range(1, len(self.vectors)):
            cluster = first[..., self.edges[1] + number - 1].unsqueeze(-1)
            parts.append(cluster + self._within(hidden, number).log_softmax(-1))
        return torch.cat(parts, -1)

    def nats(self, hidden: Float[Tensor, "T D"], targets: Int[Tensor, " T"]) -> Float[Tensor, " T"]:
        """Negative log-likelihood of each target, in float32; without gradients."""
        with torch.no_grad():
            parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
            rows = [self._nats(part, goal) for part, goal in parts]
        return torch.cat(rows) if rows else hidden.new_zeros(0)

    def loss(
        self, hidden: Float[Tensor, "T D"], targets: Int[Tensor, " T"], z_loss: float = 0.0
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean negative log-likelihood (differentiable), and its value."""
        if z_loss:
            raise ValueError("An adaptive softmax has no single log-partition. Leave output_z_loss at 0.")
        nats = self._nats(hidden, targets).mean()
        return nats, nats.detach()

    def _rows(self, targets: Tensor, number: int) -> Tensor:
        """Where the words of a cluster stand."""
        return ((targets >= self.edges[number]) & (targets < self.edges[number + 1])).nonzero().squeeze(1)

    def _first(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, torch.cat([self.vectors[0], self.clusters])).float()

    def _within(self, hidden: Tensor, number: int) -> Tensor:
        return F.linear(F.linear(hidden, self.projections[number - 1].T), self.vectors[number]).float()

    def _nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        goal = targets
        for number in range(1, len(self.vectors)):
            inside = (targets >= self.edges[number]) & (targets < self.edges[number + 1])
            goal = goal.where(~inside, self.edges[1] + number - 1)
        nats = F.cross_entropy(self._first(hidden), goal, reduction="none")
        for number in range(1, len(self.vectors)):
            rows = self._rows(targets, number)
            within = self._within(hidden[rows], number)
            nats = nats.index_add(
                0, rows, F.cross_entropy(within, targets[rows] - self.edges[number], reduction="none")
            )
        return nats


def words_of(config: LanguageConfig, std: float = 0.02) -> Words | AdaptiveWords:
    """The vocabulary that a configuration asks for."""
    return AdaptiveWords(config, std) if config.cutoffs else Words(config, std)
