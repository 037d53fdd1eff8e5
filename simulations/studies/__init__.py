"""Suites that run methods over cases and seeds, and those that measure one thing."""
