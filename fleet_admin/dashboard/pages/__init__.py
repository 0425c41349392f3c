"""Pages of the dashboard: each has a path, a title and the function that answers."""
