"""The student: shape, initialization from the teacher, loading and saving."""
