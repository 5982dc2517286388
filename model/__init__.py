"""Voxels to tokens to features, and weights on disk. Imports no other room."""
