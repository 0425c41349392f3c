"""What devices and edges share: MQTT, identities, settings, grammars, metrics and the HTTP server."""
