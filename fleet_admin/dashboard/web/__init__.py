"""Web side of the dashboard: who asks, what may be asked, and how it is answered. Knows nothing of devices."""
