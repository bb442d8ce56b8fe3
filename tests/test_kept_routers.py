"""What a model is patched with, and what its layers tracked, is kept by whatever saves the model, or told."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import usmoe
from families import FAMILIES, build
from rounding import assert_leaks, assert_to_rounding
from tiny import tiny, tokens

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"  # which peft 0.21 reads
)

NAMES = ["model.layers.0.mlp", "model.layers.1.mlp"]
ONE, OTHER = usmoe.USMoE(k=1.5), usmoe.TokenChoice(k=1)
LOOKING_AHEAD = [usmoe.USMoE(k=1.5), usmoe.ExpertChoice(k=2), usmoe.BoundedChoice(k=2, per_token=(1, 3))]


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=tokens(), **kwargs).logits


def test_routers_says_what_each_layer_is_patched_with():
    model = tiny()
    assert usmoe.routers(model) == {}
    assert usmoe.routers(usmoe.patch(model, [ONE, OTHER])) == dict(zip(NAMES, [ONE, OTHER], strict=True))
    with usmoe.patched(model, usmoe.OwnChoice()):
        assert usmoe.routers(model) == dict.fromkeys(NAMES, usmoe.OwnChoice())
    assert usmoe.routers(model)[NAMES[1]] == OTHER
    assert usmoe.routers(usmoe.unpatch(model)) == {}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_of_every_family_they_are_those_that_patch_gave_by_name(family):
    model = build(FAMILIES[family])
    names = [row.layer for row in usmoe.supported(model)]
    given = {name: usmoe.USMoE(k=1 + place / 8) for place, name in enumerate(names)}
    assert usmoe.routers(usmoe.patch(model, given)) == given


def test_they_are_seen_through_what_wraps_a_model_and_from_a_part_of_it():
    from peft import LoraConfig, get_peft_model

    model = usmoe.patch(tiny(), [ONE, OTHER])
    said = usmoe.routers(model)
    compiled: Any = torch.compile(model, backend="eager")
    assert usmoe.routers(compiled) == said
    assert usmoe.routers(torch.nn.DataParallel(model)) == said
    assert usmoe.routers(model.model) == {name.removeprefix("model."): router for name, router in said.items()}
    assert usmoe.routers(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) == said
    inner = tiny()
    usmoe.patch(inner.model, ONE)
    assert usmoe.routers(inner) == dict.fromkeys(NAMES, ONE)
    with pytest.raises(TypeError, match="is not a transformers model"):
        usmoe.routers(torch.nn.Linear(2, 2))


def trained(model: Any, first: int = 0) -> Any:
    """A model whose layers have tracked cuts of three batches, from that number on."""
    model.train()
    for seed in range(first, first + 3):
        model(input_ids=tokens(seed=seed))
    return model.eval()


@pytest.mark.portable
@pytest.mark.parametrize("router", LOOKING_AHEAD, ids=str)
def test_tracked_cuts_come_back_so_that_to_causal_serves_what_was_trained(router, tmp_path):
    model = trained(usmoe.patch(tiny(), router))
    model.save_pretrained(tmp_path)
    again = usmoe.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "twice")
    usmoe.to_causal(model)
    for one in (again, usmoe.from_pretrained(tmp_path / "twice")):
        assert usmoe.routers(usmoe.to_causal(one)) == usmoe.routers(model)
        assert_to_rounding(logits(one), logits(model))  # weights from a file lie elsewhere in memory
    said = json.loads((tmp_path / "config.json").read_text())["usmoe"]
    assert said["schema"] == 2
    assert list(said["cuts"]) == NAMES
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None


def test_cuts_of_another_router_are_neither_written_nor_taken(tmp_path):
    model = trained(usmoe.patch(tiny(), ONE))
    model.save_pretrained(tmp_path)
    other = usmoe.from_pretrained(tmp_path, router=usmoe.USMoE(k=2))
    with pytest.raises(ValueError, match="has tracked no cut"):
        usmoe.to_causal(other)
    same = usmoe.from_pretrained(tmp_path, router=ONE)
    assert usmoe.routers(usmoe.to_causal(same)) == usmoe.routers(usmoe.to_causal(model))
    model.save_pretrained(tmp_path / "causal")  # the cuts are those of the router before
    assert json.loads((tmp_path / "causal" / "config.json").read_text())["usmoe"]["schema"] == 1


@pytest.mark.portable
def test_training_goes_on_with_the_cuts_that_were_saved(tmp_path):
    model = trained(usmoe.patch(tiny(), ONE))
    model.save_pretrained(tmp_path)
    three = (model, usmoe.from_pretrained(tmp_path), usmoe.patch(tiny(), ONE))  # the last without a past
    served = [list(usmoe.routers(usmoe.to_causal(trained(one, first=3))).values()) for one in three]
    cuts = [torch.tensor([router.threshold for router in routers]).float() for routers in served]
    assert_to_rounding(cuts[1], cuts[0])  # of scores in float32, by weights that lie elsewhere in memory
    assert_leaks(cuts[2], cuts[0], roundings=8)
    one, other = served[:2]
    assert [replace(router, threshold=0.0) for router in one] == [replace(router, threshold=0.0) for router in other]


def test_damaged_cuts_are_refused_in_a_sentence(tmp_path):
    trained(usmoe.patch(tiny(), ONE)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["usmoe"]["cuts"][NAMES[0]].pop("weight")
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds no cuts for model\.layers\.0\.mlp"):
        usmoe.from_pretrained(tmp_path)


def base(tmp_path) -> Any:
    """A folder of the plain model that adapters name."""
    tiny().save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()


@pytest.mark.parametrize("order", ["patch, then wrap", "wrap, then patch"])
def test_an_adapter_is_saved_with_its_routers_and_loaded_under_them(order, tmp_path):
    from peft import PeftModel

    model = base(tmp_path)
    model = adapted(usmoe.patch(model, ONE)) if order.startswith("patch") else usmoe.patch(adapted(model), ONE)
    trained(model)
    model.save_pretrained(tmp_path / "adapter")
    again = usmoe.from_pretrained(tmp_path / "adapter")
    assert isinstance(again, PeftModel)
    assert usmoe.routers(again) == dict.fromkeys(NAMES, ONE)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)
    assert usmoe.routers(usmoe.to_causal(again)) == usmoe.routers(usmoe.to_causal(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    said = warned(lambda: PeftModel.from_pretrained(plain, tmp_path / "adapter"))
    assert len(said) == 1
    assert "usmoe_routers.json" in said[0]
    assert "usmoe.from_pretrained" in said[0]
    patched = usmoe.from_pretrained(tmp_path / "base", ONE)
    assert not warned(lambda: PeftModel.from_pretrained(patched, tmp_path / "adapter"))


def warned(act) -> list[str]:
    """What usmoe warns of meanwhile."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(one.message) for one in caught if issubclass(one.category, UserWarning) and "usmoe" in str(one.message)]


def test_an_adapter_of_a_plain_model_gets_nothing_and_a_merged_model_keeps_all(tmp_path):
    plain = adapted(base(tmp_path))
    plain.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "usmoe_routers.json").exists()
    assert usmoe.routers(usmoe.from_pretrained(tmp_path / "plain")) == {}
    model = trained(usmoe.patch(plain, ONE))
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = usmoe.from_pretrained(tmp_path / "merged")
    assert usmoe.routers(again) == dict.fromkeys(NAMES, ONE)
    assert_to_rounding(logits(again), logits(merged))
    assert usmoe.routers(usmoe.to_causal(again)) == usmoe.routers(usmoe.to_causal(merged))


def test_an_adapter_of_transformers_own_keeps_them_too(tmp_path):
    from peft import LoraConfig

    model = usmoe.patch(base(tmp_path), ONE)
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    again = usmoe.from_pretrained(tmp_path / "adapter")
    assert usmoe.routers(again) == dict.fromkeys(NAMES, ONE)
    assert torch.allclose(logits(again), logits(model), atol=1e-6)


def test_the_trainer_and_push_to_hub_write_them(tmp_path, monkeypatch):
    model = trained(usmoe.patch(tiny(), ONE))
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    Trainer(model=model, args=args).save_model(str(tmp_path / "trainer"))
    assert usmoe.routers(usmoe.to_causal(usmoe.from_pretrained(tmp_path / "trainer")))
    kept = {}

    def upload(self, folder, *args, **kwargs):
        kept.update(json.loads((type(tmp_path)(folder) / "config.json").read_text())["usmoe"])

    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    hub = SimpleNamespace(create_repo=lambda *args, **kwargs: SimpleNamespace(repo_id="a/b"))
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    model.push_to_hub("a/b")
    assert list(kept["routers"]) == NAMES


def test_a_router_that_was_edited_since_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "kept_mine.py"
    text = (
        "import usmoe\ndef route(logits, valid=None, **kw):\n    return usmoe.TokenChoice(k=1)(logits, valid, **kw)\n"
    )
    file.write_text(text)
    from kept_mine import route  # pyright: ignore[reportMissingImports]

    usmoe.patch(tiny(), route).save_pretrained(tmp_path / "model")
    assert usmoe.routers(usmoe.from_pretrained(tmp_path / "model", router=route))  # no warning, which is an error here
    file.write_text(text.replace("k=1", "k=2"))
    with pytest.warns(UserWarning, match=r"kept_mine:route was edited since.*digest"):
        usmoe.from_pretrained(tmp_path / "model", router=route)
