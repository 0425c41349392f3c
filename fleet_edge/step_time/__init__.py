"""Step times of an edge: how long its target model takes for how much, measured or read from a file."""
