"""The graph that every post-training flow shares, and how a flow starts.

start -> prepare -> tokenize (in shares) -> merge_tokens -> warmup -> train -> evaluate -> export -> end

A flow subclasses PostTrainFlow, names its own config and, in run_training(), its training
program. The steps are programs in steps/; here are only their order, resources and artifacts.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from metaflow import Config, FlowSpec, card, current, parallel, retry, step
from metaflow.util import get_username

import posttrain  # noqa: F401  (imported here so that the code package carries it)
import steps  # noqa: F401
from placement import on_hardware, refuse_gang_of_small_ids, where_it_runs
from posttrain import collector
from posttrain.compute.pool import SPINS
from posttrain.errors import ConfigError
from posttrain.overrides import metaflow_arguments
from refusal import Refused, exit_code, refusing
from spot import heeding_spot_notices
from tags import name_of, tag_run

if TYPE_CHECKING:  # a run has twice as many processes as tasks, most of which need no schema
    from posttrain.config import RunConfig
    from posttrain.config_file import TypedConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def own_config(name: str, schema: str = "posttrain.config:RunConfig") -> Config:
    """The config of a flow, read from configs/`name` where the command line names no other.

    Args:
        schema: class of the config, `package.module:name`; imported where the text is read, once for all tasks.
    """

    def parse(text: str) -> dict:
        """It returns plain data, because Metaflow stores it."""
        from posttrain.config_file import load_config
        from posttrain.plugin import resolve

        own = CONFIGS / name  # Metaflow hands over the text alone
        where = {"where": str(own)} if own.is_file() and own.read_text() == text else {}
        try:
            return load_config(text, resolve(schema, key="schema"), **where).model_dump(mode="json")
        except ConfigError as error:
            raise Refused(str(error)) from None

    return Config("config", default=str(CONFIGS / name), parser=parse, help="Run config, YAML")


@on_hardware
class PostTrainFlow(FlowSpec):
    """The shared chain; each step's program is in steps/."""

    config = own_config("grpo_tiny.yaml")

    @step
    def start(self):
        """Refuse what cannot work before anything is paid for; decide where the run's files go, and name the run."""
        self.plan_run()
        self.next(self.prepare)

    @step
    def prepare(self):
        """Snapshot prompts, index the training rows, bring or build the model."""
        from steps.prepare import prepare

        found = refusing(prepare, self.cfg, root=self.root)
        self.data, self.model, self.parts = found["data"], found["model"], found["parts"]
        self.teacher_uri = found["teacher_uri"]
        self.label(data=self.data["fingerprint"][:8])
        self.next(self.tokenize, foreach="parts")

    @retry(times=2, minutes_between_retries=0)
    @step
    def tokenize(self):
        """A share of the training rows: token ids and loss masks."""
        from steps.tokenize import tokenize

        uris = {"data_uri": self.data["uri"], "model_uri": self.model["uri"]}
        self.tokenized = refusing(tokenize, self.cfg, root=self.root, **uris, part=self.input)
        self.next(self.merge_tokens)

    @card(type="blank", id="data")
    @step
    def merge_tokens(self, inputs):
        """All shares and the prompts as one set; what the data look like."""
        from posttrain.workflow.pages import show_data
        from steps.data_report import read_report
        from steps.merge_tokens import merge_tokens

        parts = [each.tokenized for each in inputs]
        self.merge_artifacts(inputs, exclude=["tokenized"])
        uris = {"data_uri": self.data["uri"], "model_uri": self.model["uri"]}
        self.tokens = refusing(merge_tokens, self.cfg, root=self.root, **uris, parts=parts)
        show_data(read_report(self.tokens["uri"]), self.data)
        self.next(self.warmup)

    @card(type="blank", id="training")
    @retry(times=2, minutes_between_retries=0)
    @step
    def warmup(self):
        """Supervised fine-tuning to a first skill; passes the model on when the config has no warm-up."""
        self.warm_up()
        self.next({"one": self.train, "many": self.gang}, condition="nodes")

    @card(type="blank", id="training")
    @retry(times=2, minutes_between_retries=0)
    @step
    def train(self):
        """Train on one node."""
        self.train_here()
        self.next(self.evaluate)

    @step
    def gang(self):
        """Ask for several nodes at once."""
        self.next(self.train_nodes, num_parallel=self.cfg.parallel.nodes)

    @card(type="blank", id="training")
    @retry(times=2, minutes_between_retries=0)
    @parallel
    @step
    def train_nodes(self):
        """Train on a gang of nodes."""
        self.train_here()
        self.next(self.gather)

    @step
    def gather(self, inputs):
        """Keep what node 0 made."""
        self.merge_artifacts(inputs)
        self.next(self.evaluate)

    @card(type="blank", id="evaluation")
    @retry(times=2, minutes_between_retries=0)
    @step
    def evaluate(self):
        """Held-out rows: the trained model beside the one it started from."""
        from posttrain.workflow.pages import show_evaluation
        from steps.evaluate import evaluate

        more = {"per_row": self.scored_by(), "show": show_evaluation}  # before the gate: a refused model is seen too
        models = {"before": self.warmed_up["model_uri"], "after": self.trained["model_uri"]}
        uris = {"tokens_uri": self.tokens["uri"], "rows_uri": self.trained.get("tokens_uri")}
        uris["teacher_uri"] = self.warmed_up["teacher_uri"]
        self.evaluation = refusing(evaluate, self.cfg, models=models, **uris, **more)
        self.next(self.export)

    @card(type="blank", id="export")
    @step
    def export(self):
        """A Hugging Face folder, proved equal to what was trained."""
        self.export_model()
        self.next(self.end)

    @step
    def end(self):
        """Before and after, and where the model is."""
        from steps.report import report

        self.label()  # a run that was resumed is another one, and has no tags so far
        self.summary = report(
            evaluation=self.evaluation, before="before", after="after", export_uri=self.exported["uri"]
        )

    @property
    def cfg(self) -> "RunConfig":
        """The typed config, with the backend that this task really runs on."""
        from posttrain.config import RunConfig

        return self.typed(RunConfig)

    def typed(self, schema: "type[TypedConfig]") -> "TypedConfig":
        """The whole config of the flow, as what its schema makes of it."""
        from posttrain.config_file import checked_config

        document = self.config.to_dict()
        document["parallel"] |= where_it_runs()
        return refusing(checked_config, document, schema)

    def plan_run(self):
        """The program of the step `start`."""
        from steps.plan import plan

        refuse_gang_of_small_ids(self.cfg.parallel.backend, self.cfg.parallel.nodes)
        found = refusing(plan, self.cfg, flow=current.flow_name, run_id=current.run_id)
        self.root, self.provenance = found["root"], found["provenance"]
        self.label(recipe=self.cfg.method.name, model=name_of(self.cfg.model))

    def label(self, **facts: str):
        """Add to what the run is found by: the artifact `labels`, and its tags."""
        self.labels = {**getattr(self, "labels", {}), **facts}
        tag_run(self.labels)

    def warm_up(self):
        """The program of the step `warmup`, and on how many nodes training goes on."""
        from posttrain.workflow.card import SFT, TrainingCard
        from steps.train import train

        facts = [f"seed {self.cfg.seed}", f"{self.cfg.parallel.ranks} ranks", f"run {current.run_id}"]
        plan = self.cfg.warmup
        cards = [TrainingCard("Warm-up: SFT", facts, num_steps=plan.num_steps, view=SFT)] if plan else []
        uris = {"root": self.root, "model_uri": self.model["uri"], "tokens_uri": self.tokens["uri"]}
        with heeding_spot_notices():
            self.warmed_up = refusing(train, self.cfg, **uris, teacher_uri=self.teacher_uri, observers=cards)
        self.nodes = "one" if self.cfg.parallel.nodes == 1 else "many"

    def train_here(self):
        """Run the flow's training program on this node, or lend the node to it."""
        with heeding_spot_notices():
            result = self.run_training()
        if result is not None:
            self.trained = result

    def scored_by(self) -> str | None:
        """The measure that the step `evaluate` tells of every row; None of none."""
        return None

    def export_model(self):
        """The program of the step `export`."""
        from posttrain.workflow.pages import show_export
        from steps.export import export, exported_facts

        made = {"root": self.root, "model_uri": self.trained["model_uri"], "trained": self.trained}
        made |= {"provenance": self.provenance, "evaluation": self.evaluation}
        self.exported = refusing(export, self.cfg, **made, tokenizer_sha256=self.tokens["tokenizer_sha256"])
        show_export(self.exported, exported_facts(self.exported["uri"]))

    def run_training(self) -> dict | None:
        """What a flow trains; None on a node that only lends its hardware."""
        raise NotImplementedError

    def train_on_rows(self, title: str, facts: list[str], *, view, tokens_uri: str | None = None) -> dict | None:
        """The recipes on rows: their one training program, seen on a card.

        Args:
            tokens_uri: of what is trained on, where that is not what merge_tokens() left.
        """
        from posttrain.workflow.card import TrainingCard
        from steps.train import train

        config = self.cfg
        facts = [*facts, f"lr {config.optim.lr:g}", f"{config.parallel.data} ranks", f"run {current.run_id}"]
        card = TrainingCard(title, facts, num_steps=config.optim.num_steps, view=view)
        uris = {"root": self.root, "model_uri": self.warmed_up["model_uri"]}
        uris |= {"tokens_uri": tokens_uri or self.tokens["uri"], "teacher_uri": self.warmed_up["teacher_uri"]}
        return refusing(train, config, **uris, recipe=True, gang=self.gang_here(), observers=[card])

    def gang_here(self):
        """The nodes that train together, as this one knows them."""
        from posttrain.compute.cluster import Gang

        if not current.get("is_parallel"):
            return Gang()
        nodes = current.parallel
        key = f"{current.run_id}/{current.step_name}/{current.retry_count}"
        return Gang(num_nodes=nodes.num_nodes, node_index=nodes.node_index, main_ip=nodes.main_ip, key=key)


def main(flow: type[FlowSpec], *, config: str) -> None:
    """Run a flow from the command line; see posttrain.overrides for --config and --config-value.

    Args:
        config: file in configs/ that overrides change where no other is named.
    """
    collector.calm()
    # Metaflow starts the further nodes of a gang on one machine as `python`; that must be this Python, with or
    # without an activated environment.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if get_username() is None:  # root, or a container without a user name: Metaflow would refuse
        os.environ["USERNAME"] = "posttrain"
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # for what a task computes itself
    sys.path.append(os.getcwd())  # a plug-in may lie where the run is started; last, so that it hides nothing
    try:
        sys.argv[1:] = metaflow_arguments(sys.argv[1:], default=CONFIGS / config)
    except ConfigError as error:
        sys.exit(f"posttrain refused to run: {error}")
    try:
        flow()
    except SystemExit:
        if (code := exit_code()) is not None:
            sys.exit(code)
        raise
