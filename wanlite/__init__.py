"""The rooms behind train_distillation.py and run_inference.py; each one knows one thing."""
