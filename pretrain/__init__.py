"""Masked autoencoding: objective, loop, probes."""
