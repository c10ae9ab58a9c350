"""The verbs of the program ``pliant``; users of the library may ignore this folder."""
