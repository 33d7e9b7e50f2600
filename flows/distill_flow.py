"""Distillation: a small model learns a large one's next-token distributions. `python flows/distill_flow.py run`."""

from base import PostTrainFlow, main, own_config

OWN = "distill_tiny.yaml"


class DistillFlow(PostTrainFlow):
    """A student and its frozen teacher on the same packs, over the whole vocabulary."""

    config = own_config(OWN)

    def run_training(self):
        from posttrain.workflow.views import DISTILL

        method = self.cfg.method
        facts = [f"{method.kind} at temperature {method.temperature:g}", f"{method.packs_per_step} packs a step"]
        return self.train_on_rows("Distillation", facts, view=DISTILL)


if __name__ == "__main__":
    main(DistillFlow, config=OWN)
