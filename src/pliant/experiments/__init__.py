"""What the program ``pliant`` does; a library user may ignore all of it."""
