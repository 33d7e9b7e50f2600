"""Fixtures of the data tests: the smallest tokenizer, and the folder that it was opened from."""

import pytest

from posttrain.data.tokenizer import BaseHFModelTokenizer
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return BaseHFModelTokenizer(folder)
