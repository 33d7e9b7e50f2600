"""What a training step reads, made by the steps of a flow that come before it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Folders of a run up to and including its tokens."""

    root: str
    model_uri: str
    tokens_uri: str

    def plain(self) -> dict[str, str]:
        """As a training program takes them."""
        return {"root": self.root, "model_uri": self.model_uri, "tokens_uri": self.tokens_uri}


def prepared(config: Any, root: Any) -> Inputs:
    """Run prepare, tokenize and merge_tokens in this process, below `root`."""
    from steps.merge_tokens import merge_tokens
    from steps.prepare import prepare
    from steps.tokenize import tokenize

    made = prepare(config, root=str(root))
    uris = {"root": str(root), "data_uri": made["data"]["uri"], "model_uri": made["model"]["uri"]}
    tokens = merge_tokens(config, **uris, parts=[tokenize(config, **uris, part=part) for part in made["parts"]])
    return Inputs(root=str(root), model_uri=uris["model_uri"], tokens_uri=tokens["uri"])
