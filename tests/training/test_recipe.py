"""Recipes: what is refused, presets, files, settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rsedge.errors import OptionError
from rsedge.training.recipe import (
    LoopRecipe,
    ModelRecipe,
    Recipe,
    describe_keys,
    from_dict,
    keys,
    load_recipe,
    presets,
    save_recipe,
    to_dict,
    with_settings,
)
from rsedge.training.tuning.search_space import parse_space

REFERENCE = {
    "blip-rsicd", "clip-rsicd", "rsdix-clip-b32", "rsdix-clip-b16", "rsdix-clip-l14", "rsdix-clip-sbert",
    "rsdix-siglip",
    "rsdix-clipcap-small", "rsdix-clipcap-medium", "rsdix-clipcap-large", "rsdix-clipcap-xl",
}  # fmt: skip


def family_of(name: str) -> str:
    if "clipcap" in name:
        return "clipcap"
    return "clip" if "clip" in name or "siglip" in name else "blip"


def test_the_reference_settings_are_there():
    assert set(presets()) >= REFERENCE
    assert all(text.strip() for text in presets().values())


@pytest.mark.parametrize("name", sorted(presets()))
def test_every_preset_loads_and_survives_a_file(name, tmp_path):
    recipe = load_recipe(name, family=family_of(name))
    save_recipe(tmp_path / "recipe.toml", recipe)
    assert load_recipe(tmp_path / "recipe.toml", family=recipe.family) == recipe
    assert from_dict(to_dict(recipe)) == recipe


def test_reference_figures():
    blip = load_recipe("blip-rsicd", family="blip")
    assert (blip.optimizer.learning_rate, blip.schedule.name, blip.loop.epochs) == (5e-7, "plateau", 5)
    assert (blip.model.image_size, blip.loop.mixed_precision) == (224, "fp16")
    rsdix = load_recipe("rsdix-clip-l14", family="clip")
    assert rsdix.optimizer.betas == (0.9, 0.99)
    assert (rsdix.optimizer.learning_rate, rsdix.loop.batch_size) == (4e-4, 512)
    assert rsdix.augmentation.rotation == (0, 180)


def test_settings_by_dotted_and_by_short_key():
    recipe = load_recipe(
        "blip-cpu",
        family="blip",
        settings=["learning_rate=1e-4", "loop.batch_size=8", "micro_batch_size=", "freeze=['text']"],
    )
    assert recipe.optimizer.learning_rate == 1e-4
    assert (recipe.loop.batch_size, recipe.loop.micro_batch_size) == (8, None)
    assert recipe.model.freeze == ("text",)
    assert recipe.model.config["vision"]["hidden_size"] == 128  # the rest stays
    words = load_recipe(None, family="blip", settings=["tokenizer=captions", "model.config.text.vocab_size=5"])
    assert (words.model.tokenizer, words.model.config) == ("captions", {"text": {"vocab_size": 5}})
    assert with_settings(recipe, {"optimizer.learning_rate": 1e-5}).optimizer.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["learning_rat=1"], "did you mean learning_rate"),
        (["nonsense"], "write key=value"),
        (["loop.batch_size=many"], "loop.batch_size must be a whole number"),
        (["optimizer.learning_rate=-1"], "learning_rate is -1"),
        (["name=adamw"], "optimizer.name or schedule.name"),
        (["schedule.factor=0.5"], "belong to the schedule plateau"),
        (["batch_size=10", "micro_batch_size=4"], "not a multiple"),
        (["paraphrase_probability=0.5"], "rsedge back-translate"),
        (["contrastive.teacher_decay=0.9"], r"\[contrastive\] belongs to clip"),
        (["loop.monitor=val_bleu_4", "loop.captions=0"], "set loop.captions above 0"),
        (["loop.monitor=val_blue_4", "loop.captions=4"], "an evaluation gives val_loss, val_bleu_1"),
        (["loop.monitor=val_bleu_4", "loop.captions=4"], "set loop.monitor_mode to max"),
        (["loop.monitor_mode=max"], "val_loss is better the smaller it is: set loop.monitor_mode to min"),
        (["schedule.start_factor=0.5", "warmup_steps=0"], "there is no warm-up"),
        (["tokenizer="], "there is no tokenizer"),
        (["model.encoder=x"], "belong to clipcap"),
        (["optimizer.name=adafactor", "betas=[0.5, 0.9]"], "belong to adamw"),
        (["augmentation.rotation=[5]"], "rotation is"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(OptionError, match=message):
        load_recipe("blip-cpu", family="blip", settings=settings)


def test_everything_wrong_is_named_at_once():
    with pytest.raises(OptionError) as caught:
        load_recipe(None, family="clip", settings=["epochs=0", "log_every=0", "betas=[1, 2, 3]", "bogus=1"])
    for part in ("epochs is 0", "log_every is 0", "betas are", "bogus is not a key"):
        assert part in str(caught.value)


def test_files_of_another_family_or_with_unknown_keys(tmp_path):
    with pytest.raises(OptionError, match="is a recipe for blip"):
        load_recipe("blip-cpu", family="clip")
    with pytest.raises(OptionError, match="give a TOML file or one of blip-cpu"):
        load_recipe("blip-xpu", family="blip")
    path = tmp_path / "mine.toml"
    path.write_text('[model]\ninit = "x"\n[loop]\nepoch = 3\n[optimiser]\nname = "adamw"\n')
    with pytest.raises(OptionError) as caught:
        load_recipe(path, family="blip")
    assert "loop.epoch is not a key of a recipe: did you mean loop.epochs?" in str(caught.value)
    assert "optimiser is not a key of a recipe: did you mean optimizer?" in str(caught.value)
    path.write_text('family = "blap"\n')
    with pytest.raises(OptionError, match=r'family must be .*, got "blap"'):
        load_recipe(path, family="blip")


def test_a_setting_within_what_is_no_table(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("loop = 5\n[model]\nconfig = 3\n")
    with pytest.raises(OptionError) as caught:
        load_recipe(path, family="blip", settings=["loop.epochs=1", "model.config.vision.hidden_size=8"])
    assert "loop is 5, expected a table" in str(caught.value)
    assert "model.config is 3, expected a table" in str(caught.value)


def test_a_misspelt_key_is_the_same_error_everywhere(tmp_path):
    message = "learning_rat is not a key of a recipe: did you mean learning_rate?"
    for source in (None, "blip-cpu"):
        with pytest.raises(OptionError) as caught:
            load_recipe(source, family="blip", settings=["learning_rat=1"])
        assert str(caught.value) == message
    recipe = load_recipe(None, family="blip")
    with pytest.raises(OptionError) as caught:
        parse_space({"learning_rat": "log:1e-5:1e-3"}, recipe)
    assert str(caught.value) == message


def test_without_a_recipe_a_small_model_or_the_one_that_is_named():
    assert load_recipe(None, family="clip") == load_recipe("clip-cpu", family="clip")
    changed = load_recipe(None, family="blip", settings=["image_size=64"])
    assert (changed.model.image_size, changed.loop.captions) == (64, 200)
    named = load_recipe(None, family="blip", settings=["model.init=x"])
    assert (named.model.init, named.model.tokenizer, named.loop.captions) == ("x", None, 0)


def test_every_key_is_described_with_its_type_default_and_meaning():
    lines = dict(zip(keys(), describe_keys(), strict=True))
    assert all(line.startswith(f"{key}  (") for key, line in lines.items())
    assert all(len(line.rpartition(")  ")[2]) > 5 for line in lines.values())
    assert lines["loop.monitor_mode"] == (
        'loop.monitor_mode  ("min" | "max"; default "min")  Whether a smaller (min) or a larger (max) value is better.'
    )
    assert lines["model.freeze"].startswith("model.freeze  (a list; default [])  Parts (vision, text, …)")
    assert (
        lines["augmentation.horizontal_flip"] == "augmentation.horizontal_flip  (a number)  Probability of each flip."
    )
    assert not any("``" in line or ":func:" in line or "None" in line for line in lines.values())


def test_keys_are_those_of_the_dataclasses():
    assert {"family", "model.config", "contrastive.rsdix.alpha", "loop.micro_batch_size"} <= set(keys())


def test_a_recipe_checks_across_tables():
    with pytest.raises(OptionError, match="clip writes no captions"):
        Recipe(family="clip", model=ModelRecipe(init="x"), loop=LoopRecipe(captions=3))
    recipe = Recipe(family="blip", model=ModelRecipe(init="x"))
    with pytest.raises(OptionError, match="seed is -1"):
        replace(recipe, seed=-1)
