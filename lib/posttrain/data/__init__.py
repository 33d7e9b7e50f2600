"""The data pillar: rows in, batches out."""
