"""The tiny worlds: captioned scenes drawn by rule, and their judges."""
