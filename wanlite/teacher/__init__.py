"""A Wan folder of any layout: names, checkpoint, components, model."""
