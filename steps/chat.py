"""Try a model: what a person types becomes its user turns, sampled by transformers from a model folder."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from posttrain import storage
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.errors import ModelError
from posttrain.model.load import FROM_FOLDER, read_config


def chat(
    folder: str,
    turns: Iterable[str],
    say: Callable[[str], None],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> None:
    """Answer every turn, with the turns before it in the prompt; what was sampled is given to `say`.

    Args:
        folder: a model folder, local or s3://, as the step export writes it.
        temperature: 0 takes the likeliest token.

    Raises:
        ModelError: the folder holds no model that writes text.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    suffixes = (".json", ".jinja", ".txt", ".model", ".safetensors")
    local = storage.download(folder, suffixes=suffixes) if storage.is_s3(folder) else Path(folder).expanduser()
    classes = read_config(local).get("architectures") or []
    if any("CausalLM" not in name and "ConditionalGeneration" not in name for name in classes):
        raise ModelError(f"{folder} is a {classes[0]}, which writes no text")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(local, **FROM_FOLDER).eval()
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: {str(error).strip().splitlines()[0]}") from None
    tokenizer = BaseHFModelTokenizer(local)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    messages: list[dict[str, str]] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = torch.tensor([tokenizer.prompt(messages)], device=model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=list(tokenizer.stop_ids),
            pad_token_id=tokenizer.pad_id,
            **sampling,
        )
        answer = tokenizer.decode(out[0, ids.shape[1] :].tolist())
        messages.append({"role": "assistant", "content": answer})
        say(answer)
