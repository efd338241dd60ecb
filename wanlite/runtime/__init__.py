"""Devices, processes, signals, the terminal."""
