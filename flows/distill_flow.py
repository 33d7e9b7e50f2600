"""Distillation: a small model learns a large one's next-token distributions. `python flows/distill_flow.py run`.

Between warm-up and training the teacher's top k are written down, in shares (teach, merge_taught), with method.top_k.
"""

from metaflow import card, retry, step

from base import PostTrainFlow, main, own_config, refusing

OWN = "distill_tiny.yaml"


class DistillFlow(PostTrainFlow):
    """A student and its frozen teacher: on the same packs, or one after the other."""

    config = own_config(OWN)

    @card(type="blank", id="training")
    @retry(times=2, minutes_between_retries=0)
    @step
    def warmup(self):
        """Supervised fine-tuning of the teacher, where it is fresh; then who writes down what of it says what."""
        from steps.teach import shares

        self.warm_up()
        self.shares = refusing(shares, self.cfg, tokens_uri=self.tokens["uri"])
        self.next(self.teach, foreach="shares")

    @retry(times=2, minutes_between_retries=0)
    @step
    def teach(self):
        """A share of the token files: the teacher's likeliest tokens at every position."""
        from steps.teach import teach

        uris = {"root": self.root, "tokens_uri": self.tokens["uri"]} | {
            name: self.warmed_up[name] for name in ("model_uri", "teacher_uri")
        }
        self.taught = refusing(teach, self.cfg, **uris, part=self.input)
        self.next(self.merge_taught)

    @step
    def merge_taught(self, inputs):
        """All shares as what training reads."""
        from steps.teach import merge_taught

        parts = [each.taught for each in inputs]
        self.merge_artifacts(inputs, exclude=["taught"])
        uris = {"root": self.root, "tokens_uri": self.tokens["uri"]}
        self.taught_uri = refusing(merge_taught, self.cfg, **uris, parts=parts)
        self.next(self.place)

    @step
    def place(self):
        """On one node, or on a gang of them: a step of its own, as Metaflow lets no join choose."""
        self.next({"one": self.train, "many": self.gang}, condition="nodes")

    def run_training(self):
        from posttrain.workflow.views import DISTILL

        method = self.cfg.method
        facts = [f"{method.kind} at temperature {method.temperature:g}", f"{method.packs_per_step} packs a step"]
        facts += [f"the teacher's top {method.top_k}"] if method.top_k else []
        return self.train_on_rows("Distillation", facts, view=DISTILL, tokens_uri=self.taught_uri)


if __name__ == "__main__":
    main(DistillFlow, config=OWN)
