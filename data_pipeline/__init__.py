"""Raw scans to shards, and shards to batches of crops. Knows nothing of models."""
