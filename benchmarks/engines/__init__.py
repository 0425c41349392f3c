"""What our engines take next to the raw engines under them, and what an edge makes of them."""
