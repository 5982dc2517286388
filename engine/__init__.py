"""One training runtime for both stages: DeepSpeed, checkpoints, signals, logs."""
