"""The names of the files that a saved student, a run and a component consist of."""

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODEL_INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"
RUN = "run.json"
PROVENANCE = "provenance.json"  # the inputs of a folder in the cache
METRICS = "metrics.jsonl"
REPORT = "report.html"
MODEL_CARD = "README.md"
CACHE = "cache"  # folders of a run, as are the next two
BASE = "base"  # the student at the end of the velocity phase
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
COMPONENTS = ("tokenizer", "text_encoder", "vae")  # that inference needs beside the transformer
COMPONENT_WEIGHTS = {"text_encoder": "model.safetensors", "vae": WEIGHTS}
