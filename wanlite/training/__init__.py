"""Losses, steps, optimizers, state, validation, the run folder."""
