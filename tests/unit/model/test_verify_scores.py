"""A reward model's folder is proved to give transformers' scores, and refused when it does not."""

import json

import pytest

from posttrain.errors import ModelError
from posttrain.model.backend import backend_of
from posttrain.model.export import export_model
from posttrain.model.load import load_decoder
from posttrain.model.verify_scores import compare_scores
from tiny import tiny_model


@pytest.fixture
def folder(tmp_path):
    source = tiny_model(tmp_path / "tiny")
    export_model(load_decoder(source, heads={"score": 1}, lm_head=False), tmp_path / "scores", like=source)
    return tmp_path / "scores"


def test_scores_are_compared_where_there_are_no_logits(folder):
    assert backend_of("posttrain").verify(folder, folder)["max_abs_diff"] <= 1e-4


def test_other_scores_are_refused(folder, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    # transformers reads one rope, we another: as a family that is defined wrongly would
    real = load_decoder

    def wrong(path):
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
        model = real(path)
        (folder / "config.json").write_text(json.dumps(config))
        return model

    monkeypatch.setattr("posttrain.model.verify_scores.load_decoder", wrong)
    with pytest.raises(ModelError, match="scores differ from transformers by"):
        compare_scores(folder)
