"""The model that is trained is the model that is served: our logprobs against vLLM's, in bfloat16, on a GPU."""

import pytest
import torch

from posttrain.errors import ModelError
from posttrain.model.random_model import write_random_model
from steps.verify import verify

pytest.importorskip("vllm")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,  # below 32, vLLM's kernels do not serve it
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_vllm_gives_a_random_model_the_same_logprobs(tmp_path, family, tied):
    folder = write_random_model(tmp_path, {"model_type": family, "tie_word_embeddings": tied, **SHAPE}, seed=0)
    found = verify(str(folder), against=("transformers", "vllm"), seeds=2)
    assert found["vllm"]["mean_abs_diff"] <= found["vllm"]["tolerance"]
    assert 0 < found["vllm"]["kl_like"] < 1e-2, "the same bits would mean that one model was compared with itself"


def test_a_decoder_without_positions_is_refused(tmp_path, monkeypatch):
    folder = write_random_model(tmp_path, {"model_type": "qwen3", **SHAPE}, seed=0)
    monkeypatch.setattr("posttrain.model.attention.rotate", lambda x, cos, sin: x)
    with pytest.raises(ModelError, match="logprobs differ from vllm's in bfloat16 on average"):
        verify(str(folder), against=("vllm",))
