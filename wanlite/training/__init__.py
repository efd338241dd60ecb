"""Losses, training steps, optimizers, training state, validation and the run folder."""
