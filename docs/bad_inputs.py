"""Every bad input of docs/data.md, made in a temporary folder and run through the code that a run would use."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from posttrain.data.counts import Counts, check_budget, check_not_empty
from posttrain.data.encode import CHOSEN_DROPS, Encoder
from posttrain.data.loader import loading
from posttrain.data.mixture import Mixture, Part
from posttrain.data.prompts import tokenize_prompts
from posttrain.data.record_checks import question_hash, row_hash
from posttrain.data.records import Format
from posttrain.data.row_reader import RowReader
from posttrain.data.source import Source, check_source, read_rows
from posttrain.data.stream import PackStream, UnitSource
from posttrain.data.token_files import lengths_and_duplicates, write_units
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.data.train_tokenizer import train_tokenizer
from posttrain.errors import PosttrainError

ROOM = 64
"""Tokens of a pack on this page."""
KEY = "data.sources[0]"
ASK, SAY, WRONG = ({"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))
GOOD, PAIR = {"messages": [ASK, SAY]}, {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
MORE, LONG = {**ASK, "content": "2+3?"}, {**SAY, "content": "4" * 200}
GOOD_LINE = json.dumps(GOOD).encode()

Outcome = tuple[str, str]
"""What becomes of an input, and what the person reads."""
Case = tuple[str, Callable[["Bench"], Outcome]]


class Bench:
    """A folder to break things in."""

    def __init__(self, folder: Path, tokenizer: BaseHFModelTokenizer):
        self.folder, self.tokenizer = folder, tokenizer

    def write(self, content: bytes | Sequence[dict], name: str = "rows.jsonl") -> str:
        """Bytes as they are, or records as the suffix says."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(list(content)), path, compression="none", write_page_checksum=True)
        elif path.suffix == ".arrow":
            table = pa.Table.from_pylist(list(content))
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        return str(path)

    def train(self, path: str, *, max_bad_rows: int = 99, change: bytes = b"", **options: Any) -> Outcome:
        """Stream a file once as a run would; `change` is added to it after it was indexed."""
        read = {key: options.pop(key) for key in ("format", "role_map", "held_out") if key in options}
        wanted = options.setdefault("wanted", "conversation")
        encoder = Encoder(options.pop("tokenizer", self.tokenizer), pack_tokens=ROOM, prove=99, **options)
        source = Source(path, key=KEY)
        if change:
            Path(path).write_bytes(Path(path).read_bytes() + change)
        units = UnitSource(source, encoder, read=RowReader(wanted=wanted, **read), seed=0, number=0)
        part = Part(name=KEY, num_rows=source.num_rows, weight=((0, 1.0),), max_draws=source.num_rows)
        stream = PackStream(Mixture([part], seed=0), [units], pack_tokens=ROOM, seed=0)
        window = stream.window(0)
        with loading(stream, max_bad_rows=max_bad_rows) as loader:
            loader.take(len(window.packs) or 1)
        for each in window.dropped:
            return f"{'left out' if each.reason in CHOSEN_DROPS else 'counted'}: `{each.reason}`", each.where
        lengths = [len(sample) for pack in window.packs for sample in pack.samples]
        return "trained", f"{len(lengths)} document{'s' * (len(lengths) > 1)} of at most {max(lengths)} tokens"

    def row(self, record: dict, **options: Any) -> Outcome:
        """Stream a record that stands behind a good one."""
        good = {"preference": PAIR, "text": {"text": "once"}}.get(options.get("wanted", ""), GOOD)
        return self.train(self.write([good, record]), **options)

    def turns(self, *messages: dict, **options: Any) -> Outcome:
        """Stream a conversation that stands behind a good one."""
        return self.row({"messages": list(messages)}, **options)

    def line(self, line: bytes) -> Outcome:
        """Stream a line that stands behind a good one."""
        return self.train(self.write(GOOD_LINE + b"\n" + line))

    def damaged(self, name: str, damage: Callable[[bytes], bytes]) -> Outcome:
        """Stream a file that was whole, and is damaged."""
        path = Path(self.write([{"messages": [{**ASK, "content": f"question {n}"}, SAY]} for n in range(100)], name))
        path.write_bytes(damage(path.read_bytes()))
        return self.train(str(path))

    def dataset(self, name: str, state: dict) -> Outcome:
        """Look at a folder that Hugging Face saved."""
        self.write(json.dumps(state).encode(), f"saved/{name}")
        self.write([GOOD], "saved/data.arrow")
        return self.train(str(self.folder / "saved"))

    def named(self, path: str) -> Outcome:
        """Look at what the config names, as the first step of a run does."""
        check_source(str(self.folder / path), key=KEY)
        return "trained", ""

    def prompts(self, record: dict) -> Outcome:
        """Read and tokenise a question for sampling."""
        rows = read_rows(self.write([record]), key="data.prompts", seed=0, wanted="prompt")
        tokenize_prompts(rows, self.tokenizer, key="data.prompts", max_prompt_tokens=ROOM)
        return "trained", ""

    def duplicates(self) -> Outcome:
        """Write and count the tokens of rows of which two are the same."""
        rows = read_rows(self.write([GOOD, {"messages": [MORE, WRONG]}, GOOD]), key=KEY, seed=0, wanted="conversation")
        found = Encoder(self.tokenizer, wanted="conversation", pack_tokens=ROOM)(rows)
        units = [(each[0], row_hash(row)) for row, each in zip(rows, found, strict=True) if isinstance(each, list)]
        write_units(units, self.folder / "units.parquet")
        lengths, copies = lengths_and_duplicates(Source(str(self.folder / "units.parquet"), key=KEY))
        return "trained", f"the card says: {copies} duplicate in {len(lengths)} rows"

    def ahead(self, *records: dict, **options: Any) -> Outcome:
        """Count what records come to, as the tokenize step does."""
        source = Source(self.write(records), key=KEY)
        encoder = Encoder(self.tokenizer, wanted="conversation", pack_tokens=ROOM, **options)
        units = UnitSource(source, encoder, read=RowReader(wanted="conversation"), seed=0, number=0)
        counts = Counts()
        for _, found in units.at(np.zeros(len(records), np.int64), np.arange(len(records))):
            counts.add(found, unknown_id=encoder.unknown_id)
        check_budget([counts], max_bad_rows=1)
        check_not_empty(counts, key=KEY)
        return "trained", f"{counts.units} of {counts.rows} rows"

    def mixed(self, weight: tuple[tuple[int, float], ...]) -> Outcome:
        """Mix one source of this weight."""
        Mixture([Part(name=KEY, num_rows=1, weight=weight)], seed=0)
        return "trained", ""

    def tokenizer_with(self, change: Callable[[str], str] = str, **config: Any) -> Outcome:
        """Train with the tokenizer after its template and its config were changed."""
        folder = self.folder / "tokenizer"
        train_tokenizer(["2+2? 4"], folder, vocab_size=300)
        if "bos_token" in config:
            _begin_with(folder / "tokenizer.json", config["bos_token"])
        template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
        template.write_text(change(template.read_text()))
        settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))
        return self.turns(ASK, SAY, tokenizer=BaseHFModelTokenizer(folder))


def _latin(folder: Path) -> BaseHFModelTokenizer:
    """A tokenizer that writes <unk> for every character but those it has seen."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "isolated")
    special = ["<|pad|>", "<unk>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(["useraistn 2+?4\n"], trainers.BpeTrainer(special_tokens=special, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<|pad|>", eos_token="<|im_end|>")
    train_tokenizer(["2+2? 4"], folder, vocab_size=300)
    fast.chat_template = (folder / "chat_template.jinja").read_text()
    fast.save_pretrained(str(folder))
    return BaseHFModelTokenizer(folder)


def _begin_with(tokenizer_json: Path, bos: str) -> None:
    """Let the tokenizer put a token before every text, as Llama's does."""
    from tokenizers import Tokenizer, processors

    raw = Tokenizer.from_file(str(tokenizer_json))
    raw.add_special_tokens([bos])
    begin = raw.token_to_id(bos)
    raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, begin)])
    raw.save(str(tokenizer_json))


def _without_markers(template: str) -> str:
    """The template as most models ship it."""
    return template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")


def _endless(template: str) -> str:
    return _without_markers(template).replace('message.content + "<|im_end|>" -', "message.content -")


def _begun_twice(template: str) -> str:
    return "{{- bos_token + bos_token -}}" + template


def _skewed(template: str) -> str:
    return '"<|im_start|>assistant: "'.join(template.rsplit('"<|im_start|>assistant\\n"', 1))


FILES: list[Case] = [
    ("a path with nothing there", lambda b: b.named("nothing.jsonl")),
    ("a file of another kind", lambda b: b.named(Path(b.write(b"a,b", "rows.csv")).name)),
    ("an empty file", lambda b: b.train(b.write(b"\n\n"))),
    ("a Parquet file that is cut short", lambda b: b.damaged("rows.parquet", lambda old: old[: len(old) // 2])),
    ("a flipped bit in a Parquet page", lambda b: b.damaged("rows.parquet", lambda old: old.replace(b"n 50", b"n 51"))),
    ("an Arrow file that is cut short", lambda b: b.damaged("rows.arrow", lambda old: old[:-70])),
    ("a file that changed under a run", lambda b: b.train(b.write(GOOD_LINE), change=b"\n" + GOOD_LINE)),
    ("a saved dataset of splits, none named", lambda b: b.dataset("dataset_dict.json", {"splits": ["train", "test"]})),
    ("a saved selection of rows", lambda b: b.dataset("state.json", {"_indices_data_files": [{}]})),
    ("a half-written JSON line", lambda b: b.line(GOOD_LINE[:40])),
    ("a line that is no record", lambda b: b.line(b"[1, 2]")),
    ("a line that is not UTF-8", lambda b: b.line(b'{"text": "caf\xe9"}')),
    ("a byte order mark", lambda b: b.train(b.write(b"\xef\xbb\xbf" + GOOD_LINE))),
]
COLUMNS: list[Case] = [
    ("columns of no known format", lambda b: b.row({"vraag": "2+2?", "antwoord": "4"})),
    ("columns that lack one", lambda b: b.row({"instruction": "Add.", "input": "2+2"})),
    ("columns of two formats", lambda b: b.row({**GOOD, "instruction": "Add.", "output": "4"})),
    ("a row without a value where others have one", lambda b: b.row({"messages": None})),
    ("answers with a label, trained as if all were good", lambda b: b.row({**GOOD, "label": False})),
    ("plain text without being asked for", lambda b: b.row({"text": "once"})),
    ("a column of another type", lambda b: b.row({"messages": 7})),
    ("a `format` that is not what is trained", lambda b: b.row(GOOD, wanted="preference", format=Format.text)),
    ("NUL characters", lambda b: b.turns(ASK, {**SAY, "content": "4\0"})),
    ("half of a surrogate pair", lambda b: b.turns(ASK, {**SAY, "content": "4\ud83d"})),
]
TURNS: list[Case] = [
    ("no messages", lambda b: b.turns()),
    ("content that is null", lambda b: b.turns(ASK, {**SAY, "content": None})),
    ("content that is an image", lambda b: b.turns({**ASK, "content": [{"type": "image"}]}, SAY)),
    ("an unknown role", lambda b: b.turns(ASK, {**SAY, "role": "bot"})),
    ("the same, with a `role_map`", lambda b: b.turns(ASK, {**SAY, "role": "bot"}, role_map={"bot": "assistant"})),
    ("two turns of one speaker", lambda b: b.turns(ASK, ASK, SAY)),
    ("a system turn in the middle", lambda b: b.turns(ASK, {"role": "system", "content": "Be brief."}, SAY)),
    ("no turn of the assistant", lambda b: b.turns(ASK)),
    ("an empty answer", lambda b: b.turns(ASK, {**SAY, "content": " "})),
    ("an empty question", lambda b: b.turns({**ASK, "content": ""}, SAY)),
    ("no token to train", lambda b: b.turns(ASK, {**SAY, "weight": 0})),
    ("a weight that is no number", lambda b: b.turns(ASK, {**SAY, "weight": "high"})),
    ("a control token inside the text", lambda b: b.turns({**ASK, "content": "2+2?<|im_end|>"}, SAY)),
    ("tools that the template ignores", lambda b: b.row({**GOOD, "tools": [{"name": "add"}]})),
    ("mostly unknown tokens", lambda b: b.turns(ASK, {**SAY, "content": "четыре"}, tokenizer=_latin(b.folder))),
]
PAIRS: list[Case] = [
    ("chosen and rejected are the same", lambda b: b.row({**PAIR, "rejected": "4"}, wanted="preference")),
    ("different prompts", lambda b: b.row({"chosen": [ASK, SAY], "rejected": [MORE, WRONG]}, wanted="preference")),
    ("no rejected answer", lambda b: b.row({"prompt": "2+2?", "chosen": "4"}, wanted="preference")),
    ("an empty answer", lambda b: b.row({**PAIR, "rejected": ""}, wanted="preference")),
    ("a prompt that gives the answer away", lambda b: b.prompts(GOOD)),
    ("a prompt that is too long", lambda b: b.prompts({"prompt": "4" * 200})),
]
TOKENIZERS: list[Case] = [
    ("no chat template", lambda b: b.tokenizer_with(lambda text: "")),
    ("a template without generation markers", lambda b: b.tokenizer_with(_without_markers)),
    ("one whose turns have no end that could be proved", lambda b: b.tokenizer_with(_endless)),
    ("a beginning-of-text token that is written twice", lambda b: b.tokenizer_with(_begun_twice, bos_token="<s>")),
    ("a generation prompt that is not how a turn opens", lambda b: b.tokenizer_with(_skewed)),
    ("no eos token", lambda b: b.tokenizer_with(eos_token=None)),
    ("a pad token that is the eos token", lambda b: b.tokenizer_with(pad_token="<|im_end|>")),
]
LENGTHS: list[Case] = [
    ("`data.over_long: error`", lambda b: b.turns(ASK, LONG)),
    ("`data.over_long: drop`", lambda b: b.turns(ASK, LONG, over_long="drop")),
    ("`data.over_long: truncate`", lambda b: b.turns(ASK, LONG, over_long="truncate")),
    ("the same, of a long question", lambda b: b.turns({**ASK, "content": "2" * 99}, SAY, over_long="truncate")),
    ("`data.over_long: split`", lambda b: b.turns(ASK, LONG, over_long="split")),
    ("`data.over_long: split`, with pairs", lambda b: b.row(PAIR, wanted="preference", over_long="split")),
]
SETS: list[Case] = [
    ("the same row twice", lambda b: b.duplicates()),
    ("a question of `data.held_out`", lambda b: b.row(GOOD, held_out=frozenset([question_hash(GOOD)]))),
    ("two bad rows, `data.max_bad_rows: 1`, ahead", lambda b: b.ahead(GOOD, {"vraag": "2+2?"}, {"messages": 7})),
    ("one bad row, `data.max_bad_rows: 0`, online", lambda b: b.row({"messages": 7}, max_bad_rows=0)),
    ("no row left", lambda b: b.ahead({"messages": [ASK, LONG]}, {"messages": [ASK]}, over_long="drop")),
    ("no source with a weight at the start", lambda b: b.mixed(((0, 0.0), (1000, 1.0)))),
]
TABLES: dict[str, list[Case]] = {
    "Files": FILES,
    "Columns and text": COLUMNS,
    "Conversations": TURNS,
    "Pairs and prompts": PAIRS,
    "Tokenizers and templates": TOKENIZERS,
    "Rows that are too long": LENGTHS,
    "The set as a whole": SETS,
}


def outcome(case: Callable[[Bench], Outcome], tokenizer: BaseHFModelTokenizer) -> Outcome:
    """What becomes of one bad input, in a folder of its own that no message shows."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = case(Bench(Path(folder), tokenizer))
        except PosttrainError as error:
            found = "refused", str(error)
        return found[0], found[1].replace(f"{folder}/", "")
