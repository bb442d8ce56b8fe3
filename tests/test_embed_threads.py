"""One model in several hands: an encoder at work changes nothing for who else uses the model or the tokenizer, in
another thread or in a process that is forked, and nothing that they do changes a vector."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import usmoe
from tiny import FAMILIES, tiny, tokens
from tiny_encoder import EACH, HALF, TEXTS, encoder, letters
from usmoe.hf.patch import patch_of
from usmoe.hf.view import view_of


@pytest.fixture(autouse=True)
def one_thread_each():
    """OpenMP's threads of several Python threads wait for one another where there are fewer cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def meanwhile(*loops: Callable[[], object]):
    """Each function again and again in a thread of its own, for the length of the with block; what one raises is
    raised at the end."""
    stop, begun = threading.Event(), [threading.Event() for _ in loops]

    def again(loop: Callable[[], object], once: threading.Event) -> None:
        try:
            while not stop.is_set():
                loop()
                once.set()
        finally:
            once.set()

    with ThreadPoolExecutor(len(loops)) as pool:
        running = [pool.submit(again, *each) for each in zip(loops, begun, strict=True)]
        try:
            for one in begun:
                assert one.wait(60)
            yield
        finally:
            stop.set()
        for one in running:
            one.result()


def plain(model):
    """A forward of the user's own; under dropout, too, the same one each time."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        return model(tokens()).logits


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(("router", "embedding"), [(HALF, "moee"), (EACH, "hidden"), (None, "router")], ids=str)
def test_the_users_own_forwards_are_the_same_while_an_encoder_is_at_work(family, router, embedding):
    assert family in FAMILIES
    model = tiny(family)
    mine = encoder(router, embedding, model)
    expected, vectors = plain(model), mine.encode(TEXTS, batch_size=2)
    with meanwhile(lambda: np.testing.assert_array_equal(mine.encode(TEXTS, batch_size=2), vectors)):
        for _ in range(15):
            assert torch.equal(plain(model), expected)
    assert patch_of(model) is None


def test_a_model_in_training_keeps_its_mode_while_an_encoder_is_at_work():
    model = tiny(attention_dropout=0.5).train()
    mine = encoder(HALF, "moee", model)
    vectors = mine.encode(TEXTS)
    np.testing.assert_array_equal(encoder(HALF, "moee", copy.deepcopy(model).eval()).encode(TEXTS), vectors)
    kept = [module.training for module in model.modules()]

    def modes():
        assert [module.training for module in model.modules()] == kept
        assert not any(module._forward_hooks or "forward" in vars(module) for module in model.modules())

    with meanwhile(modes, modes):
        for _ in range(15):
            np.testing.assert_array_equal(mine.encode(TEXTS), vectors)


def test_generation_goes_on_while_an_encoder_is_at_work():
    model: Any = tiny()
    mine, prompt = encoder(EACH, "moee", model), tokens(1, 6)
    given = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected, vectors = model.generate(prompt, **given), mine.encode(TEXTS)
    with meanwhile(lambda: np.testing.assert_array_equal(mine.encode(TEXTS), vectors)):
        for _ in range(5):
            assert torch.equal(model.generate(prompt, **given), expected)


def test_a_model_that_is_patched_runs_on_under_its_own_router_beside_other_encoders():
    model = usmoe.patch(tiny(), usmoe.USMoE(k=1, alpha=0.5))
    encoders = [encoder(router, "moee", model) for router in (None, HALF, EACH)]
    expected, vectors = plain(model), [one.encode(TEXTS) for one in encoders]
    assert len({vector.tobytes() for vector in vectors}) == 3
    loops = [
        lambda one=one, was=was: np.testing.assert_array_equal(one.encode(TEXTS), was)
        for one, was in zip(encoders, vectors, strict=True)
    ]
    with meanwhile(*loops):
        for _ in range(15):
            assert torch.equal(plain(model), expected)
    assert set(map(str, usmoe.routers(model).values())) == {"usmoe(k=1, alpha=0.5)"}


def test_a_patch_in_another_thread_is_seen_whole_or_not_at_all():
    model, other = tiny(), usmoe.USMoE(k=1, alpha=0.5)
    follows, own = encoder(None, "hidden", model), encoder(HALF, "hidden", model)
    bare, fixed = follows.encode(TEXTS), own.encode(TEXTS)
    patched = encoder(other, "hidden", model).encode(TEXTS)
    assert not np.array_equal(bare, patched)
    seen = []

    def turn():
        usmoe.patch(model, other)
        usmoe.unpatch(model)

    with meanwhile(turn, lambda: np.testing.assert_array_equal(own.encode(TEXTS), fixed)):
        for _ in range(40):
            found = follows.encode(TEXTS)
            seen.append(np.array_equal(found, patched))
            assert seen[-1] or np.array_equal(found, bare)


def test_asking_a_model_for_its_rules_changes_nothing_for_another_thread(monkeypatch):
    from usmoe.hf import recognise

    monkeypatch.setattr(recognise, "fingerprint", lambda *_: None)  # nothing is known: each call asks
    model = tiny(num_hidden_layers=1)
    expected = plain(model)
    with meanwhile(lambda: usmoe.supported(model)):
        for _ in range(30):
            assert torch.equal(plain(model), expected)


# What is done to the model is seen.


def test_what_is_learnt_loaded_and_moved_later_is_seen():
    model = tiny()
    mine = encoder(HALF, "moee", model)
    mine.encode(TEXTS)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.mul_(2)
    np.testing.assert_array_equal(mine.encode(TEXTS), encoder(HALF, "moee", copy.deepcopy(model)).encode(TEXTS))
    model.load_state_dict(tiny(seed=3).state_dict(), assign=True)
    np.testing.assert_array_equal(mine.encode(TEXTS), encoder(HALF, "moee", tiny(seed=3)).encode(TEXTS))
    model.double()
    wide = encoder(HALF, "moee", tiny(seed=3).double()).encode(TEXTS)
    np.testing.assert_array_equal(mine.encode(TEXTS), wide)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_that_comes_later_is_seen():
    peft = pytest.importorskip("peft")
    model = tiny()
    mine = encoder(HALF, "hidden", model)
    before = mine.encode(TEXTS)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    after = mine.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, encoder(HALF, "hidden", adapted.merge_and_unload()).encode(TEXTS), atol=1e-5)


def test_a_listener_of_the_users_hears_the_encoder():
    model = tiny()
    mine = encoder(HALF, "hidden", model)
    with usmoe.record(model) as trace:
        mine.encode(["ab", "abc"])
    assert {name: len(said) for name, said in trace.items()} == dict.fromkeys(trace, 1)
    with usmoe.record(model) as trace, meanwhile(lambda: mine.encode(TEXTS)):
        expected = plain(model)
        assert {name: len(said) for name, said in trace.items()} == dict.fromkeys(trace, 1)
        assert torch.equal(plain(model), expected)
    assert patch_of(model) is None


# The view itself.


def test_a_view_has_the_weights_and_nothing_else_of_a_model():
    model = tiny()
    view = view_of(model)
    assert [id(one) for one in view.parameters()] == [id(one) for one in model.parameters()]
    assert not {id(one) for one in view.modules()} & {id(one) for one in model.modules()}
    assert [name for name, _ in view.named_modules()] == [name for name, _ in model.named_modules()]
    usmoe.patch(view, HALF).train()
    assert patch_of(model) is None
    assert not model.training
    assert torch.equal(plain(usmoe.unpatch(view).eval()), plain(model))


def test_a_view_reaches_none_of_the_models_modules_in_other_ways():
    """Whatever stands in place of a forward, holds a module beside the tree, or was compiled."""
    ran = []
    model = tiny()
    first = model.model.layers[0]
    held = first.mlp.forward
    first.mlp.forward = lambda *args, **kwargs: held(*args, **kwargs)  # in a cell
    first.beside = {"gate": [first.mlp.gate]}
    model.model.layers[1].self_attn.compile(backend="eager")
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp, backend="eager")
    modules = list(model.modules())
    view = view_of(model)
    assert view.model.layers[0].beside["gate"][0] is view.model.layers[0].mlp.gate
    for module in modules:
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
    plain(view)
    assert ran == []
    mine = encoder(HALF, "moee", model)
    np.testing.assert_allclose(mine.encode(TEXTS), encoder(HALF, "moee").encode(TEXTS), atol=1e-6)


def test_what_holds_weights_elsewhere_is_brought_to_the_view():
    accelerate = pytest.importorskip("accelerate")
    model = tiny()
    expected = encoder(HALF, "moee").encode(TEXTS)
    accelerate.cpu_offload(model.model.layers, execution_device=torch.device("cpu"))
    assert all(one.is_meta for one in model.model.layers.parameters())
    np.testing.assert_array_equal(encoder(HALF, "moee", model).encode(TEXTS), expected)
    assert all(one.is_meta for one in model.model.layers.parameters())


# The tokenizer.


def test_the_users_tokenizer_can_be_used_with_truncation_meanwhile():
    model, tokenizer = tiny(), letters()
    mine = usmoe.Encoder(model, tokenizer, HALF)
    vectors = mine.encode(TEXTS)

    def truncate():
        tokenizer(TEXTS, truncation=True, max_length=3, padding="max_length")

    with meanwhile(truncate, truncate):
        for _ in range(60):
            np.testing.assert_array_equal(mine.encode(TEXTS), vectors)
        host = mine.as_sentence_transformer()
        for _ in range(20):
            np.testing.assert_allclose(host.encode(TEXTS), vectors, atol=1e-5)


def test_the_encoder_leaves_the_state_of_the_users_tokenizer_and_sees_tokens_that_are_added():
    tokenizer: Any = letters()
    mine = usmoe.Encoder(tiny(), tokenizer)
    tokenizer(["abc"], truncation=True, max_length=2)
    kept = tokenizer._tokenizer.truncation
    assert kept is not None
    before = mine.encode("abc")
    assert tokenizer._tokenizer.truncation == kept
    tokenizer.add_tokens(["bc"], special_tokens=True)
    mine.model.resize_token_embeddings(len(tokenizer) + 1)
    after = mine.encode("abc")
    assert mine.read(["abc"]) == [tokenizer("abc")["input_ids"]]
    assert not np.array_equal(after, before)


# A process that is forked.


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    "make", [lambda: encoder(HALF, "moee"), lambda: usmoe.Encoder(router=EACH * 2)], ids=["given", "loaded"]
)
def test_a_child_encodes_that_was_forked_while_a_thread_did(make):
    mine = make()
    expected = mine.encode("a text")
    with meanwhile(lambda: mine.encode(TEXTS), lambda: usmoe.supported(mine.model)):
        for _ in range(4):
            child = os.fork()
            if not child:
                try:
                    same = np.allclose(
                        mine.encode("a text"), expected, rtol=1e-4, atol=1e-5
                    )  # with one thread, as its parent had not
                    os._exit(0 if same else 3)
                finally:
                    os._exit(4)
            assert _ended(child, seconds=60) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_encodes_that_was_forked_while_a_thread_drew_a_bar():
    from tqdm import tqdm
    from tqdm.std import TqdmDefaultWriteLock

    mine, held, done = encoder(HALF), threading.Event(), threading.Event()
    expected = mine.encode("a text")

    def draw():
        with tqdm.get_lock():
            held.set()
            done.wait(90)

    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(draw)
        assert held.wait(60)
        try:
            child = os.fork()
            if not child:
                try:
                    os._exit(0 if np.allclose(mine.encode("a text"), expected, rtol=1e-4, atol=1e-5) else 3)
                finally:
                    os._exit(4)
        finally:
            done.set()
        assert _ended(child, seconds=30) == 0
        drawing.result()
    shared = TqdmDefaultWriteLock.mp_lock  # the parent's own bars go on
    assert shared.acquire(timeout=10)
    shared.release()


def _ended(child: int, seconds: float) -> int:
    """The exit status of a child; one that hangs is killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"A child hung for {seconds:.0f} s.")
