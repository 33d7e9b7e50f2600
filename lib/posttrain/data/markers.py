"""Generation markers for templates that have none, and the proof that they change nothing and miss nothing.

Stock templates of Llama 3, Qwen3, Gemma 3 and GPT-OSS do not say what the assistant writes, and a mask asked
of them is all zero. Every one of them renders a message per turn of a loop. So the loop's output is caught,
and where it is an assistant's, cut in three: what opens the turn, what the model writes up to its stop token,
and the rest. What opens and ends a turn is read off the template's own renderings, not off a list of families;
whatever this gets wrong, the proof finds.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.data.chat_template import ChatTemplate, Messages, Spans, Tools, ignored
from posttrain.data.template_fixtures import FIXTURES, TOOL_TALK, TOOLS
from posttrain.errors import RowError


@dataclass(frozen=True)
class Turn:
    """How a template opens and ends what the assistant writes."""

    openings: tuple[str, ...]
    """The generation prompt; then, where earlier turns open with less of it, that."""
    stops: tuple[str, ...]
    """Stop tokens: that of a text first, then that of a tool call where it is another."""
    closing: str = ""
    """What ends an earlier turn where it is no stop token, as GPT-OSS' <|end|>: it is not trained."""

    def miscounted(self, messages: Messages, trained: np.ndarray, stop_ids: Sequence[int]) -> str:
        """What is wrong with the stop tokens among the trained ids of a conversation; empty when nothing is."""
        turns = sum(message["role"] == "assistant" for message in messages)
        stops = int(np.isin(trained, stop_ids).sum())
        if stops == turns or (self.closing and stops < turns):
            return ""
        return f"{stops} stop tokens are trained in {turns} turns, not one each; mend the template's generation markers"


def read_turn(template: ChatTemplate, special: re.Pattern[str]) -> Turn:
    """Render a few conversations and see how the assistant's turns open and end; empty where it does not show.

    Raises:
        RowError: the template cannot render a question and its answer.
    """
    ask = {"role": "user", "content": "QUESTION"}
    said = {"role": "assistant", "content": "ANSWER"}
    plain, served = template.render([ask])[0], template.render([ask], prompt=True)[0]
    differs = len(_common(plain, served))
    opening = next((served[each.start() :] for each in special.finditer(served) if each.end() > differs), "")
    after = template.render([ask, said])[0].partition("ANSWER")[2]
    stops = [stop[0] for stop in [special.match(after.lstrip())] if stop]
    called = _rendered(template, TOOL_TALK[:2], TOOLS, False)[0] or ""
    last = list(special.finditer(called))[-1:]
    if "look_up" in called and last and not called[last[0].end() :].strip():
        stops.append(last[0][0])
    earlier = _rendered(template, [ask, said, ask], None, False)[0] or ""
    begin = special.match(opening)
    before = earlier.partition("QUESTION")[2].partition("ANSWER")[0]
    shared = _common(opening, before[before.find(begin[0]) :]) if begin and begin[0] in before else ""
    end = special.match(earlier.partition("ANSWER")[2].lstrip())
    return Turn(
        openings=tuple(dict.fromkeys(text for text in (opening, shared) if text)),
        stops=tuple(dict.fromkeys(stops)),
        closing=end[0] if end and end[0] not in stops else "",
    )


def choose_template(stock: ChatTemplate, turn: Turn) -> ChatTemplate:
    """The stock template with markers where it has none and they can be proved; else as it is."""
    text = None if stock.has_markers else with_markers(stock.text, turn)
    marked = ChatTemplate(text or "", stock.variables)
    return marked if text and proved(stock, marked, turn) else stock


def with_markers(template: str, turn: Turn) -> str | None:
    """The template with {% generation %} around what the assistant writes; None where it has no loop over messages.

    The result is a guess until proved() has seen it.
    """
    loop = _message_loop(template)
    if loop is None or not turn.openings or not turn.stops:
        return None
    start, end, name, dash_in, dash_out = loop
    # a JSON string is a Jinja string as long as it is not escaped to ASCII
    openings, stops = (
        [json.dumps(text, ensure_ascii=False) for text in texts] for texts in (turn.openings, turn.stops)
    )
    opening = " or ".join(f"({text} if {text} in turn_text)" for text in openings)
    cuts = ", ".join(f"(turn_body.rfind({text}) + {text}|length) if {text} in turn_body else 0" for text in stops)
    closing = json.dumps(turn.closing, ensure_ascii=False)
    until_closing = f"turn_body.rfind({closing}) if {closing} in turn_body else 0" if turn.closing else "0"
    return (
        f"{template[:start]}{{% set turn_text {dash_in}%}}{template[start:end]}{{%{dash_out} endset %}}"
        f"{{% set turn_opening = {opening} %}}"
        f"{{% if {name}['role'] == 'assistant' and turn_opening %}}"
        "{% set turn_parts = turn_text.partition(turn_opening) %}{% set turn_body = turn_parts[2] %}"
        f"{{% set turn_cut = ([{cuts}]|max) or ({until_closing}) %}}"
        "{{ turn_parts[0] + turn_opening }}"
        "{% generation %}{{ turn_body[:turn_cut] }}{% endgeneration %}{{ turn_body[turn_cut:] }}"
        f"{{% else %}}{{{{ turn_text }}}}{{% endif %}}{template[end:]}"
    )


def proved(stock: ChatTemplate, marked: ChatTemplate, turn: Turn) -> bool:
    """Whether both templates render every fixture to the same text, or both refuse it, and the markers of
    `marked` enclose each assistant's text and what ends it, and no more."""
    seen = 0
    for messages, tools in FIXTURES:
        if ignored(messages, tools, stock.text):
            continue
        for prompt in (False, True):
            expected, text, spans = (
                _rendered(stock, messages, tools, prompt)[0],
                *_rendered(marked, messages, tools, prompt),
            )
            if text != expected:
                return False
            if text is not None:
                seen += 1
                if not _spans_proved(text, spans, messages, turn):
                    return False
    return seen > 0


def _spans_proved(text: str, spans: Spans, messages: Messages, turn: Turn) -> bool:
    answers = [message for message in messages if message["role"] == "assistant"]
    if len(answers) != len(spans):
        return False
    for (start, end), answer in zip(spans, answers, strict=True):
        written = text[start:end]
        opened = text[:start].endswith(turn.openings)
        closed = sum(written.count(stop) for stop in turn.stops) == 1 and written.endswith(turn.stops)
        closed = closed or bool(turn.closing and text[end:].startswith(turn.closing))
        if not (opened and closed and _essence(answer) in written):
            return False
        if any(other["content"].strip() in written for other in messages if other["role"] in ("user", "tool")):
            return False
    return True


def _essence(answer: Mapping[str, Any]) -> str:
    """What no template leaves out of an assistant's turn: reasoning may be dropped, and the text beside a call."""
    if answer.get("tool_calls"):
        return answer["tool_calls"][0]["function"]["name"]
    return answer["content"].rpartition("</think>")[2].strip()


def _rendered(template: ChatTemplate, messages: Messages, tools: Tools, prompt: bool) -> tuple[str | None, Spans]:
    try:
        return template.render(messages, tools, prompt=prompt)
    except RowError:
        return None, []


def _message_loop(template: str) -> tuple[int, int, str, str, str] | None:
    """Start and end of the body of the outermost loop over messages that writes most, its variable's name,
    and the whitespace dashes of the two tags that enclose the body."""
    tag = re.compile(r"\{#.*?#\}|\{%([-+]?)\s*(\w+)(.*?)([-+]?)%\}", re.DOTALL)
    depth, opened, found = 0, None, None
    for each in tag.finditer(template):
        word = each[2]
        if word in ("for", "macro"):
            target = re.match(r"\s*(\w+)\s+in\s+[^%]*messages", each[3]) if word == "for" else None
            if depth == 0:
                opened = (each, target) if target else None
            depth += 1
        elif word in ("endfor", "endmacro"):
            depth -= 1
            if depth == 0 and opened:
                start, end = opened[0].end(), each.start()
                longer = found is None or end - start > found[1] - found[0]
                if "{{" in template[start:end] and longer:
                    found = (start, end, opened[1][1], opened[0][4], each[1])
    return found


def _common(first: str, second: str) -> str:
    """The beginning that two strings share."""
    length = 0
    while length < min(len(first), len(second)) and first[length] == second[length]:
        length += 1
    return first[:length]
