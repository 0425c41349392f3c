"""JSON API of the dashboard: the same data for programs, described by an OpenAPI document that is made of it."""
