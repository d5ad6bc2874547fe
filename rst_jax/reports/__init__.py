"""Records as text, plots and pages."""
