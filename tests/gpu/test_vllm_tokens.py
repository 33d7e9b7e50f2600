"""What the server reads is what was trained: vLLM tokenises a chat from the same folder to the same ids."""

import importlib

import pytest

from posttrain.data.template_fixtures import TOOL_TALK, TOOLS
from stock_templates import stock_tokenizer

pytest.importorskip("vllm")
pytestmark = pytest.mark.gpu

ASK = [{"role": "user", "content": "sort 312 🙂"}]
CHATS = {
    "question": (ASK, None),
    "system": ([{"role": "system", "content": "Answer with digits."}, *ASK], None),
    "turns": ([*ASK, {"role": "assistant", "content": "123"}, {"role": "user", "content": "e\u0301\r\nnext?"}], None),
    "tools": (list(TOOL_TALK[:3]), list(TOOLS)),
}


def vllm_tokenizer(folder):
    """The tokenizer that vLLM's server opens for a model folder; the function moved between releases."""
    for module in ("vllm.tokenizers", "vllm.transformers_utils.tokenizer"):
        try:
            get_tokenizer = importlib.import_module(module).get_tokenizer
        except (ImportError, AttributeError):
            continue
        return get_tokenizer(str(folder))
    pytest.fail("no get_tokenizer in this vLLM; name its new home here")


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3_1", "gemma3"])
@pytest.mark.parametrize("chat", CHATS)
def test_vllm_reads_the_ids_that_the_tokenizer_writes(tmp_path, name, chat):
    messages, tools = CHATS[chat]
    if (name == "gemma3" and chat == "tools") or (name == "chatml" and tools):
        pytest.skip("the template knows no tools")
    ours = stock_tokenizer(name, tmp_path / "stock")
    ours.save(tmp_path / "saved")
    served = vllm_tokenizer(tmp_path / "saved").apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert list(served) == ours.prompt(messages, tools)
