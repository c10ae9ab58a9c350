"""Records as tables and as a page, without torch."""
