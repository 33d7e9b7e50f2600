"""DPO and its relatives: a model learns which of two answers is preferred. `python flows/dpo_flow.py run`."""

from base import PostTrainFlow, main, own_config

OWN = "dpo_tiny.yaml"


class DPOFlow(PostTrainFlow):
    """Preference optimisation on pairs, against the logprobs of the model it started from."""

    config = own_config(OWN)

    def run_training(self):
        from posttrain.workflow.views import DPO

        method = self.cfg.method
        facts = [f"loss {method.kind}", f"beta {method.beta:g}", f"{method.packs_per_step} packs a step"]
        return self.train_on_rows("DPO", facts, view=DPO)


if __name__ == "__main__":
    main(DPOFlow, config=OWN)
