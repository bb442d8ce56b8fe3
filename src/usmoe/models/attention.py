"""Causal attention over a segment and what is remembered of those before it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from usmoe.models.config import LanguageConfig
from usmoe.models.norms import RMSNorm


@dataclass(frozen=True, kw_only=True, eq=False)
class Sight:
    """Which tokens a segment of L tokens may look at: M remembered ones, then its own up to each."""

    length: int
    remembered: int
    blocked: Bool[Tensor, "B 1 L M+L"] | None
    """True where a token may not look, beside what lies after it; None: nowhere."""

    @staticmethod
    def of(
        length: int,
        remembered: int,
        valid: Bool[Tensor, "B L"] | None = None,
        segments: Int[Tensor, "B L"] | None = None,
        *,
        kept: Bool[Tensor, "B M"] | None = None,
        segment: Int[Tensor, " B"] | None = None,
    ) -> Sight:
        """Padding is seen by itself alone (a softmax over nothing is NaN), a packed segment by its own tokens.

        Of what is remembered, the places that are `kept` (None: all) are seen, by the tokens that go on with its
        `segment` (None: 0): by all where there are no segments, else by the first ones, as long as they have its id.
        Raises ValueError where padding stands between those and what is remembered: it would count as distance.
        """
        blocked = None
        if valid is not None:
            own = torch.eye(length, dtype=torch.bool, device=valid.device)
            blocked = ~valid[:, None, :] & ~own
        if segments is not None:
            other = segments[:, :, None] != segments[:, None, :]
            blocked = other if blocked is None else blocked | other
        if remembered and not (blocked is None and kept is None):
            going_on = None if segments is None else _going_on(valid, segments, segment)
            if valid is not None:
                _refuse_padding_between(valid, going_on, kept)
            like = blocked if blocked is not None else kept
            assert like is not None
            before = like.new_zeros(len(like), length, remembered)
            before = before if kept is None else before | ~kept[:, None, :]
            before = before if going_on is None else before | ~going_on[:, :, None]
            own = before.new_zeros(len(like), length, length) if blocked is None else blocked
            blocked = torch.cat([before, own], -1)
        return Sight(length=length, remembered=remembered, blocked=None if blocked is None else blocked.unsqueeze(1))

    def bias(self, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "#B 1 L M+L"]:
        """-inf where a token may not look, 0 where it may."""
        later = _later(self.length, self.remembered, device)
        hidden = later if self.blocked is None else later | self.blocked
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, -torch.inf)


def _going_on(
    valid: Bool[Tensor, "B L"] | None, segments: Int[Tensor, "B L"], segment: Int[Tensor, " B"] | None
) -> Bool[Tensor, "B L"]:
    """The tokens from the first on that have the id of what is remembered; padding among them breaks nothing."""
    same = segments == (0 if segment is None else segment[:, None])
    return (same if valid is None else same | ~valid).cumprod(1).bool()


def _refuse_padding_between(
    valid: Bool[Tensor, "B L"], going_on: Bool[Tensor, "B L"] | None, kept: Bool[Tensor, "B M"] | None
) -> None:
    """Raise ValueError for a token behind padding that sees what is remembered."""
    behind = valid & (~valid).cumsum(1).bool()
    rows = (behind if going_on is None else behind & going_on).any(1)
    rows = rows if kept is None else rows & kept.any(1)
    if rows.any():
        raise ValueError(
            f"Padding stands between what is remembered and the tokens of row {int(rows.nonzero()[0])}, and would "
            "count as distance. Put the padding of a segment that follows another behind its tokens."
        )


@functools.lru_cache(maxsize=8)
def _later(length: int, remembered: int, device: torch.device) -> Bool[Tensor, "1 1 L M+L"]:
    later = torch.ones(length, remembered + length, dtype=torch.bool, device=device).triu(remembered + 1)
    return later[None, None]


class RelativeAttention(nn.Module):
    """Attention by content and by distance (Transformer-XL: Dai et al. 2019, arXiv 1901.02860, section 3.3).

    A(i, j) = (q_i + u) . k_j + (q_i + v) . r(i-j), over the square root of the head's width, where r is a projection of
    the sinusoid of the distance, and u and v are learned. The first term is scaled-dot-product attention's own; the
    second goes in as its additive mask.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.heads, self.size, self.dropout = config.heads, config.size_of_head, config.attention_dropout
        self.far_dropout = nn.Dropout(config.dropout)
        wide = self.heads * self.size
        self.query = nn.Linear(config.d_model, wide, bias=False)
        self.key_value = nn.Linear(config.d_model, 2 * wide, bias=False)
        self.distance = nn.Linear(config.d_model, wide, bias=False)
        self.out = nn.Linear(wide, config.d_model, bias=False)
        self.content_bias = nn.Parameter(torch.empty(self.heads, 1, self.size))
        self.distance_bias = nn.Parameter(torch.empty(self.heads, 1, self.size))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Float[Tensor, "B L D"], seen: Float[Tensor, "B K D"], sight: Sight) -> Float[Tensor, "B L D"]:
        """x are the segment's tokens, seen the remembered ones and then the same tokens."""
        query = self.query(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)  # (B, H, L, d)
        key, value = (
            part.unflatten(-1, (self.heads, self.size)).transpose(1, 2) for part in self.key_value(seen).chunk(2, -1)
        )
        far = self.far_dropout(sinusoid(seen.shape[1], x.shape[-1], x.device, x.dtype))
        distance = self.distance(far).unflatten(-1, (self.heads, self.size)).transpose(0, 1)  # (H, K, d)
        scale = self.size**-0.5
        by_distance = (query + self.distance_bias).to(query.dtype) @ distance.mT * scale  # (B, H, L, K)
        bias = shift(by_distance) + sight.bias(by_distance.dtype, x.device)
        out = F.scaled_dot_product_attention(
            (query + self.content_bias).to(query.dtype),
            key,
            value,
            attn_mask=bias,
            dropout_p=self.dropout if self.training else 0.0,
            scale=scale,
        )
        return self.out(out.transpose(1, 2).flatten(2))


def shift(by_distance: Float[Tensor, "B H L K"]) -> Float[Tensor, "B H L K"]:
    """From a column a distance, K-1 first and 0 last, to a column a key.

    Token i (of L, the last of K) is at distance K-L+i-j from key j, which is column L-1-i+j: row i moves L-1-i to the
    left. What wraps around lies after the token, and is masked. One pad and two views do it: no copy a row.
    """
    batch, heads, length, keys = by_distance.shape
    padded = F.pad(by_distance, (1, 0)).view(batch, heads, keys + 1, length)
    return padded[:, :, 1:].reshape(batch, heads, length, keys)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept must serve training too
def _sinusoid(number: int, width: int, device: torch.device) -> Float[Tensor, "K D"]:
    distance = torch.arange(number - 1, -1, -1, dtype=torch.float32, device=device)
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    angle = distance[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], -1)[:, :width]


def sinusoid(number: int, width: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "K D"]:
    """Sines, then cosines, of the distances number-1 down to 0."""
    return _sinusoid(number, width, device).to(dtype)


class RotaryAttention(nn.Module):
    """Attention with queries and keys turned by their positions (RoPE: Su et al. 2021, arXiv 2104.09864), and
    normalised before that where asked (as in OLMoE: arXiv 2409.02060)."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.heads, self.size, self.dropout = config.heads, config.size_of_head, config.attention_dropout
        self.theta = config.rope_theta
        wide = self.heads * self.size
        self.query, self.key, self.value = (nn.Linear(config.d_model, wide, bias=False) for _ in range(3))
        self.out = nn.Linear(wide, config.d_model, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.query_norm = RMSNorm(wide, eps=1e-5) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(wide, eps=1e-5) if config.qk_norm else nn.Identity()

    def forward(self, x: Float[Tensor, "B L D"], seen: Float[Tensor, "B K D"], sight: Sight) -> Float[Tensor, "B L D"]:
        """x are the segment's tokens, seen the remembered ones and then the same tokens."""
        cosine, sine = rotation(seen.shape[1], self.size, self.theta, x.device)
        query, key, value = (
            part.unflatten(-1, (self.heads, self.size)).transpose(1, 2)
            for part in (self.query_norm(self.query(x)), self.key_norm(self.key(seen)), self.value(seen))
        )
        query = turn(query, cosine[-x.shape[1] :], sine[-x.shape[1] :])
        key = turn(key, cosine, sine)
        plain = sight.blocked is None and not sight.remembered
        out = F.scaled_dot_product_attention(
            query,
            key,
            value.to(query.dtype),
            attn_mask=None if plain else sight.bias(query.dtype, x.device),
            is_causal=plain,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(out.transpose(1, 2).flatten(2))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # as above
def rotation(number: int, size: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (K, d) of the angles of positions 0 to number-1; both halves of a head turn by the same ones."""
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    angle = torch.arange(number, dtype=torch.float32, device=device)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def turn(
    x: Float[Tensor, "B H L d"], cosine: Float[Tensor, "L d"], sine: Float[Tensor, "L d"]
) -> Float[Tensor, "B H L d"]:
    """Each pair (x_n, x_{n + d/2}) turned by its angle."""
    one, two = x.chunk(2, -1)
    return (x * cosine + torch.cat([-two, one], -1) * sine).to(x.dtype)
