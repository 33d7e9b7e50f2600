"""posttrain: LLM post-training as Metaflow flows, in four pillars (data, model, compute, workflow)."""

__version__ = "0.1.0"

METAFLOW_PACKAGE_POLICY = "include"  # Metaflow then ships this package with every flow that imports it
