"""What the programs of both ends need around them: settings from file, environment and flags, and systemd."""
