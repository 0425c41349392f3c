"""Connection: one MQTT connection on one thread, from its socket and the screen of what comes to its goodbye."""
