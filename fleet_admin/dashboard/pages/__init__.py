"""Pages of the dashboard: a module for each, which says its path, its title and how it is made."""
