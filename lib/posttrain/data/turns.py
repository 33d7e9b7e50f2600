"""What an environment says, as the tokens that stand between two turns of the policy; nothing is tokenised twice."""

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data import special_tokens
from posttrain.data.chat_template import Tools, check_messages
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.errors import DataError

SAID = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class TurnTokens:
    """The chat template's words after a stop token."""

    def __init__(self, tokenizer: BaseHFModelTokenizer):
        self.tokenizer = tokenizer
        self.control = special_tokens.pattern(special_tokens.control_tokens(tokenizer.hf))
        self.stop: str = tokenizer.hf.convert_ids_to_tokens(tokenizer.stop_id)

    def after(self, messages: Sequence[Mapping[str, Any]], tools: Tools = None) -> tuple[int, ...]:
        """Ids from after the stop token of the policy's turn, over `messages`, up to where its next turn begins.

        Raises:
            RowError: a message holds a control token, or the template cannot render it.
            DataError: the template writes an assistant's turn otherwise once something follows.
        """
        check_messages(messages, None, self.tokenizer.stock.text)
        special_tokens.refuse(self.control, messages, "the environment's messages")
        closed = self.tokenizer.stock.render(SAID, tools)[0]
        whole = self.tokenizer.stock.render([*SAID, *messages], tools, prompt=True)[0]
        end = closed.rfind(self.stop) + len(self.stop)
        if end < len(self.stop) or not whole.startswith(closed[:end]):
            raise DataError("the chat template writes a turn otherwise once others follow; environments need another")
        stop, *ids = self.tokenizer.hf.encode(self.stop + whole[end:], add_special_tokens=False)
        if stop != self.tokenizer.stop_id:
            raise DataError(f"{self.stop!r} is not one token before other text; environments need another tokenizer")
        return tuple(ids)
