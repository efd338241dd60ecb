"""A saved student -> one file for another program: ComfyUI."""
