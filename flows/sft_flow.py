"""SFT: a model learns to answer as its demonstrations do. `python flows/sft_flow.py run`."""

from base import PostTrainFlow, main, own_config

OWN = "sft_tiny.yaml"


class SFTFlow(PostTrainFlow):
    """Supervised fine-tuning on packed conversations, of all weights or of adapters."""

    config = own_config(OWN)

    def run_training(self):
        from posttrain.workflow.views import SFT

        method = self.cfg.method
        facts = [f"{method.packs_per_step} packs a step"]
        return self.train_on_rows("SFT", facts, view=SFT)


if __name__ == "__main__":
    main(SFTFlow, config=OWN)
