"""Self-tests: is a device fit to write, does an edge verify?"""
