"""The workflow pillar: the order of events. The only one that imports the other three."""
