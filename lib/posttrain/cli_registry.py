"""`posttrain registry`: look at the champions that retrain_flow promoted, or go back to one."""

import json
from typing import Annotated

import typer

from posttrain.storage import absolute

app = typer.Typer(no_args_is_help=True, help="Champions that retrain_flow promoted: look, or go back to one.")
Where = Annotated[str, typer.Argument(help="Folder or s3:// prefix of a registry.", metavar="REGISTRY")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.command()
def show(registry: Where, as_json: AsJson = False) -> None:
    """Who is champion, what it was made of, and who was before."""
    from posttrain.workflow import registry as library

    where = absolute(registry)
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
        print(f"{entry['generation']:>4}  {entry['time'][:19]} UTC  version {entry['version']}  {why}")


@app.command()
def rollback(
    registry: Where,
    reason: Annotated[str, typer.Option(help="Why; it is kept in the history.")],
    to: Annotated[int | None, typer.Option(help="Version; the champion's parent when left out.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Make an earlier version the champion again. Nothing is deleted."""
    from posttrain.workflow import registry as library

    done = library.rollback(absolute(registry), reason=reason, to=to)
    print(json.dumps(done, indent=2) if as_json else f"{done['outcome']}: version {done['champion']} is champion")
