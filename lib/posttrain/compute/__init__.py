"""The compute pillar: devices, processes, bytes. Knows nn.Module and Batch, no method."""
