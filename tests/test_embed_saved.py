"""An Encoder in a folder: the same vectors when it comes back, whole or not at all."""

import json
from pathlib import Path

import pytest
import torch

import usmoe
from rounding import assert_to_rounding
from tiny import tiny
from tiny_encoder import EACH, ENCODERS, HALF, TEXTS, encoder, positive
from usmoe.embed.encoder import Encoder
from usmoe.embed.saved import save
from usmoe.hf.patch import patch_of

pytestmark = pytest.mark.portable


@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
def test_a_saved_encoder_has_the_same_weights_to_the_bit_and_gives_the_same_vectors(make, tmp_path):
    before = make()
    before.save(tmp_path / "one")
    again = Encoder.load(tmp_path / "one")
    weights = before.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())
    assert_to_rounding(again.encode(TEXTS), before.encode(TEXTS))
    assert (again.settings, again.source) == (before.settings, str(tmp_path / "one"))
    assert again.about()["router"] == before.about()["router"]
    again.save(tmp_path / "two")
    assert_to_rounding(Encoder.load(tmp_path / "two").encode(TEXTS), before.encode(TEXTS))
    assert not list(tmp_path.glob(".*"))


def test_the_saved_routers_are_those_of_the_layers_and_others_can_be_given(tmp_path):
    encoder(EACH, "moee").save(tmp_path)
    again = Encoder.load(tmp_path)
    assert patch_of(again.model).routers == EACH
    assert patch_of(usmoe.from_pretrained(tmp_path)).routers == EACH
    assert patch_of(Encoder.load(tmp_path, router=HALF).model).routers == [HALF, HALF]


def test_the_dtype_is_kept_and_another_can_be_given(tmp_path):
    encoder(HALF, "moee").save(tmp_path / "float32")
    half = Encoder.load(tmp_path / "float32", dtype="bfloat16")
    half.save(tmp_path / "bfloat16")
    again = Encoder.load(tmp_path / "bfloat16")
    assert again.model.dtype == torch.bfloat16
    assert_to_rounding(again.encode(TEXTS), half.encode(TEXTS), roundings=8, dtype=torch.bfloat16)
    assert Encoder.load(tmp_path / "bfloat16", dtype="float32").model.dtype == torch.float32


def test_statistics_are_kept_with_their_name(tmp_path):
    encoder(standardize={"mine": TEXTS}).save(tmp_path)
    statistics = Encoder.load(tmp_path).statistics
    assert (statistics.name, statistics.texts) == ("mine", len(TEXTS))


def test_saving_again_replaces_the_encoder_and_leaves_other_files(tmp_path):
    encoder(HALF, "moee", standardize=TEXTS).save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"of a larger model")
    after = encoder(model=tiny(seed=3))
    after.save(tmp_path)
    assert_to_rounding(Encoder.load(tmp_path).encode(TEXTS), after.encode(TEXTS))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("*-of-*")) + list(tmp_path.glob("usmoe_encoder.safetensors"))


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    before = encoder()
    before.save(tmp_path / "encoder")
    broken = encoder(HALF, model=tiny(seed=3))
    monkeypatch.setattr(broken.tokenizer, "save_pretrained", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.save(tmp_path / "encoder")
    with pytest.raises(ZeroDivisionError):
        broken.save(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]
    assert_to_rounding(Encoder.load(tmp_path / "encoder").encode(TEXTS), before.encode(TEXTS))
    assert patch_of(broken.model) is None


def test_a_save_that_is_killed_between_two_files_is_not_read(tmp_path, monkeypatch):
    encoder().save(tmp_path)
    move = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: move(self, to) if self.suffix != ".safetensors" else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder(model=tiny(seed=3)).save(tmp_path)
    with pytest.raises(ValueError, match=r"there is no usmoe_encoder\.json"):
        Encoder.load(tmp_path)


def spoil(folder, change) -> None:
    path = folder / "usmoe_encoder.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda saved: saved.update(schema=2), r"has schema 2, and this usmoe reads schema 1\. Update usmoe"),
        (lambda saved: saved.pop("schema"), "no schema"),
        (lambda saved: saved.pop("dtype"), r"not as usmoe writes it \('dtype'\)"),
        (lambda saved: saved["settings"].update(colour=3), "not as usmoe writes it.*colour"),
        (lambda saved: saved["settings"].update(pooling="max"), "pooling='max' is unknown"),
        (lambda saved: saved["routers"].pop("routers"), "holds no routers"),
        (lambda saved: saved["routers"]["routers"].update({"nowhere": {"router": "usmoe"}}), "no MoE layer 'nowhere'"),
        (lambda saved: saved["statistics"].pop("name"), "not as usmoe writes it.*name"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused_in_a_sentence(change, sentence, tmp_path):
    encoder(HALF, "moee", standardize=TEXTS).save(tmp_path)
    spoil(tmp_path, change)
    with pytest.raises(ValueError, match=sentence):
        Encoder.load(tmp_path)


@pytest.mark.parametrize("name", ["usmoe_encoder.json", "usmoe_encoder.safetensors", "model.safetensors"])
def test_a_file_that_is_cut_short_is_refused_in_a_sentence(name, tmp_path):
    encoder(HALF, "moee", standardize=TEXTS).save(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut short|cannot be loaded from its folder"):
        Encoder.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"missing|there is no|cannot be loaded from its folder"):
        Encoder.load(tmp_path)


def test_a_router_of_ones_own_is_named_and_has_to_be_given(tmp_path):
    before = encoder(positive, "moee")
    before.save(tmp_path)
    with pytest.raises(ValueError, match=r"tiny_encoder:positive.*Give it: usmoe\.Encoder\.load\(folder, router="):
        Encoder.load(tmp_path)
    assert_to_rounding(Encoder.load(tmp_path, router=positive).encode(TEXTS), before.encode(TEXTS))


def test_a_router_that_is_none_is_refused_as_patch_does(tmp_path):
    encoder().save(tmp_path)
    with pytest.raises(TypeError, match="The router is a text"):
        Encoder.load(tmp_path, router="usmoe")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # which peft reads
def test_what_transformers_cannot_write_is_refused(tmp_path):
    peft, _ = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    adapted = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="an adapter of peft"):
        encoder(model=adapted).save(tmp_path / "adapted")
    with pytest.raises(ValueError, match="are in 4 bits"):
        encoder(model=usmoe.quantize_experts(tiny())).save(tmp_path / "packed")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        save(encoder(), tmp_path / "file")
