"""Small text encoders and decoders for a student, each made of the teacher's own."""
