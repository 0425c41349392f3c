"""Certificate authority and device enrolment."""
