"""Memory after padding and after packed examples: what follows sees what it would see if its sequence stood alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import usmoe
from tiny_language import V, tiny
from usmoe.models.language import LanguageModel

pytestmark = pytest.mark.portable

DECODER = {"position": "rotary", "norm": "rms", "norm_place": "pre", "qk_norm": True, "activation": "swiglu"}
backbones = pytest.mark.parametrize("shape", [{}, DECODER], ids=["xl", "decoder"])
routers = pytest.mark.parametrize(
    "router", [usmoe.TokenChoice(k=2), usmoe.USMoE(k=1.5), usmoe.USMoE(k=1.5, pool="prefix", burst=1.5)], ids=str
)
"""The last remembers, too."""


def made(shape: dict[str, Any], router: Any) -> LanguageModel:
    return tiny(router, dropout=0.0, **shape).double()


def text(length: int, seed: int) -> Tensor:
    return torch.randint(0, V, (1, length), generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, alone: Tensor) -> None:
    """The models are in float64; the angles of the decoder are float32, and round otherwise at another offset."""
    torch.testing.assert_close(found, alone, rtol=0, atol=2e-6)


def padded(tokens: Tensor, length: int, side: str) -> tuple[Tensor, Tensor]:
    """A row of that length, and which of its tokens are real."""
    padding, real = text(length - tokens.shape[1], 9), torch.ones_like(tokens, dtype=torch.bool)
    parts = [(padding, torch.zeros_like(padding, dtype=torch.bool)), (tokens, real)]
    row, valid = zip(*(parts if side == "left" else parts[::-1]), strict=True)
    return torch.cat(row, 1), torch.cat(valid, 1)


def read(model: LanguageModel, *segments: Tensor, **given: Any) -> list[Tensor]:
    """The hidden states of segments that follow each other, nothing else beside them."""
    found, memory = [], None
    for one in segments:
        out = model(one, memory=memory, stream=True, **{"remember": 20, **given})
        found, memory = [*found, out.hidden], out.memory
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@routers
@backbones
def test_padding_is_not_remembered(shape: dict[str, Any], router: Any, side: str):
    """3 tokens of 7, then 2 of 4 with the padding behind, then 5, beside whole rows; at most 4 are remembered."""
    model, short, long = made(shape, router), (text(3, 1), text(2, 2), text(5, 3)), (text(7, 4), text(4, 5), text(5, 6))
    alone = [read(model, *rows, remember=4) for rows in (short, long)]
    memory = None
    for number, (one, other) in enumerate(zip(short, long, strict=True)):
        row, real = padded(one, other.shape[1], side if number == 0 else "right")
        valid = torch.cat([real, torch.ones_like(real)])
        out = model(torch.cat([row, other]), memory=memory, remember=4, stream=True, valid=valid)
        close(out.hidden[:1][real], alone[0][number][0])
        close(out.hidden[1:], alone[1][number])
        memory = out.memory
        assert memory is not None
        assert memory.length == 4


@routers
@backbones
def test_a_text_whose_first_segment_is_padding_begins_in_the_second(shape: dict[str, Any], router: Any):
    model, tokens = made(shape, router), text(3, 1)
    row, real = padded(tokens, 9, "left")
    first = model(row[:, :5], remember=9, stream=True, valid=real[:, :5])
    second = model(row[:, 5:], remember=9, stream=True, valid=real[:, 5:], memory=first.memory)
    close(second.hidden[:, 1:], model(tokens).hidden)
    following = text(2, 2)
    found = model(following, memory=second.memory, stream=True).hidden
    close(found, read(model, tokens, following)[1])


@routers
@backbones
def test_of_packed_examples_the_last_is_remembered(shape: dict[str, Any], router: Any):
    """6 and 4 tokens; then 3, of which 2 are the last example's; then 2 more of the new one, without segments."""
    model, one, two, new = made(shape, router), text(6, 1), text(6, 2), text(3, 3)
    first = model(torch.cat([one, two[:, :4]], 1), remember=20, stream=True, segments=torch.tensor([[0] * 6 + [5] * 4]))
    tokens = torch.cat([two[:, 4:], new[:, :1]], 1)
    following = torch.tensor([[5, 5, 7]])
    second = model(tokens, memory=first.memory, remember=20, stream=True, segments=following)
    close(second.hidden[:, :2], read(model, two[:, :4], two[:, 4:])[1])
    alone = read(model, new[:, :1], new[:, 1:])
    close(second.hidden[:, 2:], alone[0])
    close(model(new[:, 1:], memory=second.memory, stream=True).hidden, alone[1])

    unnamed = model(two[:, 4:], memory=first.memory, remember=20, stream=True)
    close(unnamed.hidden, read(model, two[:, :4], two[:, 4:])[1])
    named = model(two[:, :1], memory=unnamed.memory, stream=True, segments=torch.tensor([[5]])).hidden
    close(named, read(model, two[:, :4], two[:, 4:], two[:, :1])[2])


@backbones
def test_an_example_with_another_id_begins_anew(shape: dict[str, Any]):
    """Also where the id that the memory ends with comes again behind it: examples may be numbered in each batch."""
    model, one, two = made(shape, usmoe.TokenChoice(k=2)), text(4, 1), text(3, 2)
    packed = torch.cat([one, two], 1)
    memory = model(text(5, 3), remember=5, segments=torch.tensor([[0, 0, 1, 1, 1]])).memory
    out = model(packed, memory=memory, remember=12, segments=torch.tensor([[0] * 4 + [1] * 3]))
    close(out.hidden, torch.cat([model(one).hidden, model(two).hidden], 1))
    close(model(one, memory=out.memory).hidden, read(model, two, one)[1])
    plain = model(text(5, 3), remember=5).memory  # without segments it is example 0
    going_on = model(packed, memory=plain, segments=torch.tensor([[0] * 4 + [1] * 3])).hidden
    close(going_on, torch.cat([read(model, text(5, 3), one)[1], model(two).hidden], 1))


@backbones
def test_padded_and_packed_at_once(shape: dict[str, Any]):
    """Padding between two examples, whatever its id, and behind the last."""
    model, one, two, following = made(shape, usmoe.USMoE(k=1.5)), text(3, 1), text(2, 2), text(3, 3)
    row = torch.cat([one, text(1, 9), two, text(2, 9)], 1)
    valid = torch.tensor([[1, 1, 1, 0, 1, 1, 0, 0]]).bool()
    segments = torch.tensor([[4, 4, 4, 0, 6, 6, 0, 0]])
    memory = model(row, remember=8, valid=valid, segments=segments).memory
    close(model(following, memory=memory).hidden, read(model, two, following)[1])


def test_padding_between_the_memory_and_its_tokens_is_refused():
    model, tokens = made({}, usmoe.TokenChoice(k=2)), torch.cat([text(4, 1), text(4, 2)])
    memory = model(tokens, remember=4).memory
    valid = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    with pytest.raises(ValueError, match=r"Padding stands between what is remembered and the tokens of row 1"):
        model(tokens, memory=memory, valid=valid)
    ids = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])
    with pytest.raises(ValueError, match="row 1"):
        model(tokens, memory=memory, valid=valid, segments=ids)
    ids[1] = 1  # a new example, which sees nothing of the memory
    found = model(tokens, memory=memory, valid=valid, segments=ids).hidden
    close(found[1:, 1:], model(tokens[1:, 1:]).hidden)
