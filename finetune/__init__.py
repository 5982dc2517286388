"""Segmentation heads, prompts, the interactive session, evaluation."""
