"""A network for other programs: graphs, and the folder that holds them."""
