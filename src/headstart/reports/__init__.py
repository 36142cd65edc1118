"""What a study shows: an answer, tables, charts, one page and pictures, all drawn from its summary."""
