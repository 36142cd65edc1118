"""What one pass over data, or over the weights, collects for the layers that ask."""
