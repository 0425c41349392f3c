"""`fleet edge advise`: what this edge holds, and what a fleet needs."""
