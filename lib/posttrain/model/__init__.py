"""The model pillar: modules and math. Knows Batch and safetensors, not processes."""
