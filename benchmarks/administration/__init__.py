"""What administration costs, and how soon it answers: session log, dashboard, settings from afar."""
