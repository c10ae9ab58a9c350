"""Methods compared as a suite says."""
