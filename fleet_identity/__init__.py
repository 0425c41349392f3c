"""Who is who: a small certificate authority for one fleet, and what a device does to get its certificate."""
