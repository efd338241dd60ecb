"""The stages of a run, in its order: complete, choices, needs, start, lessons, examiner. Each puts rooms together."""
