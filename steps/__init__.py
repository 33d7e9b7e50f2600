"""One plain program per flow step: config and URIs in, small plain values out. No Metaflow in here.

Each also runs by itself: `python -m steps.grpo inputs.json`.
"""

METAFLOW_PACKAGE_POLICY = "include"  # Metaflow then ships this package with every flow that imports it
