"""Settings -> one resolved run: checks, memory, disk, time, messages."""
