"""Certificate authority of a fleet, and enrolment: how a device gets its certificate."""
