"""Runs over many processes: the mesh, the axes along which it cuts, and what is cut."""
