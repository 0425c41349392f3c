"""Wire: one MQTT link for both ends, real (`PahoLink`) or in memory (`MemoryLink`)."""
