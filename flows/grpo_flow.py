"""GRPO: warm up, then reinforcement learning against a verifiable reward. `python flows/grpo_flow.py run`."""

from metaflow import current

from base import PostTrainFlow, main, own_config, refusing

OWN = "grpo_tiny.yaml"


class GRPOFlow(PostTrainFlow):
    """Group-relative policy optimisation with a policy, a generator and a reward in Ray actors."""

    config = own_config(OWN)

    def run_training(self):
        from posttrain.workflow.card import GRPO, TrainingCard
        from posttrain.workflow.rollout_file import folder_of
        from steps.grpo import grpo

        config = self.cfg
        facts = [
            f"{config.rollout.prompts_per_step} prompts x {config.method.group_size} completions a step",
            f"seed {config.seed}",
            f"lr {config.optim.lr:g}",
            f"{config.parallel.ranks} policy ranks",
            f"run {current.run_id}",
        ]
        shows = {"num_steps": config.optim.num_steps, "view": GRPO, "rollouts_uri": folder_of(self.root)}
        card = TrainingCard("GRPO", facts, **shows)
        uris = {"root": self.root, "model_uri": self.warmed_up["model_uri"], "tokens_uri": self.tokens["uri"]}
        uris["teacher_uri"] = self.warmed_up["teacher_uri"]
        return refusing(grpo, config, **uris, gang=self.gang_here(), observers=[card])


if __name__ == "__main__":
    main(GRPOFlow, config=OWN)
