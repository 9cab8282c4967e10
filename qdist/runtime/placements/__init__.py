"""Placements of a group's backbone, one module or folder each, behind the interface `base.Placement`."""
