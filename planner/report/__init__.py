"""Tables for a person to read; ``console`` alone knows the terminal."""
