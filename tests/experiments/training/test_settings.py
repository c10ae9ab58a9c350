"""The settings of a training: one schema, checked when it is made, for keywords, flags, suites and run folders."""

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

import pliant
from pliant.errors import BadInput
from pliant.experiments.methods import METHODS, resolved, settings_from
from pliant.experiments.training.settings import OWN, SETTINGS, Resolved, Setting, Settings

# What config.yaml has, in this order: files of runs stay as they are.
ORDER = [
    "data",
    "data_dir",
    "image_size",
    "model",
    "width",
    "method",
    "recipe",
    "k",
    "radius",
    "vertices",
    "scheme",
    "coupled",
    "turnover",
    "rescale",
    "pattern",
    "k_start",
    "anneal",
    "strength",
    "every",
    "persistence",
    "energy",
    "factors",
    "condition",
    "other_lr",
    "epochs",
    "batch_size",
    "accumulate",
    "lr",
    "schedule",
    "warmup",
    "momentum",
    "weight_decay",
    "augment",
    "precision",
    "channels_last",
    "seed",
    "deterministic",
    "checkpoint_steps",
    "tracker",
]


def quick(out: Path, *first: Any, **options: Any) -> Path:
    return pliant.train(
        *first, **{"model": "mlp", "width": 0.05, "epochs": 1, "batch_size": 512, **options}, out=str(out)
    )


def test_every_setting_says_what_it_is() -> None:
    assert list(SETTINGS) == ORDER
    groups = list(dict.fromkeys(setting.group for setting in SETTINGS.values()))
    assert groups == ["data", "network", "method", "schedule", "machine"]
    for name, setting in SETTINGS.items():
        assert setting.doc.endswith("."), name
        setting.check(name, setting.default)


def test_the_settings_of_methods_are_those_that_methods_have() -> None:
    assert set(OWN) == {name for method in METHODS.values() for name in method.own}
    assert all(SETTINGS[name].default is None for name in OWN)


def test_settings_are_checked_when_they_are_made_and_do_not_change() -> None:
    with pytest.raises(BadInput, match="--epochs must be at least 1, got 0"):
        Settings(epochs=0)
    with pytest.raises(BadInput, match="--lr expects float or null, got 'x'"):
        Settings(lr="x")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="--seed expects int, got True"):
        Settings(seed=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().epochs = 3  # type: ignore[misc]
    with pytest.raises(BadInput, match="--epochs"):
        dataclasses.replace(Settings(), epochs=-1)


def test_a_wrong_keyword_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^unknown setting 'epoch': did you mean 'epochs'\? known are ") as caught:
        quick(tmp_path / "run", epoch=3)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_method_decides_what_is_not_given() -> None:
    settings = resolved(Settings(method="trp", strength=0.5))
    assert isinstance(settings, Resolved)
    assert (settings.lr, settings.energy, settings.every, settings.strength, settings.k) == (0.1, 0.02, 20, 0.5, None)
    assert resolved(settings) == settings
    assert Settings(method="trp", strength=0.5, seed=3).by("sgd") == Settings(seed=3)


def test_a_run_of_an_earlier_version_lacks_settings(tmp_path: Path) -> None:
    settings = Settings(method="sfw-rank", k=0.2)
    config = settings.to_config()
    assert list(config) == ORDER
    assert Settings.from_config(config) == settings
    del config["checkpoint_steps"], config["scheme"]
    assert Settings.from_config({**config, "of_a_later_version": 3}) == settings


def test_settings_in_one_object_or_by_name_leave_the_same_run(tmp_path: Path) -> None:
    one = quick(tmp_path / "one", "digits", method="ssl", seed=4)
    settings = Settings(model="mlp", width=0.05, epochs=1, batch_size=512, method="ssl", seed=4)
    two = pliant.train(settings, out=str(tmp_path / "two"))
    assert [(run / "model.safetensors").read_bytes() for run in (one, two)] == 2 * [
        (one / "model.safetensors").read_bytes()
    ]
    assert (one / "config.yaml").read_text() == (two / "config.yaml").read_text()
    assert pliant.train(settings, out=str(two), resume=True) == two
    with pytest.raises(BadInput, match="--seed 5 contradicts 4"):
        pliant.train(dataclasses.replace(settings, seed=5), out=str(two), resume=True)


def test_a_setting_is_given_once(tmp_path: Path) -> None:
    for first, options, culprit in (
        (("digits",), {"data": "cifar10"}, "data"),
        (("digits", None, None, "mlp"), {"model": "lenet5", "width": 1}, "model"),
        (("digits",) * (len(SETTINGS) + 1), {}, f"at most {len(SETTINGS)}"),
        ((Settings(),), {"epochs": 3}, "epochs"),
        ((Settings(), "digits"), {}, "'digits'"),
    ):
        with pytest.raises(BadInput, match=f"expected .*{culprit}"):
            pliant.train(*first, **options, out=str(tmp_path / "run"))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_settings_by_position_are_those_of_the_signature(tmp_path: Path) -> None:
    parameters = inspect.signature(pliant.train).parameters
    assert [name for name in parameters if name not in ("out", "resume", "settings")] == ORDER
    assert {name: parameters[name].default for name in ORDER} == {name: getattr(Settings(), name) for name in ORDER}
    run = pliant.train("digits", None, None, "mlp", 0.05, epochs=1, batch_size=512, out=str(tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["model"], config["width"]) == ("mlp", 0.05)


def test_a_default_that_was_given_contradicts_as_any_other_value(tmp_path: Path) -> None:
    run = quick(tmp_path / "run", seed=3, augment=False)
    for given in ({"seed": 0}, {"augment": True}):
        with pytest.raises(BadInput, match="contradicts"):
            pliant.train(out=str(run), resume=True, **given)
    assert pliant.train(out=str(run), resume=True, lr=None, precision="auto") == run


def test_config_yaml_tells_what_was_decided(tmp_path: Path) -> None:
    run = quick(tmp_path / "run", method="sfw-filters", k=0.5)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert list(config) == ORDER
    assert (config["k"], config["radius"], config["turnover"], config["rescale"]) == (0.5, 1.0, None, "none")
    assert 0 < config["lr"] <= 0.1
    assert settings_from(config) == Settings.from_config(config)


def test_a_setting_says_what_it_takes() -> None:
    setting = Setting(0.5, "a share.", float | None)
    for value in (0.5, 1, None, math.inf):
        setting.check("share", value)
    for value in ("x", True):
        with pytest.raises(BadInput, match="--share expects float or null"):
            setting.check("share", value)
