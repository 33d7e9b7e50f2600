"""Ids and masks come from the tokenizer that also serves the model; one that would train nothing is refused."""

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from posttrain.data.special_tokens import semantic_id_tokens
from posttrain.data.template_fixtures import TOOL_TALK, TOOLS
from posttrain.data.tokenizer import BaseHFModelTokenizer, Encoded
from posttrain.data.train_tokenizer import train_tokenizer
from posttrain.errors import DataError, RowError
from stock_templates import CHATML, save_tokenizer, stock_tokenizer
from tiny import tiny_tokenizer

CHAT = [
    {"role": "system", "content": "Answer with digits."},
    {"role": "user", "content": "sort 312"},
    {"role": "assistant", "content": "123"},
    {"role": "user", "content": "and 21?"},
    {"role": "assistant", "content": "12, of course"},
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(lambda text: "<|" not in text)
WORDS = TEXT | st.sampled_from(["The answer is", "\nThe answer is", "\n\n", "assistant\nThe answer is"])
CONVERSATION = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3).map(
    lambda turns: [m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
)


@pytest.fixture(scope="module")
def wordy(tmp_path_factory):
    """A tokenizer whose data taught it to merge across every boundary that it may."""
    path = tmp_path_factory.mktemp("wordy")
    train_tokenizer(["assistant\nThe answer is\n", "user\nThe question is\n", "\n\n\n"] * 9, path, vocab_size=400)
    return BaseHFModelTokenizer(path)


@pytest.fixture
def copied(folder, tmp_path):
    """A copy to damage."""
    return shutil.copytree(folder, tmp_path / "copied")


def edit_config(folder, **changes):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def trained_runs(tokenizer, ids, mask):
    """Text of every unbroken run of trained tokens, special tokens shown."""
    runs, before = [], 0
    for token, trained in zip(ids, mask, strict=True):
        if trained and not before:
            runs.append([])
        if trained:
            runs[-1].append(token)
        before = trained
    return [tokenizer.hf.decode(run) for run in runs]


def test_auto_tokenizer_opens_the_folder_and_agrees(folder, tokenizer):
    auto = AutoTokenizer.from_pretrained(folder)
    ids, _ = tokenizer.conversation(CHAT)
    assert auto.apply_chat_template(CHAT, return_dict=True)["input_ids"] == ids
    assert (len(auto), auto.eos_token_id, auto.pad_token_id) == (
        tokenizer.vocab_size,
        tokenizer.stop_id,
        tokenizer.pad_id,
    )


def test_a_conversation_reads_as_the_template_says(tokenizer):
    ids, _ = tokenizer.conversation(CHAT[1:3])
    expected = "<|im_start|>user\nsort 312<|im_end|>\n<|im_start|>assistant\n123<|im_end|>\n"
    assert tokenizer.hf.decode(ids) == expected


def test_the_mask_covers_assistant_text_and_its_stop_token_in_every_turn(tokenizer):
    ids, mask = tokenizer.conversation(CHAT)
    assert len(ids) == len(mask) and set(mask) == {0, 1}
    assert trained_runs(tokenizer, ids, mask) == ["123<|im_end|>", "12, of course<|im_end|>"]


@given(CONVERSATION)
@pytest.mark.fault("F38", outcome="CONTINUE")
def test_every_turns_text_and_stop_token_are_trained_exactly_once(tokenizer, wordy, messages):
    for each in (tokenizer, wordy):
        ids, mask = each.conversation(messages)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert trained_runs(each, ids, mask) == [f"{answer}<|im_end|>" for answer in answers]
        stops = [trained for token, trained in zip(ids, mask, strict=True) if token == each.stop_id]
        assert stops == [0, 1] * len(answers)


@given(CONVERSATION)
def test_the_prompt_is_the_beginning_of_the_conversation(tokenizer, wordy, messages):
    for each in (tokenizer, wordy):
        ids, mask = each.conversation(messages)
        prompt = each.prompt(messages[:-1])
        assert ids[: len(prompt)] == prompt
        assert mask[len(prompt)] == 1


@pytest.mark.parametrize("answer", ["The answer is 3", "Other words", " spaced", "\nbroken", "assistant\n", "3"])
def test_what_a_model_is_trained_to_write_is_what_its_prompt_asks_for(wordy, answer):
    messages = [{"role": "user", "content": "The question is"}, {"role": "assistant", "content": answer}]
    ids, mask = wordy.conversation(messages)
    assert trained_runs(wordy, ids, mask) == [f"{answer}<|im_end|>"]
    assert ids[: mask.index(1)] == wordy.prompt(messages[:1])


@given(TEXT)
def test_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.hf(text)["input_ids"]) == text


def test_decoding_leaves_special_tokens_out(tokenizer):
    ids = tokenizer.hf("12")["input_ids"]
    assert tokenizer.decode([*ids, tokenizer.stop_id, tokenizer.pad_id]) == "12"


@given(st.text("0123456789", min_size=1))
def test_every_digit_is_one_token(tokenizer, digits):
    assert len(tokenizer.hf(f"{digits}")["input_ids"]) == len(digits)


def test_digits_stay_apart_however_often_they_come_together(tmp_path):
    train_tokenizer(["sort 1234567\n"] * 50, tmp_path, vocab_size=400)
    assert len(BaseHFModelTokenizer(tmp_path).hf("1234567")["input_ids"]) == 7


def test_a_vocabulary_is_no_larger_than_asked_and_holds_the_special_tokens(tmp_path):
    assert train_tokenizer(["the same words"] * 3 + [f"{n} words" for n in range(99)], tmp_path, vocab_size=300) <= 300
    tokenizer = BaseHFModelTokenizer(tmp_path)
    assert len({tokenizer.pad_id, tokenizer.stop_id, tokenizer.hf.convert_tokens_to_ids("<|im_start|>")}) == 3


def test_a_conversation_without_an_assistant_is_refused_with_its_roles(tokenizer):
    with pytest.raises(DataError, match=r"no trained token in a conversation with roles \['system', 'user'\]"):
        tokenizer.conversation(CHAT[:2])


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": [{"type": "text", "text": "12"}]}],
        [{"content": "12"}],
        ["12"],
        [],
    ],
    ids=["no-content", "content-is-null", "content-is-a-list", "no-role", "not-a-mapping", "empty"],
)
def test_messages_that_the_template_cannot_render_are_refused(tokenizer, messages):
    for read in (tokenizer.conversation, tokenizer.prompt):
        with pytest.raises(DataError):
            read(messages)


def test_a_template_without_generation_markers_is_given_them(copied, tokenizer):
    path = copied / "chat_template.jinja"
    path.write_text(path.read_text().replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""))
    unmarked = BaseHFModelTokenizer(copied)
    assert not unmarked.stock.has_markers
    assert unmarked.prompt(CHAT[:2]) == tokenizer.prompt(CHAT[:2])
    assert unmarked.conversation(CHAT) == tokenizer.conversation(CHAT)


def test_a_folder_without_a_template_is_refused(copied):
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        BaseHFModelTokenizer(copied)


def test_markers_may_be_written_without_dashes(copied, tokenizer):
    path = copied / "chat_template.jinja"
    path.write_text(path.read_text().replace("{%- generation -%}", "{% generation %}"))
    assert BaseHFModelTokenizer(copied).conversation(CHAT)[1] == tokenizer.conversation(CHAT)[1]


@pytest.mark.parametrize("changes", [{"pad_token": "<|im_end|>"}, {"pad_token": None}])
@pytest.mark.fault("F38", outcome="CONTINUE")
def test_a_pad_token_that_is_the_stop_token_or_missing_is_chosen_from_the_vocabulary_and_saved(copied, changes):
    edit_config(copied, **changes)
    tokenizer = BaseHFModelTokenizer(copied)
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.pad_id) == "<|pad|>"
    tokenizer.save(copied / "saved")
    saved = BaseHFModelTokenizer(copied / "saved")
    assert AutoTokenizer.from_pretrained(copied / "saved").pad_token == "<|pad|>"
    assert saved.fingerprint() == tokenizer.fingerprint()


def test_a_vocabulary_without_a_token_to_pad_with_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    save_tokenizer(tmp_path, CHATML)
    path.write_text(path.read_text().replace("<|reserved_0|>", "<|something|>"))
    edit_config(tmp_path, pad_token="<|im_end|>")
    with pytest.raises(DataError, match="no reserved token to take its place; add a token such as"):
        BaseHFModelTokenizer(tmp_path)


@pytest.mark.fault("F38", outcome="REFUSE")
def test_a_tokenizer_without_an_eos_token_is_refused(copied):
    edit_config(copied, eos_token=None)
    with pytest.raises(DataError, match="needs an eos token"):
        BaseHFModelTokenizer(copied)


def test_every_eos_of_the_generation_config_stops_and_none_of_them_pads(copied, tokenizer):
    start = tokenizer.hf.convert_tokens_to_ids("<|im_start|>")
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.stop_id, start]}))
    assert BaseHFModelTokenizer(copied).stop_ids == (tokenizer.stop_id, start)
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.pad_id}))
    with pytest.raises(DataError, match="no pad token, or one that also ends a turn"):
        BaseHFModelTokenizer(copied)


def test_the_token_that_ends_a_turn_is_a_stop_token_where_eos_is_another(tmp_path):
    gemma = stock_tokenizer("gemma3", tmp_path)
    names = [gemma.hf.convert_ids_to_tokens(token) for token in gemma.stop_ids]
    assert names == ["<end_of_turn>", "<eos>"] and gemma.stop_id == gemma.stop_ids[0]


@pytest.mark.fault("F38", outcome="REFUSE")
def test_a_second_beginning_of_text_is_refused(tmp_path):
    """Many templates write the token themselves, and one pasted before them makes two."""
    folder = save_tokenizer(tmp_path, "{{ bos_token }}{{ bos_token }}" + CHATML, bos="<s>")
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    begin = next(token["id"] for token in state["added_tokens"] if token["content"] == "<s>")
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [begin], "tokens": ["<s>"]}}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special,
    }
    path.write_text(json.dumps(state))
    with pytest.raises(DataError, match="writes <s> 2 times, not once"):
        BaseHFModelTokenizer(folder).conversation(CHAT)


def test_plain_text_stands_between_the_beginning_and_the_eos_token(tmp_path, tokenizer):
    llama = stock_tokenizer("llama3", tmp_path)
    assert llama.hf.decode(llama.text("a 🙂 b")) == "<|begin_of_text|>a 🙂 b<|eot_id|>"
    assert tokenizer.hf.decode(tokenizer.text("12")) == "12<|im_end|>"
    with pytest.raises(RowError, match="control token"):
        llama.text("a<|eot_id|>")


def test_a_pair_shares_its_prompt_and_trains_the_answers_alone(tokenizer):
    row = {
        "prompt": CHAT[:4],
        "chosen": [{"role": "assistant", "content": "12"}],
        "rejected": [{"role": "assistant", "content": "21", "weight": 0}],
    }
    chosen, rejected = tokenizer.pair(row)
    served = tokenizer.prompt(CHAT[:4])
    for side, answer in ((chosen, "12"), (rejected, "21")):
        assert side.token_ids[: len(served)].tolist() == served
        assert trained_runs(tokenizer, side.token_ids, side.loss_mask) == [f"{answer}<|im_end|>"]
    assert tokenizer.pair({**row, "chosen": [{"role": "user", "content": "?"}]}).reason == "no_trained_token"
    assert tokenizer.pair({**row, "prompt": CHAT[:3]}).reason == "prompt_ends_with_answer"
    assert tokenizer.pair({**row, "prompt": None}).reason == "template_refused"


def test_a_bad_row_costs_itself_and_not_its_batch(tokenizer):
    good = {"messages": CHAT}
    bad = [
        {"messages": CHAT[:2]},
        {"messages": [{"role": "user", "content": "<|im_end|>"}, CHAT[2]]},
        {"messages": [CHAT[1], {"role": "assistant", "content": None}]},
        {"messages": CHAT, "tools": [{"type": "function", "function": {"name": "look_up"}}]},
        {},
    ]
    found = tokenizer.conversations([good, *bad, good])
    reasons = [each.reason for each in found[1:-1]]
    assert reasons == ["no_trained_token", "control_token", *["template_refused"] * 3]
    ids, mask = tokenizer.conversation(CHAT)
    for each in (found[0], found[-1]):
        assert (each.token_ids.tolist(), each.loss_mask.tolist()) == (ids, mask)
        assert (each.token_ids.dtype, each.loss_mask.dtype) == (np.int32, np.float32)
    asked = tokenizer.prompts([{"messages": CHAT}, {"messages": CHAT[:2]}])
    assert asked[0].reason == "prompt_ends_with_answer" and asked[1].dtype == np.int32


@pytest.mark.parametrize("place", ["arguments", "result", "tools"])
def test_a_control_token_inside_a_tool_call_is_refused(tmp_path, place):
    qwen = stock_tokenizer("qwen3", tmp_path)
    talk, tools = copy.deepcopy(list(TOOL_TALK)), copy.deepcopy(list(TOOLS))
    assert isinstance(qwen.conversations([{"messages": talk, "tools": tools}])[0], Encoded)
    if place == "arguments":
        talk[1]["tool_calls"][0]["function"]["arguments"] = {"word": "<|im_end|>"}
    elif place == "result":
        talk[2]["content"] = "white<|im_end|>"
    else:
        tools[0]["function"]["description"] = "<|im_start|>assistant"
    assert qwen.conversations([{"messages": talk, "tools": tools}])[0].reason == "control_token"


def test_added_tokens_are_one_id_each_and_survive_saving(copied):
    tokenizer = BaseHFModelTokenizer(copied)
    before, size = tokenizer.fingerprint(), tokenizer.vocab_size
    names = semantic_id_tokens(2, 3)
    assert names == ["<sid_0_0>", "<sid_0_1>", "<sid_0_2>", "<sid_1_0>", "<sid_1_1>", "<sid_1_2>"]
    assert tokenizer.add_tokens(names) == 6 and tokenizer.add_tokens(names) == 0
    assert (tokenizer.vocab_size, tokenizer.max_id) == (size + 6, size + 5)
    tokenizer.save(copied / "saved")
    saved = BaseHFModelTokenizer(copied / "saved")
    assert saved.fingerprint() == tokenizer.fingerprint() != before
    answer = "".join(names)
    ids, mask = saved.conversation([CHAT[1], {"role": "assistant", "content": answer}])
    assert sum(mask) == 7 and saved.decode(ids).endswith(f"{answer}\n")


def test_unknown_tokens_are_counted(tokenizer):
    assert tokenizer.unk_share([1, 2]) == 0
    tokenizer.hf.unk_token = "<|im_start|>"
    try:
        assert tokenizer.unk_share([tokenizer.hf.unk_token_id, 5, 6, 7]) == 0.25
    finally:
        tokenizer.hf.unk_token = None


def test_a_template_that_drops_earlier_reasoning_is_served_as_it_is_trained(tmp_path):
    qwen = stock_tokenizer("qwen3", tmp_path)
    thought = {"role": "assistant", "content": "12", "reasoning_content": "Two digits."}
    qwen.check_no_skew([CHAT[1], thought, CHAT[3], thought])
    qwen.check_no_skew(TOOL_TALK, TOOLS)


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path} holds no tokenizer"):
        BaseHFModelTokenizer(tmp_path)


def test_a_fingerprint_is_that_of_the_files(folder, copied, tokenizer):
    assert BaseHFModelTokenizer(copied).fingerprint() == BaseHFModelTokenizer(folder).fingerprint()
    assert len(tokenizer.fingerprint()) == 64


def test_reading_text_does_not_change_the_fingerprint(tokenizer):
    before = tokenizer.fingerprint()
    tokenizer.conversation(CHAT)
    tokenizer.hf(["padded", "to one length"], padding=True, truncation=True, max_length=3)
    tokenizer.prompt(CHAT[:2])
    assert tokenizer.fingerprint() == before


def test_a_tokenizer_travels_to_another_process(tokenizer):
    copy_of = pickle.loads(pickle.dumps(tokenizer))
    assert copy_of.conversation(CHAT) == tokenizer.conversation(CHAT)
    assert copy_of.fingerprint() == tokenizer.fingerprint()


def test_an_export_that_writes_its_own_generation_config_keeps_the_fingerprint(copied, tokenizer):
    (copied / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [tokenizer.stop_id, tokenizer.pad_id + 5]})
    )
    assert BaseHFModelTokenizer(copied).fingerprint() == tokenizer.fingerprint()


def test_a_fingerprint_changes_with_the_template(copied, tokenizer):
    path = copied / "chat_template.jinja"
    path.write_text(path.read_text() + " ")
    assert BaseHFModelTokenizer(copied).fingerprint() != tokenizer.fingerprint()


def test_a_fingerprint_changes_with_the_vocabulary(tokenizer, wordy):
    assert wordy.fingerprint() != tokenizer.fingerprint()


def test_training_a_tokenizer_twice_gives_the_same_one(tmp_path):
    assert tiny_tokenizer(tmp_path / "one").fingerprint() == tiny_tokenizer(tmp_path / "two").fingerprint()


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|pad|>"])
def test_a_control_token_as_text_is_refused(tokenizer, role, token):
    chat = [{"role": "user", "content": "sort 12"}, {"role": "assistant", "content": "12"}]
    chat.insert(0, {"role": role, "content": f"before{token}after"})
    for render in (tokenizer.conversation, tokenizer.prompt):
        with pytest.raises(DataError, match=r"messages\[0\].content holds the control token"):
            render(chat)


def test_prompt_and_conversation_agree(tokenizer, wordy):
    for each in (tokenizer, wordy):
        each.check_no_skew(CHAT)


def test_a_generation_prompt_that_is_not_how_turns_open_is_refused(copied):
    path = copied / "chat_template.jinja"
    template = path.read_text()
    path.write_text(template[: template.index("{%- if add_generation_prompt")] + "<|im_start|>model\n")
    skewed = BaseHFModelTokenizer(copied)
    with pytest.raises(DataError, match="training and serving disagree from token"):
        skewed.check_no_skew(CHAT)
