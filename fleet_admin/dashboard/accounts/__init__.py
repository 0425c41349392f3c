"""Accounts of the dashboard: passwords, roles, logins of browsers, keys of programs."""
