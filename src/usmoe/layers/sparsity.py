"""The controller of ReLU choice: a penalty that grows while too many pairs are chosen, and shrinks after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from usmoe.routing.relu_choice import ReLUChoice
from usmoe.routing.scores import in_float32_at_least
from usmoe.types import RouterOutput


class SparsityController(nn.Module):
    """Holds ReLU choice at k experts a token by an L1 penalty with a coefficient that adapts, and balances the load by
    weighing the penalty of each expert (ReMoE: Wang et al. 2024, arXiv 2412.14711, sections "Controlling sparsity via
    adaptive L1 regularization" and "Integrate load balancing into L1 regularization").

        control = SparsityController(k=2)
        loss = loss + control.loss(said)   # said: the RouterOutput of every layer
        loss.backward(); optimizer.step()
        control.update(said)

    lambda_i = lambda_0 * alpha^(rises - falls): it rises after each step whose sparsity is below 1 - k/E, and falls
    after each above. What is kept is that whole number, in a buffer, so that a checkpoint goes on exactly and no dtype
    rounds it. In distributed training every process follows its own batches, and weighs the penalty by their load,
    unless the wrapper broadcasts buffers.
    """

    rises: Tensor
    """Steps after which lambda rose, less those after which it fell; int64, ()."""

    def __init__(self, k: float, *, initial: float = 1e-8, alpha: float = 1.2, balance: bool = True) -> None:
        """
        k        experts a token to aim at; may be fractional
        initial  lambda_0
        alpha    factor by which lambda rises or falls a step
        balance  weigh each expert's penalty by its load; False: plain L1

        Raises ValueError for values with which it would not control.
        """
        super().__init__()
        for name, value, least in (("k", k, 0.0), ("initial", initial, 0.0), ("alpha", alpha, 1.0)):
            if not least < value < float("inf"):
                raise ValueError(f"{name}={value} controls nothing. Give a number above {least:g}.")
        self.k = k
        self.initial = initial
        self.alpha = alpha
        self.balance = balance
        self.register_buffer("rises", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def of(router: ReLUChoice) -> SparsityController:
        """The controller that aims at a router's k. Raises ValueError where it is not a number, and for a router of
        another kind."""
        if not isinstance(router, ReLUChoice):
            raise ValueError(
                f"sparsity belongs to relu_choice, and the router is {router}. Leave it out, or choose "
                "relu_choice(k=2)."
            )
        if not isinstance(router.k, int | float):
            raise ValueError(f"{router} does not say how many experts a token to aim at. Give one: ReLUChoice(k=2).")
        return SparsityController(router.k)

    @property
    def coefficient(self) -> Float[Tensor, ""]:
        """lambda, float64."""
        return self.initial * torch.as_tensor(self.alpha, dtype=torch.float64, device=self.rises.device) ** self.rises

    def loss(self, said: Sequence[RouterOutput]) -> Float[Tensor, ""]:
        """lambda times the mean, over layers and their real tokens, of sum over experts of f_e * relu(logit_e), with
        f_e = E/k times the share of real tokens that expert e has (1 without balance). f and lambda have no gradient.
        0 where there is no real token."""
        penalties = [self._penalty(one) for one in said]
        if not penalties:
            return torch.zeros(())
        mean = torch.stack([penalty.to(penalties[0].device) for penalty in penalties]).mean()
        return self.coefficient.to(mean) * mean

    def _penalty(self, one: RouterOutput) -> Tensor:
        logits = in_float32_at_least(one.logits).flatten(0, 1)
        real = one.routing.valid
        logits = logits if real is None else logits.masked_fill(~real.unsqueeze(-1), 0.0)
        positive = logits.relu().sum(0) / _tokens(one).clamp(min=1)
        if not self.balance:
            return positive.sum()
        share = one.routing.load.to(logits) / _tokens(one).clamp(min=1)
        return (one.routing.num_experts / self.k * share * positive).sum()

    @torch.no_grad()
    def update(self, said: Sequence[RouterOutput]) -> None:
        """Move lambda once, after a step: up where less than 1 - k/E of the layers' pairs were idle, down where more.

        With accumulated gradients, `said` is what all batches of the step said. Padding does not count, and neither
        does a step without a real token.
        """
        excess = torch.zeros((), dtype=torch.float64, device=self.rises.device)
        for one in said:
            excess += len(one.routing.token) - self.k * _tokens(one).to(excess)
        self.rises += excess.sign().long()

    def extra_repr(self) -> str:
        return f"k={self.k:g}, initial={self.initial:g}, alpha={self.alpha:g}, balance={self.balance}"


def _tokens(one: RouterOutput) -> Tensor:
    """How many real tokens a layer has seen."""
    real = one.routing.valid
    return torch.tensor(one.routing.num_tokens, device=one.logits.device) if real is None else real.sum()
