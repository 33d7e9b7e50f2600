"""A flow that Argo starts by the clock and by an event: for tests of what is deployed beside the template."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "flows"))

from metaflow import schedule, trigger

from base import main, own_config
from sft_flow import SFTFlow

OWN = "sft_tiny.yaml"


@schedule(cron="0 4 * * *", timezone="Etc/UTC")
@trigger(event="rows.arrived")
class ScheduledFlow(SFTFlow):
    """Supervised fine-tuning every night, and when rows arrive."""

    config = own_config(OWN)


if __name__ == "__main__":
    main(ScheduledFlow, config=OWN)
