"""Images of a saved student: settings -> student and prompts -> PNG files."""
