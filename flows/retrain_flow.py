"""Retraining: new rows train a challenger, which replaces the champion if it is better; by hand, by the clock, or after
another flow. `python flows/retrain_flow.py run`.

start -> the graph of base.py, from the champion on what is new -> export -> promote -> end; start -> end without news.
"""

from metaflow import card, retry, step

from base import PostTrainFlow, main, own_config, refusing
from due import when_due

OWN = "retrain_tiny.yaml"


@when_due
class RetrainFlow(PostTrainFlow):
    """One run looks, trains, compares and promotes; late, doubled or killed it does a registry no harm."""

    config = own_config(OWN, "posttrain.config_retrain:RetrainConfig")

    @step
    def start(self):
        """What came since the champion was trained; without news the run ends well."""
        from steps.retrain import look

        self.found = refusing(look, self.whole)
        print(self.found["why"], flush=True)
        self.news = self.found["news"]
        if self.news == "some":
            self.plan_run()
        self.label(role="candidate" if self.news == "some" else "idle", parent=str(self.found["parent"]).lower())
        self.next({"some": self.prepare, "none": self.end}, condition="news")

    @card(type="blank", id="export")
    @step
    def export(self):
        """A Hugging Face folder, proved equal to what was trained; of a model that is not promoted too."""
        self.export_model()
        self.next(self.promote)

    @card(type="blank", id="promotion")
    @retry(times=2, minutes_between_retries=0)
    @step
    def promote(self):
        """The challenger beside the champion, row by row: promoted, kept out, or too late."""
        from posttrain.workflow.pages import show_promotion
        from steps.promote import promote

        made = {"evaluation": self.evaluation, "exported_uri": self.exported["uri"], "provenance": self.provenance}
        self.promotion = refusing(promote, self.whole, found=self.found, **made)
        show_promotion(self.promotion, self.evaluation)
        promoted = self.promotion["outcome"] == "promoted"
        self.label(role=f"champion-{self.promotion['version']}" if promoted else self.promotion["outcome"])
        self.next(self.end)

    @step
    def end(self):
        """Who is champion, and why."""
        if self.news == "some":
            super().end()
            print(f"{self.promotion['outcome']}: {self.promotion['why']}", flush=True)

    @property
    def whole(self):
        """The config of all runs."""
        from posttrain.config_retrain import RetrainConfig

        return self.typed(RetrainConfig)

    @property
    def cfg(self):
        """The config of this run: the champion's weights, and the rows that are new."""
        from steps.retrain import retrained

        return refusing(retrained, self.whole, self.found)

    def scored_by(self):
        return self.whole.retrain.measure

    def run_training(self):
        from posttrain.workflow.views import DPO, SFT

        facts = [f"{self.cfg.method.packs_per_step} packs a step", f"{len(self.found['files'])} new files"]
        view = DPO if self.cfg.method.name == "dpo" else SFT
        return self.train_on_rows("Retraining", facts, view=view)


if __name__ == "__main__":
    main(RetrainFlow, config=OWN)
