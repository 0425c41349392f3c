"""Remote settings and commands of an administrator."""
