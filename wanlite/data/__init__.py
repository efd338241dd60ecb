"""The data of training: prompts, images, text embeddings, latents and trajectories."""
