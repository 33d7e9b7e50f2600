"""Whether generators get adapters apart from the weights, and what is said where they do not."""

import pytest

from posttrain.model.lora import LoRA
from runs import small_config
from steps.sampling import adapters_apart


@pytest.mark.parametrize(
    ("generator", "rank", "said"),
    [
        ("vllm", 512, ""),
        ("vllm", 513, "rollout.generator vllm takes adapters of rank 512 at most: each sync sends all weights"),
        ("transformers", 513, ""),
        ("posttrain.compute.generator.stub:StubGenerator", 4, "takes no adapters: each sync sends all weights"),
    ],
)
def test_adapters_that_a_generator_does_not_take_are_merged_and_the_run_says_so(capsys, generator, rank, said):
    lora = LoRA(rank=rank)
    assert adapters_apart(small_config(**{"rollout.generator": generator}), lora) == (None if said else lora)
    printed = capsys.readouterr().out
    assert said in printed and bool(said) == bool(printed)
