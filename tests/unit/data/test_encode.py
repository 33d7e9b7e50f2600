"""Rows become units that train something, or are refused by a reason that can be counted."""

import shutil

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from posttrain.data.encode import CHOSEN_DROPS, MOST_UNKNOWN, Encoder
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.errors import DataError, RowError


@pytest.fixture(scope="module")
def latin(folder, tmp_path_factory):
    """A tokenizer that knows the letters a to z, and writes <unk> for every other character."""
    path = tmp_path_factory.mktemp("latin")
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    special = ["<|pad|>", "<unk>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(["abcdefghijklmnopqrstuvwxyz ?\n"], trainers.BpeTrainer(special_tokens=special))
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<|pad|>", eos_token="<|im_end|>")
    fast.chat_template = (folder / "chat_template.jinja").read_text()
    fast.save_pretrained(str(path))
    return BaseHFModelTokenizer(path)


def chat(question="sort 21", answer="12", **fields):
    asked = {"role": "user", "content": question}
    return {"messages": [asked, {"role": "assistant", "content": answer, **fields}]}


def encoder(tokenizer, **options):
    return Encoder(tokenizer, **{"wanted": "conversation", "pack_tokens": 64, **options})


def reasons(found):
    return [each.reason if isinstance(each, RowError) else len(each) for each in found]


@pytest.mark.parametrize("over_long", ["error", "drop", "truncate", "split"])
@pytest.mark.parametrize("weight", [0, 0.0, 1e-60])  # the last is zero in float32
@pytest.mark.fault("F34", outcome="CONTINUE")
def test_a_row_that_trains_no_token_is_counted_and_never_a_unit(tokenizer, weight, over_long):
    found = encoder(tokenizer, over_long=over_long)([chat(), chat(weight=weight), chat()])
    assert reasons(found) == [1, "no_trained_token", 1]
    assert "no_trained_token" not in CHOSEN_DROPS, "it is a fault of the row"


def test_text_that_the_tokenizer_reads_as_nothing_trains_nothing(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "strips")
    raw = Tokenizer.from_file(str(path / "tokenizer.json"))
    raw.normalizer = normalizers.Replace("~", "")
    raw.save(str(path / "tokenizer.json"))
    found = encoder(BaseHFModelTokenizer(path), wanted="text")([{"text": "~~"}, {"text": "~a"}])
    assert reasons(found) == ["no_trained_token", 1]


def test_every_unit_that_leaves_trains_something(tokenizer):
    rows = [chat("q" * n, "a" * (n % 7 + 1), weight=n % 3) for n in range(1, 90)]
    for policy in ("drop", "truncate", "split"):
        for units in encoder(tokenizer, over_long=policy)(rows):
            for unit in [] if isinstance(units, RowError) else units:
                assert all(sample.loss_mask.any() and len(sample) <= 64 for sample in unit)


def test_a_control_token_in_plain_text_costs_its_row_and_not_the_batch(tokenizer):
    found = encoder(tokenizer, wanted="text")([{"text": "a"}, {"text": "a<|im_end|>b"}, {"text": "c"}])
    assert reasons(found) == [1, "control_token", 1]


@pytest.mark.fault("F37", outcome="REFUSE")
def test_a_row_of_mostly_unknown_tokens_is_refused_with_its_share_and_a_word(latin):
    row = chat("what is this", "это слово")
    error = encoder(latin)([chat("what is this", "a word"), row])[1]
    assert isinstance(error, RowError) and error.reason == "unknown_tokens"
    ids = latin.hf.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
    share = np.mean([each == latin.hf.unk_token_id for each in ids])
    assert f"{share:.0%} of its tokens are <unk>, as 'это'" in error.detail


def test_a_rare_character_is_no_reason_to_refuse_a_row(latin):
    row = chat("what is this thing that you show", "a word é")
    ids = latin.hf.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
    assert 0 < ids.count(latin.hf.unk_token_id) / len(ids) <= MOST_UNKNOWN
    assert reasons(encoder(latin)([row])) == [1]


def test_one_unknown_answer_spoils_its_pair(latin):
    asked = [{"role": "user", "content": "which word"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("a word", "слово"))
    pair = {"prompt": asked, "chosen": chosen, "rejected": rejected}
    assert reasons(encoder(latin, wanted="preference")([pair])) == ["unknown_tokens"]
    assert "'слово'" in str(encoder(latin, wanted="preference")([pair])[0])


def test_text_of_unknown_tokens_is_refused(latin):
    found = encoder(latin, wanted="text")([{"text": "слово"}, {"text": "a word"}])
    assert reasons(found) == ["unknown_tokens", 1]


def test_a_stop_token_that_is_also_named_unknown_is_not_counted(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "twice")
    hf = BaseHFModelTokenizer(path).hf
    hf.unk_token = hf.eos_token  # as GPT-2 has it
    hf.save_pretrained(str(path))
    twice = BaseHFModelTokenizer(path)
    (units,) = encoder(twice)([chat("1", "2")])
    assert not isinstance(units, RowError)
    assert twice.unk_share(units[0][0].target_ids) > MOST_UNKNOWN


@pytest.fixture
def skewed(folder, tmp_path):
    """A template whose generation prompt is not how it opens an assistant's turn."""
    path = shutil.copytree(folder, tmp_path / "skewed")
    template = path / "chat_template.jinja"
    loop, prompt = template.read_text().split("{%- if add_generation_prompt -%}")
    template.write_text(loop + "{%- if add_generation_prompt -%}" + prompt.replace("assistant\\n", "assistant: "))
    return BaseHFModelTokenizer(path)


def test_the_first_rows_are_proved_to_be_served_as_they_are_trained(skewed, tokenizer):
    assert reasons(encoder(tokenizer, prove=2)([chat()] * 3)) == [1, 1, 1]
    assert reasons(encoder(skewed)([chat()])) == [1]
    with pytest.raises(DataError, match=r"training and serving disagree from token .*'user: sort 21'") as caught:
        encoder(skewed, prove=1)([chat()])
    assert not isinstance(caught.value, RowError)


def test_only_as_many_rows_are_proved_as_asked_and_bad_ones_do_not_count(skewed):
    picky = encoder(skewed, prove=1)
    assert reasons(picky([chat(weight=0)])) == ["no_trained_token"]
    with pytest.raises(DataError, match="disagree"):
        picky([chat()])
    assert reasons(picky([chat()])) == [1]


def test_an_answer_that_is_scored_is_read_up_to_its_stop_token_and_no_further(tokenizer):
    row = {
        "prompt": [{"role": "user", "content": "sort 21"}],
        "chosen": [{"role": "assistant", "content": "12"}],
        "rejected": [{"role": "assistant", "content": "21"}],
    }
    (trained,), (scored,) = (
        encoder(tokenizer, wanted="preference", scored=scored, pack_tokens=128)([row])[0] for scored in (False, True)
    )
    for side, (read, whole) in enumerate(zip(scored, trained, strict=True)):
        assert read.input_ids[-1] in tokenizer.stop_ids
        assert tokenizer.decode(read.input_ids[-3:]) == ("12", "21")[side]
        # the trained tokens are the same: a warm-up on the chosen answers sees no difference
        assert read.target_ids[read.loss_mask > 0].tolist() == whole.target_ids[whole.loss_mask > 0].tolist()
    assert [sample.fields for sample in scored] == [{"margin": 0.0}] * 2
    assert [sample.fields for sample in trained] == [{}] * 2


def test_a_margin_and_a_label_come_with_the_answer(tokenizer):
    sides = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "12"), ("rejected", "21"))}
    row = {"prompt": [{"role": "user", "content": "sort 21"}], **sides, "margin": 0.5}
    ((pair,),) = encoder(tokenizer, wanted="preference", scored=True, pack_tokens=128)([row])
    assert [sample.fields for sample in pair] == [{"margin": 0.5}] * 2
    labelled = encoder(tokenizer, wanted="unpaired", scored=True)([chat() | {"label": True}, chat() | {"label": False}])
    assert [unit[0].fields for (unit,) in labelled] == [{"label": 1.0}, {"label": 0.0}]
