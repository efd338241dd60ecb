"""Prompts, images, text, autoencoder, trajectories: everything that a student learns from."""
