"""The optimizer SFW and what goes along with its steps."""
