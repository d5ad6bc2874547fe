"""Tickets, their files, and switching between them."""
