"""What an edge and a connection cost next to the model."""
