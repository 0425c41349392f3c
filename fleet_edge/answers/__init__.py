"""Every reply and verdict of an edge, on one path: made, published and recorded."""
