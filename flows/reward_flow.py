"""Reward model: a model learns to score answers. `python flows/reward_flow.py run`."""

from base import PostTrainFlow, main, own_config

OWN = "reward_tiny.yaml"


class RewardFlow(PostTrainFlow):
    """A score head on pairs (Bradley-Terry) or on labels of single answers."""

    config = own_config(OWN)

    def run_training(self):
        from posttrain.workflow.views import REWARD

        method = self.cfg.method
        facts = [f"rows are {method.kind}", f"{method.packs_per_step} packs a step"]
        return self.train_on_rows("Reward model", facts, view=REWARD)


if __name__ == "__main__":
    main(RewardFlow, config=OWN)
