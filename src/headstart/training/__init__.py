"""Models by name, data, built-in problems, and training runs."""
