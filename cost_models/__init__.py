"""What one thing costs: pure functions of numpy arrays, from op to training step."""
