"""Many devices and many hosts: the mesh, the one table from logical to mesh axes, and what processes agree on."""
