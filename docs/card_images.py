"""docs/cards.md and its pictures: `make card-images` runs two tiny flows and looks at their cards in Chromium.

Each card is taken from its finished task with Metaflow's client, put into a frame of the width of a window or of a
telephone, as the Metaflow UI puts it into a frame too, and photographed whole by a headless Chromium. All that the
pictures show was made by the runs. `--runs FOLDER` keeps the runs there, and takes those that it finds there.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
WIDE, NARROW = 1080, 400
"""Pixels of a card's frame: in the Metaflow UI on a laptop, and on a telephone."""
LONGEST, OF_NARROW = 2400, 1900
"""Pixels of a picture's height, and of the one of narrow frames; what is below is more of the same."""
MOST_BYTES = 200_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
DRAWN_MS = 8000
"""Of the browser's own clock, which runs as fast as it can; a card decodes and draws itself in less."""

GRPO = {
    "base": str(ROOT / "configs" / "grpo_tiny.yaml"),
    "rollout.prompts_per_step": 16,
    "optim.num_steps": 30,
    "eval.every_steps": 5,
}
RETRAIN = {
    "base": str(ROOT / "configs" / "retrain_tiny.yaml"),
    "model.fresh": {"hidden_size": 32, "num_layers": 2},
    "data.pack_tokens": 256,
    "optim.num_steps": 120,
    "optim.lr": 5e-3,
}
CARDS = {
    "data": ("GRPOFlow", 0, "merge_tokens"),
    "training": ("GRPOFlow", 0, "train"),
    "evaluation": ("GRPOFlow", 0, "evaluate"),
    "export": ("GRPOFlow", 0, "export"),
    "promotion": ("RetrainFlow", 0, "promote"),
    "promotion_refused": ("RetrainFlow", 1, "promote"),
}
"""Picture -> flow, which of its runs (the first is 0), and step."""
SAYS = {
    "data": "Data: what the step merge_tokens made of the sources",
    "training": "Training, drawn while it runs",
    "evaluation": "Evaluation: the trained model beside the one that it started from",
    "export": "Export: where the model is, that it is what was trained, and what made it",
    "promotion": "Promotion: a challenger that became champion",
    "promotion_refused": "Promotion: a challenger that the gate refused",
}
"""Picture -> its heading in docs/cards.md."""


def main() -> None:
    """Run what is missing, and photograph the cards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chromium", default=os.environ.get("CHROMIUM"), help="browser; else $CHROMIUM, else on PATH")
    parser.add_argument("--runs", type=Path, help="folder of the runs, kept; made anew each time when left out")
    asked = parser.parse_args()
    browser = asked.chromium or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is on PATH. Fix: --chromium, or CHROMIUM in the environment")
    with tempfile.TemporaryDirectory() as place:
        runs = asked.runs or Path(place) / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        environment = in_folder(runs)
        run_flows(runs, environment)
        pages = Path(place) / "pages"
        pages.mkdir()
        os.environ |= environment
        for name, text in cards().items():
            (pages / f"{name}.html").write_text(text)
        photograph(pages, browser)
    (ROOT / "docs" / "cards.md").write_text(page())


def page() -> str:
    """docs/cards.md, with the pictures that there are."""
    parts = [
        "# The cards\n\nOf finished runs of the built-in tasks. `make card-images` takes all of these pictures anew. "
        "Metaflow draws cards on white, in a dark window too."
    ]
    for name, says in [*SAYS.items(), ("narrow", "All of them on a telephone")]:
        picture = "cards_narrow.png" if name == "narrow" else f"card_{name}.png"
        if (IMAGES / picture).exists():
            parts.append(f"## {says}\n\n![{says}](images/{picture})")
    return "\n\n".join(parts) + "\n"


def in_folder(runs: Path) -> dict[str, str]:
    """Metaflow's environment with all its files in `runs`."""
    return {
        "METAFLOW_HOME": str(runs / "home"),
        "METAFLOW_USER": "posttrain",
        "METAFLOW_DEFAULT_METADATA": "local",
        "METAFLOW_DEFAULT_DATASTORE": "local",
        "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(runs),
        "METAFLOW_CLIENT_CACHE_PATH": str(runs / "cache"),
    }


def run_flows(runs: Path, environment: dict[str, str]) -> None:
    """One GRPO run; a day of rows that is learnt and promoted, and a day of wrong ones that the gate refuses."""
    from posttrain.data.sort_digits_days import add_day

    if not (runs / ".metaflow" / "GRPOFlow").exists():
        _run("grpo_flow.py", GRPO, runs, environment)
    if not (runs / ".metaflow" / "RetrainFlow").exists():
        for wrong in (0.0, 1.0):
            add_day(runs / "inbox", count=400, wrong=wrong)
            _run("retrain_flow.py", RETRAIN, runs, environment)


def _run(flow: str, config: dict[str, object], runs: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "flows" / flow), "--config-value", "config", json.dumps(config), "run"]
    subprocess.run(command, cwd=runs, env=os.environ | environment, check=True)


def cards() -> dict[str, str]:
    """Name of a picture -> the card's page."""
    from metaflow import Flow, namespace
    from metaflow.cards import get_cards

    namespace(None)
    found = {}
    for name, (flow, number, step) in CARDS.items():
        run = list(Flow(flow))[::-1][number]
        (card,) = get_cards(run[step].task)
        found[name] = card.get()
    return found


def photograph(pages: Path, browser: str) -> None:
    """Every card in its wide frame, and all of them in narrow ones beside each other, into docs/images."""
    names = list(CARDS)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(pages)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shoot = partial(_shoot, browser, pages, f"http://127.0.0.1:{server.server_port}")
    for name in names:
        shoot(f"card_{name}", [name], WIDE)
    shoot("cards_narrow", names, NARROW)
    server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def _shoot(browser: str, pages: Path, address: str, picture: str, names: list[str], width: int) -> None:
    """One picture of frames beside each other. Looked at twice, as a window must be as high as what it shows."""
    height = min(LONGEST if width == WIDE else OF_NARROW, max(_look(browser, pages, address, names, width, LONGEST)))
    shot = pages / "shot.png"
    _look(browser, pages, address, names, width, height, f"--screenshot={shot}")
    from PIL import Image  # comes with TensorBoard

    image = Image.open(shot).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    held = io.BytesIO()
    image.save(held, "PNG", optimize=True)
    if held.tell() > MOST_BYTES:
        raise SystemExit(f"{picture}.png would have {held.tell():,} bytes, more than {MOST_BYTES:,}: show less")
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / f"{picture}.png").write_bytes(held.getvalue())
    print(f"{IMAGES / picture}.png  {image.width}x{image.height}  {held.tell():,} bytes", flush=True)


def _look(
    browser: str, pages: Path, address: str, names: list[str], width: int, height: int, shot: str = "--dump-dom"
) -> list[int]:
    """Open the frames; how high each card is when it has drawn itself, and a picture where `shot` asks for one."""
    size = f"width:{width}px;height:{height}px;border:0"
    frames = "".join(f'<iframe src="{name}.html?embed=true" style="{size}"></iframe>' for name in names)
    ends = "[...f.contentDocument.querySelectorAll('.sectionItems > *')].map(e => e.getBoundingClientRect().bottom)"
    told = f"f.dataset.tall = Math.ceil(Math.max(0, ...{ends}) + 24)"
    script = f"setInterval(() => document.querySelectorAll('iframe').forEach(f => {{ {told} }}), 500)"
    body = f'<body style="margin:0;display:flex;gap:24px;background:#fff">{frames}<script>{script}</script></body>'
    (pages / "frames.html").write_text(f"<!doctype html><meta charset=utf-8>{body}")
    across = len(names) * width + 24 * (len(names) - 1)
    command = [browser, "--headless", "--no-sandbox", "--no-proxy-server", "--hide-scrollbars", "--disable-gpu"]
    command += [f"--window-size={across},{height}", f"--virtual-time-budget={DRAWN_MS}", shot]
    done = subprocess.run([*command, f"{address}/frames.html"], capture_output=True, text=True, timeout=600, check=True)
    return [int(tall) for tall in re.findall(r'data-tall="(\d+)"', done.stdout)] or [height]


if __name__ == "__main__":
    main()
