"""Runs over many processes: launching, the mesh, and the axes along which it cuts."""
