"""Markers put into stock templates change no text and enclose what the assistant wrote, or are refused."""

import re

import numpy as np
import pytest

from posttrain.data.chat_template import ChatTemplate, strftime_now
from posttrain.data.markers import proved, with_markers
from posttrain.data.template_fixtures import FIXTURES, TOOL_TALK, TOOLS
from posttrain.data.tokenizer import BaseHFModelTokenizer, Encoded
from posttrain.errors import DataError, RowError
from stock_templates import CHATML, FOLDER, STOCK, save_tokenizer, stock_tokenizer

FAMILIES = {
    "chatml": "<|im_end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "gptoss": "<|return|>",
}
"""Family -> the token that ends its assistant's turn."""
CHAT = [
    {"role": "user", "content": "sort 312"},
    {"role": "assistant", "content": "123"},
    {"role": "user", "content": "and 21?"},
    {"role": "assistant", "content": "12, of course 🙂"},
]
NOT_PROVABLE = {"glm4moe", "idefics3", "llava_next", "smolvlm"}
"""No stop token ends a turn, or a content must be a list."""


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = stock_tokenizer(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def by_transformers(tokenizer, messages, tools, template, **options):
    """Ids, and mask where asked for: the oracle."""
    found = tokenizer.hf.apply_chat_template(
        list(messages), tools=tools, chat_template=template, strftime_now=strftime_now, return_dict=True, **options
    )
    return found["input_ids"], found.get("assistant_masks")


def runs(tokenizer, ids, mask):
    """Text of every unbroken run of trained tokens."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.asarray(mask) > 0, 0].astype(int)))
    return [tokenizer.hf.decode(ids[start:end]) for start, end in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_marked_template_writes_the_ids_of_the_stock_one(opened, name):
    tokenizer = opened(name)
    assert tokenizer.template.has_markers and not tokenizer.stock.has_markers
    compared = 0
    for messages, tools in FIXTURES:
        for prompt in (False, True):
            found = []
            for template in (tokenizer.stock.text, tokenizer.template.text):
                try:
                    found.append(by_transformers(tokenizer, messages, tools, template, add_generation_prompt=prompt)[0])
                except Exception as error:  # a template may refuse as it likes, but both must
                    found.append(type(error))
            assert found[0] == found[1]
            compared += isinstance(found[0], list)
    assert compared >= 10


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gptoss"])
def test_the_text_and_stop_token_of_every_turn_are_trained_and_nothing_else(opened, name):
    tokenizer, stop = opened(name), FAMILIES[name]
    assert tokenizer.hf.convert_tokens_to_ids(stop) == tokenizer.stop_id
    answers = ["123", "12, of course 🙂"]
    if name == "qwen3":  # its template writes an empty thought before the last answer
        answers[1] = f"<think>\n\n</think>\n\n{answers[1]}"
    ids, mask = tokenizer.conversation(CHAT)
    assert runs(tokenizer, ids, mask) == [f"{answer}{stop}" for answer in answers]


def test_gpt_oss_trains_channels_and_only_the_stop_tokens_that_end_generation(opened):
    tokenizer = opened("gptoss")
    thinking = [*CHAT[:3], {**CHAT[3], "thinking": "Easy."}]
    ids, mask = tokenizer.conversation(thinking)
    assert runs(tokenizer, ids, mask) == [
        "<|channel|>final<|message|>123",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant"
        "<|channel|>final<|message|>12, of course 🙂<|return|>",
    ]
    encoded = tokenizer.conversations([{"messages": TOOL_TALK, "tools": TOOLS}])[0]
    call = ' to=functions.look_up<|channel|>commentary json<|message|>{"word": "snow"}<|call|>'
    assert runs(tokenizer, encoded.token_ids, encoded.loss_mask)[0] == call
    assert {tokenizer.hf.convert_tokens_to_ids(t) for t in ("<|return|>", "<|call|>")} <= set(tokenizer.stop_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_beginning_of_text_is_written_once_or_never(opened, name):
    tokenizer = opened(name)
    ids, _ = tokenizer.conversation(CHAT)
    begins = [at for at, token in enumerate(ids) if token == tokenizer.hf.bos_token_id]
    assert begins == ([0] if name.startswith(("llama", "gemma")) else [])


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "gemma", "gemma3", "gptoss"])
def test_masks_are_those_of_trls_training_templates_but_for_what_follows_or_opens_a_turn(opened, name):
    """TRL also trains the newline after a stop token, and for GPT-OSS a turn's opening and the <|end|> of earlier
    turns, at which no server stops. TRL's Qwen3 writes a thought in every turn: those conversations are left out."""
    tokenizer = opened(name)
    training = (FOLDER / f"{name}_training.jinja").read_text()
    compared = 0
    for messages, tools in (*FIXTURES, (CHAT, None)):
        ours = tokenizer.conversations([{"messages": messages, "tools": tools}])[0]
        if not isinstance(ours, Encoded):
            continue
        ids, mask = by_transformers(tokenizer, messages, tools, training, return_assistant_tokens_mask=True)
        if ids != ours.token_ids.tolist():
            assert name == "qwen3"
            continue
        more = np.asarray(mask) - ours.loss_mask
        assert set(more.tolist()) <= {0.0, 1.0}
        for text in runs(tokenizer, ours.token_ids, more):
            assert re.fullmatch(r"(<\|start\|>assistant|<\|end\|>)+" if name == "gptoss" else "\n", text)
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.fault("F33", outcome="REFUSE")
def test_any_stock_template_is_trained_rightly_or_refused(opened, name):
    tokenizer = opened(name)
    rows = [{"messages": messages, "tools": tools} for messages, tools in (*FIXTURES, (CHAT, None))]
    if tokenizer.why_no_mask:
        assert name in NOT_PROVABLE
        with pytest.raises(DataError, match="generation %} markers"):
            tokenizer.conversations(rows)
        return
    found = tokenizer.conversations(rows)
    assert isinstance(found[0], Encoded) and isinstance(found[-1], Encoded)
    for row, encoded in zip(rows, found, strict=True):
        if isinstance(encoded, RowError):
            assert encoded.reason in ("mask_not_provable", "template_refused")
            continue
        stock_ids, _ = by_transformers(tokenizer, row["messages"], row["tools"], tokenizer.stock.text)
        assert encoded.token_ids.tolist() == stock_ids
        assert encoded.loss_mask.any() and not encoded.loss_mask.all()
        trained = runs(tokenizer, encoded.token_ids, encoded.loss_mask)
        answers = [message for message in row["messages"] if message["role"] == "assistant"]
        assert len(trained) == len(answers)
        for text, answer in zip(trained, answers, strict=True):
            kept = "look_up" if answer.get("tool_calls") else answer["content"].rpartition("</think>")[2].strip()
            assert kept in text
            foreign = [
                message["content"] for message in row["messages"] if message["role"] in ("user", "tool", "system")
            ]
            assert not any(content in text for content in foreign if content)


def test_most_stock_templates_can_be_marked(opened):
    marked = [name for name in STOCK if opened(name).template.has_markers]
    assert len(marked) >= 30 and set(FAMILIES) - {"chatml"} <= set(marked)


def test_a_template_with_markers_is_kept_as_it_is(tmp_path):
    training = (FOLDER / "qwen2_5_training.jinja").read_text()
    tokenizer = BaseHFModelTokenizer(save_tokenizer(tmp_path, training))
    assert tokenizer.template.text == training


def test_a_template_without_a_loop_over_messages_gets_no_markers(opened):
    turn = opened("chatml").turn
    assert with_markers("{{ messages[0].content }}", turn) is None
    assert with_markers(CHATML, turn) is not None


def test_a_loop_that_the_markers_misread_is_trained_by_proved_differences(tmp_path):
    """The loop's variable is a number: the marked template would mark nothing."""
    template = CHATML.replace(
        "for message in messages %}", "for i in range(messages|length) %}{% set message = messages[i] %}"
    )
    tokenizer = BaseHFModelTokenizer(save_tokenizer(tmp_path, template))
    assert not tokenizer.template.has_markers and not tokenizer.why_no_mask
    ids, mask = tokenizer.conversation(CHAT)
    assert runs(tokenizer, ids, mask) == ["123<|im_end|>", "12, of course 🙂<|im_end|>"]


HOSTILE = {
    "counts the messages": "{{ messages|length }}"
    + CHATML.replace("for message in messages %}", "for i in range(messages|length) %}{% set message = messages[i] %}"),
    "ends no turn": CHATML.replace("+ '<|im_end|>'", ""),
    "writes a turn twice": CHATML.replace(
        "{{'<|im_start|>'", "{{ message['content'] + '<|im_end|>' }}{{'<|im_start|>'"
    ),
    "ends a turn twice": CHATML.replace("+ '<|im_end|>'", "+ '<|im_end|><|im_end|>'"),
    "marks only the text": CHATML.replace(
        "message['content'] + '<|im_end|>' + '\\n'}}",
        "''}}{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\\n' }}",
    ),
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.fault("F20", outcome="REFUSE")
def test_a_hostile_template_is_refused_or_trains_each_answer_once(tmp_path, template):
    tokenizer = BaseHFModelTokenizer(save_tokenizer(tmp_path, template))
    try:
        encoded = tokenizer.conversations([{"messages": CHAT}])[0]
    except DataError:
        return
    if isinstance(encoded, Encoded):
        trained = runs(tokenizer, encoded.token_ids, encoded.loss_mask)
        assert trained == ["123<|im_end|>", "12, of course 🙂<|im_end|>"]


@pytest.mark.parametrize("name", ["counts the messages", "ends no turn", "marks only the text", "ends a turn twice"])
@pytest.mark.fault("F33", outcome="REFUSE")
def test_a_template_whose_stop_token_would_not_be_trained_once_is_refused(tmp_path, name):
    tokenizer = BaseHFModelTokenizer(save_tokenizer(tmp_path, HOSTILE[name]))
    with pytest.raises(DataError, match="generation"):
        tokenizer.conversations([{"messages": CHAT}])
    assert tokenizer.prompts([{"messages": CHAT[:1]}])[0].size


@pytest.mark.parametrize(
    ("part", "damaged"),
    [
        ("{{ turn_parts[0] + turn_opening }}", "!{{ turn_parts[0] + turn_opening }}"),
        ("{% if message['role'] == 'assistant'", "{% if message['role'] != 'tool'"),
        ("turn_body[:turn_cut]", "turn_body[:1]"),
        ("{% generation %}", "{% generation %}{% endgeneration %}{% generation %}"),
        ("{{ turn_parts[0] + turn_opening }}{% generation %}", "{% generation %}{{ turn_parts[0] + turn_opening }}"),
    ],
    ids=["another text", "marks the user", "cuts the answer", "marks twice", "marks the opening"],
)
def test_the_proof_finds_a_damaged_template(opened, part, damaged):
    tokenizer = opened("qwen2_5")
    stock, marked = tokenizer.stock, tokenizer.template.text
    assert part in marked
    changed = marked.replace(part, damaged)
    if damaged.startswith("{% if"):
        changed = changed.replace(
            '"<|im_start|>assistant\\n" if "<|im_start|>assistant\\n" in',
            '"<|im_start|>user\\n" if "<|im_start|>user\\n" in',
        )
    assert proved(stock, ChatTemplate(marked, stock.variables), tokenizer.turn)
    assert not proved(stock, ChatTemplate(changed, stock.variables), tokenizer.turn)
