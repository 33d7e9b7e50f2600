"""The graph that every post-training flow shares, and how a flow starts.

start -> prepare -> tokenize (in shares) -> merge_tokens -> warmup -> train -> evaluate -> export -> end

A flow subclasses PostTrainFlow and names its training program in run_training(). The
steps are programs in steps/; here are only their order, resources and artifacts.
"""

import json
import os
import sys
from pathlib import Path

from metaflow import Config, FlowSpec, card, current, parallel, retry, step
from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY, MetaflowException
from metaflow.util import get_username

import posttrain  # noqa: F401  (imported here so that the code package carries it)
import steps  # noqa: F401
from placement import on_hardware, where_it_runs
from posttrain.config import RunConfig
from posttrain.config_file import load_config
from posttrain.errors import ComputeError, ConfigError, DataError, ModelError, PosttrainError, SyncError
from posttrain.overrides import metaflow_arguments

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


class Refused(MetaflowException):
    """Something in the config, the data or the model that a person can fix."""

    headline = "posttrain refused to run"


class Stopped(MetaflowException):
    """The run could not go on: a worker died or hung, a reward kept failing, a checkpoint is not this run's."""

    headline = "posttrain stopped"


def parse(text: str) -> dict:
    """The parser of metaflow.Config: it returns plain data, because Metaflow stores it."""
    try:
        return load_config(text).model_dump(mode="json")
    except ConfigError as error:
        raise Refused(str(error)) from None


def refusing(program, *args, **kwargs):
    """Call a step's program; errors with a known cause end the task with one message, others with a traceback."""
    try:
        return program(*args, **kwargs)
    except PosttrainError as error:
        global _final
        _final = not isinstance(error, ComputeError | SyncError)
        kind = Refused if isinstance(error, ConfigError | DataError | ModelError) else Stopped
        raise kind(f"{type(error).__name__}: {error}") from None


_final = False
"""Whether this process ended for a reason that a retry would only meet again; main() then tells Metaflow."""


@on_hardware
class PostTrainFlow(FlowSpec):
    """The shared chain; each step's program is in steps/."""

    config = Config("config", default=str(CONFIGS / "grpo_tiny.yaml"), parser=parse, help="Run config, YAML")

    @step
    def start(self):
        """Refuse what cannot work before anything is paid for; decide where the run's files go."""
        from steps.plan import plan

        found = refusing(plan, self.cfg, flow=current.flow_name, run_id=current.run_id)
        self.root, self.provenance = found["root"], found["provenance"]
        self.next(self.prepare)

    @step
    def prepare(self):
        """Snapshot prompts, index the training rows, bring or build the model."""
        from steps.prepare import prepare

        found = refusing(prepare, self.cfg, root=self.root)
        self.data, self.model, self.parts = found["data"], found["model"], found["parts"]
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
        from posttrain.workflow.card import SFT, TrainingCard
        from steps.train import train

        plan = self.cfg.warmup
        facts = [f"seed {self.cfg.seed}", f"{self.cfg.parallel.ranks} ranks", f"run {current.run_id}"]
        cards = [TrainingCard("Warm-up: SFT", facts, num_steps=plan.num_steps, view=SFT)] if plan else []
        uris = {"root": self.root, "model_uri": self.model["uri"], "tokens_uri": self.tokens["uri"]}
        self.warmed_up = refusing(train, self.cfg, **uris, observers=cards)
        self.nodes = "one" if self.cfg.parallel.nodes == 1 else "many"
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

        models = {"before": self.warmed_up["model_uri"], "after": self.trained["model_uri"]}
        self.evaluation = refusing(evaluate, self.cfg, tokens_uri=self.tokens["uri"], models=models)
        show_evaluation(self.evaluation)
        self.next(self.export)

    @step
    def export(self):
        """A Hugging Face folder, proved equal to what was trained."""
        from steps.export import export

        self.exported = refusing(
            export,
            self.cfg,
            root=self.root,
            model_uri=self.trained["model_uri"],
            provenance=self.provenance,
            evaluation=self.evaluation,
            tokenizer_sha256=self.tokens["tokenizer_sha256"],
        )
        self.next(self.end)

    @step
    def end(self):
        """Before and after, and where the model is."""
        from steps.report import report

        self.summary = report(
            evaluation=self.evaluation, before="before", after="after", export_uri=self.exported["uri"]
        )

    @property
    def cfg(self) -> RunConfig:
        """The typed config, with the backend that this task really runs on."""
        document = self.config.to_dict()
        document["parallel"] |= where_it_runs()
        return refusing(load_config, json.dumps(document))

    def train_here(self):
        """Run the flow's training program on this node, or lend the node to it."""
        result = self.run_training()
        if result is not None:
            self.trained = result

    def run_training(self) -> dict | None:
        """What a flow trains; None on a node that only lends its hardware."""
        raise NotImplementedError


def main(flow: type[FlowSpec]) -> None:
    """Run a flow from the command line; see posttrain.overrides for --config and --config-value."""
    # Metaflow starts the further nodes of a gang on one machine as `python`; that must be this Python, with or
    # without an activated environment.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if get_username() is None:  # root, or a container without a user name: Metaflow would refuse
        os.environ["USERNAME"] = "posttrain"
    sys.path.append(os.getcwd())  # a plug-in may lie where the run is started; last, so that it hides nothing
    try:
        sys.argv[1:] = metaflow_arguments(sys.argv[1:], default=CONFIGS / "grpo_tiny.yaml")
    except ConfigError as error:
        sys.exit(f"posttrain refused to run: {error}")
    try:
        flow()
    except SystemExit:
        if _final:
            sys.exit(METAFLOW_EXIT_DISALLOW_RETRY)
        raise
