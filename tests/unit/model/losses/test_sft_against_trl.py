"""SFT and TRL's SFTTrainer on the same conversations and weights: which tokens are trained, the loss, its gradient."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from posttrain.data.batch import collate
from posttrain.data.encode import Encoder
from posttrain.data.pack import pack
from posttrain.data.tokenizer import BaseHFModelTokenizer
from posttrain.model.forward import forward
from posttrain.model.load import load_decoder
from posttrain.model.losses import count
from posttrain.model.losses.sft import SFTLoss
from posttrain.model.weights import hf_tensors
from tiny import tiny_model


def said(*texts: str) -> dict[str, Any]:
    """Turns of the user and the assistant, one after the other."""
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


ROWS = [said("sort 21", "12"), said("sort 3142", "1234", "sort 5", "5", "sort 97", "79"), said("sort 60", "06")]


def test_assistant_only_loss_equals_the_trainer_of_trl(tmp_path: Path):
    folder = tiny_model(tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options: dict[str, Any] = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    trainer: Any = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path / "trl"), assistant_only_loss=True, max_length=None, **options),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    inputs = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    theirs = trainer.compute_loss(trainer.model, inputs)
    theirs.backward()

    encoder = Encoder(BaseHFModelTokenizer(folder), wanted="conversation", pack_tokens=128)
    packs = pack([unit for units in encoder(ROWS) for unit in units], pack_tokens=128)
    (one,) = packs
    assert len(one.samples) == len(ROWS), "packed, where TRL pads"
    labels = [[int(id) for id in row if id != -100] for row in inputs["labels"]]
    trained = [sample.target_ids[sample.loss_mask > 0].tolist() for sample in one.samples]
    assert sorted(trained) == sorted(labels) and min(map(len, labels)) > 1

    decoder, loss_fn = load_decoder(folder), SFTLoss()
    batch = collate(one, pack_tokens=128)
    total, _ = loss_fn(forward(decoder, batch), batch)
    ours = total / count(loss_fn, packs)
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=0)
    ours.backward()
    slopes = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    for parameter in decoder.parameters():
        parameter.data = parameter.grad  # so that they come under the names of a checkpoint
    mine = dict(hf_tensors(decoder))
    assert mine.keys() == slopes.keys()
    for name, slope in mine.items():
        torch.testing.assert_close(
            slope, slopes[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
