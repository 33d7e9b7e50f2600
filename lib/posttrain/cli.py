"""`posttrain`: small commands beside the flows. Words in, a function of steps/ or the library called, its result out.

Nothing is imported before a command runs, so that --help answers at once. Results are for a person, or JSON alone with
--json; an error with a known cause is one message on stderr and exit status 1.
"""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import posttrain
from posttrain import cli_registry, collector
from posttrain.errors import PosttrainError

if TYPE_CHECKING:
    from posttrain.config import RunConfig


class _OneMessage(TyperGroup):
    """Commands whose known errors are one message; all others keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PosttrainError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(cls=_OneMessage, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(cli_registry.app, name="registry")

Config = Annotated[str, typer.Argument(help="Run config, YAML.", metavar="CONFIG")]
Changes = Annotated[
    list[str] | None, typer.Option(help="Change one key, as optim.lr=1e-4; may be repeated.", metavar="KEY=VALUE")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def main() -> None:
    """Run the command that the words name."""
    collector.calm()
    here = Path.cwd()  # where plug-ins may lie; last on the path, so that they hide nothing
    sys.path += [str(folder) for folder in (here, here / "flows") if folder.is_dir()]
    app()


def _version(asked: bool) -> None:
    if asked:
        print(f"posttrain {posttrain.__version__}")
        raise typer.Exit()


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """LLM post-training. A run is started by its flow: python flows/grpo_flow.py run --config FILE."""


@app.command()
def init(
    recipe: Annotated[str, typer.Argument(help="sft, dpo, reward, distill or grpo.", metavar="RECIPE")],
    folder: Annotated[str, typer.Argument(help="Folder to make; must not exist.", metavar="FOLDER")],
    as_json: AsJson = False,
) -> None:
    """Make a folder with a flow, a config, rows and a reward, which runs as it is and is yours to change."""
    from steps.init import init as make

    made = make(recipe, Path(folder))
    if as_json:
        print(json.dumps(made, indent=2))
        return
    print(f"made {made['folder']}:")
    for name, what in made["files"].items():
        print(f"  {name:<28} {what}")
    print("\nNow:", *made["next"], sep="\n  ")


@app.command()
def doctor(
    root: Annotated[
        str | None, typer.Option(help="Folder or s3:// prefix of the runs' files: checkpoint.root.", metavar="ROOT")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: Python, packages, GPUs, disk, /dev/shm, Metaflow, S3; exit status 1 if one needs a fix."""
    from steps.doctor import examine

    with redirect_stdout(sys.stderr):
        found = examine("runs" if root is None else root)
    if as_json:
        print(json.dumps([check.plain() for check in found], indent=2))
    else:
        from posttrain.cli_tables import print_checks

        print_checks([check.plain() for check in found])
    if any(check.fix for check in found):
        raise typer.Exit(1)


@app.command()
def preview(config: Config, config_value: Changes = None, as_json: AsJson = False) -> None:
    """Show what would be trained: sources, lengths, masks and packs of the first draws. Writes nothing."""
    parsed = _parsed(config, config_value)  # first, so that a typing error is not answered by seconds of imports

    from posttrain.workflow.data_report import print_report
    from steps.preview import preview as report_of

    with redirect_stdout(sys.stderr):
        report = report_of(parsed)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
        if any(source["units"] < source["rows"] for source in report["sources"]):
            print("\nRows that these draws do not reach were not looked at; a run checks each row that it trains.")


@app.command()
def plan(
    config: Config,
    gpus: Annotated[int | None, typer.Option(help="GPUs that train; the config's own when left out.", min=1)] = None,
    gpu: Annotated[str, typer.Option(help="Their kind: h100, h200, b200, a100, a100-40, l40s, l4, a10g, rtx4090.")] = (
        "h100"
    ),
    price: Annotated[float | None, typer.Option(help="Of one GPU and hour; no cost without it.", min=0)] = None,
    mfu: Annotated[float | None, typer.Option(help="Share of the GPU's peak that is used.", min=0.01, max=1)] = None,
    as_json: AsJson = False,
    config_value: Changes = None,
) -> None:
    """Memory, hours, cost and disk of a run before it starts; exit status 1 if a GPU is too small, with what to do."""
    parsed = _parsed(config, config_value)

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
    as_json: AsJson = False,
) -> None:
    """Prove from its ledger what a run trained, each draw once; exit status 1 if that fails or RUN2 differs."""
    from posttrain.storage import absolute
    from steps.audit import audit as prove

    with redirect_stdout(sys.stderr):
        proved = prove(absolute(run), None if other is None else absolute(other), replay=replay)
    if as_json:
        print(json.dumps(proved, indent=2))
    else:
        from posttrain.cli_tables import print_audit

        print_audit(proved)
    if proved["equal"] is False:
        raise typer.Exit(1)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="Model folder, local or s3://, or a config.json.", metavar="MODEL")],
    against: Annotated[str, typer.Option(help="Peers to compare with: transformers, vllm.")] = "transformers",
    seeds: Annotated[int, typer.Option(help="Draws of weights and documents, or of documents.", min=1)] = 1,
    as_json: AsJson = False,
) -> None:
    """Prove that MODEL, or random weights in its shape, is the same function here as elsewhere; else exit status 1."""
    from steps.verify import verify as compare

    names = [name.strip() for name in against.split(",")]
    with redirect_stdout(sys.stderr):  # what peers print is not the result
        found = compare(model, against=names, seeds=seeds)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        from posttrain.cli_tables import print_verified

        print_verified(found, names)


@app.command()
def lineage(
    model: Annotated[
        str, typer.Argument(help="An exported folder, local or s3://, as of a champion.", metavar="MODEL")
    ],
    as_json: AsJson = False,
) -> None:
    """From a model back to its rows: the runs that made it, what they read, and whether that is still the same."""
    from posttrain.storage import absolute
    from steps.lineage import lineage as lead_back

    runs = lead_back(absolute(model))
    if as_json:
        print(json.dumps(runs, indent=2))
    else:
        from posttrain.cli_tables import print_lineage

        print_lineage(runs)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="A run's checkpoints/STAGE/step_N.", metavar="CHECKPOINT")],
    out: Annotated[str, typer.Argument(help="Folder or s3:// prefix to write; must not exist.", metavar="OUT")],
    model: Annotated[str | None, typer.Option(help="Model that training began with, if it was moved.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a Hugging Face folder of a committed checkpoint, on a CPU, while the run goes on or after it."""
    from posttrain.storage import absolute
    from steps.export_checkpoint import export_checkpoint

    with redirect_stdout(sys.stderr):
        made = export_checkpoint(absolute(checkpoint), absolute(out), model_uri=model and absolute(model))
    if as_json:
        print(json.dumps(made, indent=2))
    else:
        print(f"{made['uri']}: the weights after step {made['step']}")
        print(f"posttrain chat {out}")


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

    def say(text: str) -> None:  # what a model writes reaches the terminal as text, never as an escape code
        print("".join(each if each.isprintable() or each in "\n\t" else "\ufffd" for each in text))

    talk(model, turns(), say, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


def _parsed(config: str, changes: list[str] | None) -> "RunConfig":
    from posttrain.config import RunConfig
    from posttrain.config_file import load_config, sections
    from posttrain.config_retrain import RetrainConfig
    from posttrain.overrides import metaflow_arguments

    words = [word for value in changes or () for word in ("--config-value", value)]
    *_, document = metaflow_arguments(["--config", config, *words], default=Path(config))
    return load_config(document, RetrainConfig if "retrain" in sections(document) else RunConfig)


if __name__ == "__main__":
    main()
