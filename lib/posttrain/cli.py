"""`posttrain`: small commands beside the flows. Words in, a function of steps/ called, its result on the terminal.

Nothing is imported before a command runs, so that --help answers at once.
"""

import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from posttrain.errors import PosttrainError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command that the words name; an error with a known cause is one message, and exit status 1."""
    sys.path.append(os.getcwd())  # a plug-in may lie where the command is started; last, so that it hides nothing
    try:
        app()
    except PosttrainError as error:
        sys.exit(f"{type(error).__name__}: {error}")


@app.callback()
def about() -> None:
    """LLM post-training. A run is started by its flow: python flows/grpo_flow.py run --config FILE."""


@app.command()
def preview(
    config: Annotated[str, typer.Argument(help="Run config, YAML.", metavar="CONFIG")],
    config_value: Annotated[
        list[str] | None, typer.Option(help="Override one key, as optim.lr=1e-4; may be repeated.", metavar="KEY=VALUE")
    ] = None,
) -> None:
    """Show what would be trained: sources, lengths, masks and packs of the first draws. Writes nothing."""
    from posttrain.config_file import load_config
    from posttrain.overrides import metaflow_arguments

    words = [word for value in config_value or () for word in ("--config-value", value)]
    *_, document = metaflow_arguments(["--config", config, *words], default=Path(config))
    parsed = load_config(document)  # first, so that a typing error is not answered by seconds of imports

    from posttrain.workflow.data_report import print_report
    from steps.preview import preview as report_of

    print_report(report_of(parsed))


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="Run config, YAML.", metavar="CONFIG")],
    gpus: Annotated[int | None, typer.Option(help="GPUs that train; the config's own when left out.", min=1)] = None,
    gpu: Annotated[str, typer.Option(help="Their kind: h100, h200, b200, a100, a100-40, l40s, l4, a10g, rtx4090.")] = (
        "h100"
    ),
    price: Annotated[float | None, typer.Option(help="Of one GPU and hour; no cost without it.", min=0)] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the GPU's peak that is used.", min=0.01, max=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON and nothing else.")] = False,
    config_value: Annotated[
        list[str] | None, typer.Option(help="Override one key, as optim.lr=1e-4; may be repeated.", metavar="KEY=VALUE")
    ] = None,
) -> None:
    """Memory, hours, cost and disk of a run before it starts; exit status 1 if a GPU is too small, with what to do."""
    from posttrain.config_file import load_config
    from posttrain.overrides import metaflow_arguments

    words = [word for value in config_value or () for word in ("--config-value", value)]
    *_, document = metaflow_arguments(["--config", config, *words], default=Path(config))
    parsed = load_config(document)

    from posttrain.workflow.plan_report import print_plan
    from steps.estimate import estimate

    with redirect_stdout(sys.stderr):
        found = estimate(parsed, gpus=gpus, gpu=gpu, price=price, mfu=mfu)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_plan(found)
    if not found["fits"]:
        raise typer.Exit(1)


@app.command()
def audit(
    run: Annotated[str, typer.Argument(help="Folder or s3:// prefix of a run's files.", metavar="RUN")],
    other: Annotated[str | None, typer.Argument(help="A run to compare it with.", metavar="RUN2")] = None,
    replay: Annotated[bool, typer.Option(help="Make the batches again from the data and compare them.")] = True,
) -> None:
    """Prove from its ledger what a run trained, each draw once; exit status 1 if that fails or RUN2 differs."""
    from steps.audit import audit as prove

    proved = prove(_absolute(run), None if other is None else _absolute(other), replay=replay)
    _print_audit(proved)
    if proved["equal"] is False:
        raise typer.Exit(1)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Model folder, local or s3://, or a config.json.", metavar="MODEL")],
    against: Annotated[str, typer.Option(help="Peers to compare with: transformers, vllm.")] = "transformers",
    seeds: Annotated[int, typer.Option(help="Draws of weights and documents, or of documents.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON and nothing else.")] = False,
) -> None:
    """Prove that MODEL, or random weights in its shape, is the same function here as elsewhere; else exit status 1."""
    from steps.verify import verify as compare

    names = [name.strip() for name in against.split(",")]
    with redirect_stdout(sys.stderr):  # what peers print is not the result
        found = compare(model, against=names, seeds=seeds)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_verified(found, names)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A run's checkpoints/STAGE/step_N.", metavar="CHECKPOINT")],
    out: Annotated[str, typer.Argument(help="Folder or s3:// prefix to write; must not exist.", metavar="OUT")],
    model: Annotated[str | None, typer.Option(help="Model that training began with, if it was moved.")] = None,
) -> None:
    """Make a Hugging Face folder of a committed checkpoint, on a CPU, while the run goes on or after it."""
    from steps.export_checkpoint import export_checkpoint

    uris = {"model_uri": None if model is None else _absolute(model)}
    with redirect_stdout(sys.stderr):
        made = export_checkpoint(_absolute(checkpoint), _absolute(out), **uris)
    print(json.dumps(made, indent=2))


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Model folder, local or s3://, as a run exports it.", metavar="MODEL")],
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.", min=1)] = 256,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Talk to MODEL: one line is one turn, from the keyboard or from a pipe; an empty line or Ctrl-D ends it."""
    from steps.chat import chat as talk

    def turns():
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if not text:
                return
            yield text

    talk(model, turns(), print, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


champions = typer.Typer(no_args_is_help=True, help="Champions that retrain_flow promoted: look, or go back to one.")
app.add_typer(champions, name="registry")
Where = Annotated[str, typer.Argument(help="Folder or s3:// prefix of a registry.", metavar="REGISTRY")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@champions.command()
def show(registry: Where, as_json: AsJson = False) -> None:
    """Who is champion, what it was made of, and who was before."""
    from posttrain.workflow import registry as library

    where = _absolute(registry)
    found, entries = library.champion(where), library.history(where)
    if as_json:
        told = None if found is None else {"model_uri": found.model_uri, **found.manifest}
        print(json.dumps({"champion": told, "history": entries}, indent=2))
        return
    if found is None:
        print(f"{where} has no champion: nothing was promoted there")
        return
    print(f"version {found.version} is champion: {found.model_uri}")
    for entry in entries:
        why = entry["run"] if entry["action"] == "promote" else f"rolled back: {entry['reason']}"
        print(f"{entry['generation']:>4}  {entry['time'][:19]}  version {entry['version']}  {why}")


@champions.command()
def rollback(
    registry: Where,
    reason: Annotated[str, typer.Option(help="Why; it is kept in the history.")],
    to: Annotated[int | None, typer.Option(help="Version; the champion's parent when left out.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier version the champion again. Nothing is deleted."""
    from posttrain.workflow import registry as library

    done = library.rollback(_absolute(registry), reason=reason, to=to)
    print(json.dumps(done, indent=2) if as_json else f"{done['outcome']}: version {done['champion']} is champion")


@app.command()
def lineage(
    model: Annotated[
        str, typer.Argument(help="An exported folder, local or s3://, as of a champion.", metavar="MODEL")
    ],
    as_json: AsJson = False,
) -> None:
    """From a model back to its rows: the runs that made it, what they read, and whether that is still the same."""
    from steps.lineage import lineage as lead_back

    runs = lead_back(_absolute(model))
    if as_json:
        print(json.dumps(runs, indent=2))
        return
    for run in runs:
        print(f"{run['run']}  {run['method']}, started from {run['started_from']}")
        print(f"  rows {run.get('data_fingerprint', '')[:12] or 'unknown'}; its folder of data is {run['data']}")
        for name, digest in run["sets"].items():
            print(f"    {name}  {digest[:12]}")
        for source in run["sources"]:
            for file in source["files"]:
                facts = (source["key"], f"{file['rows']:,} rows", file["fingerprint"][:12], file["state"], file["uri"])
                print("   ", *facts, sep="  ")
        print(f"  tokens {run.get('tokens_sha256', '')[:12] or 'unknown'}; their folder is {run['tokens']}")
        for shard in run["shards"]:
            print(f"    {shard['rows']:,} units  {shard['state']}  {shard['uri']}")


def _absolute(root: str) -> str:
    from posttrain.storage import is_s3

    return root.rstrip("/") if is_s3(root) else str(Path(root).expanduser().resolve())


def _print_audit(proved: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*("stage", "steps", "draws trained", "dropped", "checkpoint", "replayed"))
    for stage, facts in proved["stages"].items():
        dropped = "\n".join(f"{count:,} {reason}" for reason, count in facts["dropped"].items())
        newest = "-" if facts["checkpoint"] is None else f"step {facts['checkpoint']:,}"
        replayed = f"{facts['replayed']:,} steps" if facts["replayed"] else "-"
        numbers = (f"{facts['steps']:,}", f"{facts['draws']:,}", escape(dropped or "none"))
        table.add_row(escape(stage), *numbers, newest, replayed)
    console = Console(highlight=False)
    console.print(f"{proved['root']}: every draw is accounted for", markup=False, soft_wrap=True)
    console.print(table)
    for stage, found in proved["differs"].items():
        line = f"{stage}: step {found['step']} is the first that differs, in its {found['what']}"
        console.print(line, markup=False, soft_wrap=True)
    if proved["equal"]:
        console.print(f"equal to {proved['other']}, step by step", markup=False, soft_wrap=True)


def _print_verified(found: dict[str, Any], names: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    weights = "its own weights" if found["weights"] == "folder" else "random weights in a small shape"
    line = f"{found['path']}: {found['family']}, {found['tensors']} tensors, {weights}, seeds: {found['seeds']}"
    console = Console(highlight=False)
    console.print(line, markup=False, soft_wrap=True)
    for name in names:
        table = Table(title=f"agrees with {name}", title_justify="left")
        table.add_column("worst of all seeds")
        table.add_column("value", justify="right")
        for key, value in found[name].items():
            table.add_row(key, f"{value:.4f}" if key == "top1_agreement" else f"{value:.1e}")
        console.print(table)


if __name__ == "__main__":
    main()
