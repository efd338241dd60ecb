"""Shape, initialization from the teacher, loading, saving."""
