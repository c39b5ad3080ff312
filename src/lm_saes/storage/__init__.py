"""Everything that touches the disk: files that are whole or absent, tensors, manifests, provenance."""
