"""A saved student and captioned images -> a LoRA for the student, in the formats of diffusers and of ComfyUI."""
