"""What an edge notices of its own life, its target's and its devices', and tells the session log of."""
