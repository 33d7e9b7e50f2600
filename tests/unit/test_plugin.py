"""An import path in a config becomes the object it names, or one error that says why not."""

import math

import pytest

from posttrain.errors import ConfigError
from posttrain.plugin import resolve


def test_a_path_becomes_the_object_it_names():
    assert resolve("math:sqrt", key="reward.function") is math.sqrt


def test_a_missing_module_is_named_with_the_key_that_asked_for_it():
    with pytest.raises(ConfigError) as error:
        resolve("no_such_package.rewards:score", key="reward.function")
    assert str(error.value).startswith("reward.function: no_such_package.rewards:score: No module named")
    assert "PYTHONPATH" in str(error.value)


def test_a_missing_name_is_answered_with_the_names_there_are(tmp_path, monkeypatch):
    (tmp_path / "plugin_with_one_name.py").write_text("_hidden = 1\n\ndef score(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as error:
        resolve("plugin_with_one_name:scor", key="reward.function")
    assert str(error.value).endswith("plugin_with_one_name has no 'scor'; it has score")


def test_a_module_that_raises_on_import_is_a_config_error(tmp_path, monkeypatch):
    (tmp_path / "plugin_that_raises.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="importing plugin_that_raises raised ZeroDivisionError"):
        resolve("plugin_that_raises:score", key="reward.function")


def test_a_module_whose_own_import_is_missing_says_which(tmp_path, monkeypatch):
    (tmp_path / "plugin_that_needs.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="no_such_dependency"):
        resolve("plugin_that_needs:score", key="reward.function")
