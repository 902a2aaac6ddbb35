"""Whole or not there, found again by content."""
