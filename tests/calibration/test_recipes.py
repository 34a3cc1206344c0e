"""Recipes: those that come along, what they mean layer by layer, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from mamba_export.calibration.recipes import CHANNEL, load_recipe, names

from mamba_export.errors import UsageError

EXPECTED = {"w8a16", "w8a16-gptq", "w8a8", "w4a16", "w4a16-g32", "w4a16-g64", "w4a16-g128", "w4a8", "fp8"}


def test_the_promised_recipes_come_along() -> None:
    assert set(names()) >= EXPECTED


@pytest.mark.parametrize("name", names())
def test_every_recipe_loads_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description
    assert recipe.layer("backbone.layers.0.mixer.in_proj").weights.type != "float"
    assert recipe.layer("backbone.layers.0.mixer.dt_proj").inputs.type == "float"


def test_only_what_rounds_to_nearest_needs_no_data() -> None:
    assert {name for name in names() if not load_recipe(name).needs_calibration} == {"w8a16"}


def test_overrides_apply_by_pattern_and_later_ones_win(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: w4a16-g128\nlayers:\n"
        "  '*.out_proj': {weights: {group: 32}}\n"
        "  'backbone.layers.0.*': {weights: {type: int8, group: channel, method: rtn}, rotate: 64}\n"
    )
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.layer("backbone.layers.1.mixer.out_proj").weights.group == 32
    assert recipe.layer("backbone.layers.1.mixer.in_proj").weights.group == 128
    first = recipe.layer("backbone.layers.0.mixer.out_proj")
    assert (first.weights.type, first.weights.group, first.rotate) == ("int8", CHANNEL, 64)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("wieghts: {type: int8}", "unknown key 'wieghts'"),
        ("weights: {bits: 4}", "unknown key 'bits'"),
        ("weights: {type: int3}", "can't be 'int3'"),
        ("weights: {type: int4, group: 100}", "can't be 100"),
        ("weights: {type: int4, group: -32}", "can't be -32"),
        ("weights: {type: fp8, group: 64}", "one scale a row"),
        ("weights: int4", "must hold keys and values"),
        ("inputs: {type: int8, percentile: 200}", "can't be 200"),
        ("rotate: {out_proj: 48}", "can't be 48"),
        ("rotate: {outproj: 64}", "unknown key 'outproj'"),
        ("smooth: 2", "can't be 2"),
        ("state: int4", "can't be 'int4'"),
        ("weights: {type: int4}\ninputs: {type: fp8}", "can't multiply fp8 inputs with int4"),
        ("layers: {'*': {wieghts: {}}}", "unknown key 'wieghts'"),
        ("layers: [1]", "must map patterns"),
        ("extends: nothing", "does not exist"),
        ("tune: {steps: -1}", "can't be -1"),
        ("- a list", "must hold keys and values"),
        ("weights: {type: int8", "is not YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert said in str(caught.value) and "bad.yaml" in str(caught.value)
    assert caught.value.hint


def test_a_recipe_that_extends_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(UsageError, match="extends itself"):
        load_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", ["w3a16", "../w8a16", "nothing.yaml"])
def test_an_unknown_recipe_names_the_known_ones(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(name)
    assert "w8a16" in str(caught.value.hint)
