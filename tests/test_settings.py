"""Settings check themselves, wherever they come from."""

from dataclasses import dataclass

import pytest

from mlx_align.errors import SettingsError
from mlx_align.settings import Settings, build, fingerprint, read_file, setting


@dataclass(frozen=True)
class Oven(Settings):
    heat: float = setting(180.0, "Degrees.", above=0, maximum=300)
    trays: int = setting(1, "How many.", minimum=1, aliases=("sheets",))
    mode: str = setting("fan", "Kind of heat.", choices=("fan", "grill"))
    light: bool = setting(False, "Light.")
    dishes: tuple[str, ...] | None = setting(None, "What is in.")


def test_values_are_converted_to_their_types():
    oven = Oven(heat="2e2", trays=2.0, dishes=["pie", "bread"])
    assert (oven.heat, oven.trays, oven.dishes) == (200.0, 2, ("pie", "bread"))
    assert Oven(dishes="pie").dishes == ("pie",)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"heat": 0}, "heat: 0.0 is out of range; it must be greater than 0"),
        ({"heat": 301}, "at most 300"),
        ({"trays": 1.5}, "trays: 1.5 is not a whole number"),
        ({"trays": 0}, "at least 1"),
        ({"mode": "gril"}, "did you mean 'grill'"),
        ({"light": "yes"}, "light: 'yes' is not true or false"),
        ({"light": 1}, "true or false"),
        ({"heat": None}, "a value is needed"),
        ({"heat": "hot"}, "is not a number"),
    ],
)
def test_bad_values_are_refused_by_name(values, words):
    with pytest.raises(SettingsError) as caught:
        Oven(**values)
    assert words in str(caught.value)


def test_unknown_keys_name_the_nearest():
    with pytest.raises(SettingsError) as caught:
        build([Oven], {"heats": 3, "zzz": 1}, "oven.yaml")
    assert str(caught.value) == "oven.yaml: unknown setting 'heats' (did you mean 'heat'?), 'zzz'"


def test_aliases_and_dashes_mean_the_same_setting():
    (oven,) = build([Oven], {"sheets": 4}, "x")
    assert oven.trays == 4
    with pytest.raises(SettingsError, match="given twice"):
        build([Oven], {"sheets": 4, "trays": 4}, "x")


def test_yaml_numbers_with_exponents(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("heat: 1e2\ntrays: 3\n")
    (oven,) = build([Oven], read_file(file), str(file))
    assert (oven.heat, oven.trays) == (100.0, 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [("heat: [1", "a.yaml:1: not valid YAML"), ("- 1\n- 2", "expected 'name: value' lines")],
)
def test_broken_files_say_where(tmp_path, text, words):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_file(file)
    assert words in str(caught.value)


def test_fingerprint_depends_on_content_alone():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
