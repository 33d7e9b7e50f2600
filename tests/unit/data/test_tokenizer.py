"""Ids and masks come from the tokenizer that also serves the model; one that would train nothing is refused."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from posttrain.data.tokenizer import BaseHFModelTokenizer, train_tokenizer
from posttrain.errors import DataError
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
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return BaseHFModelTokenizer(folder)


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


def test_a_template_without_generation_markers_may_ask_but_not_train(copied, tokenizer):
    path = copied / "chat_template.jinja"
    path.write_text(path.read_text().replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""))
    unmarked = BaseHFModelTokenizer(copied)
    assert unmarked.prompt(CHAT[:2]) == tokenizer.prompt(CHAT[:2])
    with pytest.raises(DataError, match=rf"{copied}: .* no \{{% generation %\}} markers"):
        unmarked.conversation(CHAT)


def test_a_folder_without_a_template_is_refused(copied):
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        BaseHFModelTokenizer(copied)


def test_markers_may_be_written_without_dashes(copied, tokenizer):
    path = copied / "chat_template.jinja"
    path.write_text(path.read_text().replace("{%- generation -%}", "{% generation %}"))
    assert BaseHFModelTokenizer(copied).conversation(CHAT)[1] == tokenizer.conversation(CHAT)[1]


@pytest.mark.parametrize("changes", [{"pad_token": "<|im_end|>"}, {"pad_token": None}, {"eos_token": None}])
def test_a_pad_token_that_is_the_stop_token_or_missing_is_refused(copied, changes):
    edit_config(copied, **changes)
    with pytest.raises(DataError, match="needs an eos token, and a pad token that is not the eos token"):
        BaseHFModelTokenizer(copied)


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
    tokenizer.prompt(CHAT)
    assert tokenizer.fingerprint() == before


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
        with pytest.raises(DataError, match=r"messages\[0\] holds the control token"):
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
