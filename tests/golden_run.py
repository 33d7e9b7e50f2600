"""Every kind of file that a run leaves, small, as the code of its day wrote it: tests/golden/run_format_1.

Made once by `PYTHONPATH=lib:tests python tests/golden_run.py tests/golden/run_format_1` and never again: what was
written then must open for ever (tests/test_upgrade.py). A later format gets a folder of its own beside it.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors import tiny_engine
from posttrain import storage
from posttrain.compute.collective import Ranks
from posttrain.compute.engine import Engine
from posttrain.data.batch import collate
from posttrain.data.pack import pack
from posttrain.data.sample import shift
from posttrain.data.token_files import write_units
from posttrain.data.types import Pack, Unit
from posttrain.model.build import build_model, fresh_config
from posttrain.model.losses.sft import SFTLoss
from posttrain.workflow.ledger import Ledger
from posttrain.workflow.ledger_file import LedgerFile
from posttrain.workflow.registry import Candidate, promote
from saves import checkpoints, save_state
from tiny import tiny_tokenizer

STEPS = 3
"""Trained before the checkpoint; one more is what a resume trains."""
PACK_TOKENS = 64


def one_rank() -> Ranks:
    return Ranks(rank=0, world_size=1, meeting="", timeout_s=1, device=torch.device("cpu"))


def units_of(step: int) -> list[Unit]:
    """A step's units: a function of its number alone."""
    rng = np.random.default_rng(step)
    return [(shift(ids, [1.0] * len(ids)),) for ids in (rng.integers(0, 200, 20).tolist() for _ in range(4))]


def packs_of(step: int) -> list[Pack]:
    return pack(units_of(step), pack_tokens=PACK_TOKENS)


def train(engine: Engine, step: int) -> float:
    """One step on its own packs; the loss before it."""
    packs = packs_of(step)
    batches = [collate(each, pack_tokens=PACK_TOKENS) for each in packs]
    tokens = sum(each.loss_tokens for each in packs)
    return engine.train_step(step, batches, SFTLoss(), denominator=tokens)["loss"]


def weights_digest(engine: Engine) -> str:
    """sha256 over the bytes of all parameters, in the order of their names."""
    chain = hashlib.sha256()
    for name, parameter in sorted(engine.model.named_parameters()):
        chain.update(name.encode() + parameter.detach().numpy().tobytes())
    return chain.hexdigest()


def make(root: Path) -> dict[str, Any]:
    """Write all files; what is to be found in them again."""
    with storage.staging(f"{root}/model") as folder:
        tokenizer = tiny_tokenizer(folder)
        sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "mlp_size": 16, "max_length": 64}
        build_model(folder, fresh_config(vocab_size=tokenizer.vocab_size, **sizes), seed=0)
        storage.publish(folder, f"{root}/model", licence="Apache-2.0")
    engine, ledger = tiny_engine(f"{root}/model", one_rank()), Ledger()
    lines = LedgerFile(f"{root}/ledger/sft.jsonl")
    lines.restore(0)
    losses = []
    for step in range(STEPS):
        losses.append(train(engine, step))
        draws = [ledger.draw() for _ in units_of(step)]
        lines.append({"step": step, **ledger.commit(packs_of(step), draws=draws)})
    lines.close()
    with checkpoints(f"{root}/checkpoints/sft").writing() as saved:
        save_state(saved, STEPS, dict(engine.state()), {"ledger": ledger.state(), "history": losses})
    (root / "tokens").mkdir()
    write_units([(unit, 7) for unit in units_of(0)], root / "tokens" / "units.parquet")
    with storage.staging(f"{root}/small_model") as folder:
        (folder / "config.json").write_text("{}")
        storage.publish(folder, f"{root}/small_model")
    promote(f"{root}/registry", Candidate(run="SFTFlow/1", parent=None, model_uri=f"{root}/small_model", key="k"))
    return {
        "tokenizer": tokenizer.fingerprint(),
        "ids": tokenizer.conversation([{"role": "user", "content": "21"}, {"role": "assistant", "content": "12"}])[0],
        "losses": losses,
        "weights": weights_digest(engine),
        "next_loss": train(engine, STEPS),
        "ledger": ledger.digest,
    }


if __name__ == "__main__":
    found = make(Path(sys.argv[1]).resolve())
    Path(sys.argv[1], "expected.json").write_text(json.dumps(found, indent=2) + "\n")
